"""How hard a search tries: rules for the two numbers that trade recall for time.

`effort` is, for hnsw, how many candidates a search keeps (ef), and for the IVF kinds how many
inverted lists it looks into (nprobe). It is stated for k of about 10 and no filter.
"""

from index.kinds import Kind

_GRAPH_EFFORTS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1_024)
_MAX_FILTERED_EF = 8_192


def efforts(kind: Kind, lists: int) -> tuple[int, ...]:
    """The efforts to choose from, in rising order; `lists` is of no account for hnsw."""
    if kind == "hnsw":
        return _GRAPH_EFFORTS
    return (*(1 << power for power in range(lists.bit_length()) if 1 << power < lists), lists)


def candidates_kept(effort: int, k: int, share: float) -> int:
    """hnsw's ef for k neighbours where `share` (0, 1] of the rows are allowed.

    What is not allowed takes up places as well, so as many more are kept.
    """
    kept = max(effort, 2 * k)
    return max(kept, min(round(kept / share), _MAX_FILTERED_EF))


def lists_probed(effort: int, lists: int, share: float) -> int:
    """An IVF kind's nprobe where `share` (0, 1] of the rows are allowed.

    The nearest that are allowed are spread over a larger ball, so over more lists.
    """
    return min(lists, round(effort / share))


def exact_is_cheaper(kind: Kind, effort: int, *, allowed: int, rows: int, lists: int) -> bool:
    """Whether looking at each of the `allowed` of `rows` takes less time than a filtered search."""
    if kind == "hnsw":
        # The graph is walked past effort · rows / allowed candidates, each of which costs as much
        # as some rows of a scan.
        return allowed * allowed <= _ROWS_A_CANDIDATE * effort * rows
    return lists_probed(effort, lists, allowed / rows) == lists if allowed else True


_ROWS_A_CANDIDATE = 4  # measured at 100,000 rows of 384 dimensions


def candidates(kind: Kind, k: int) -> int:
    """How many to search for so that the k nearest are among them.

    More than k where scores are of compressed vectors.
    """
    if kind == "ivf_sq8":
        return 2 * k + 10
    if kind == "ivf_pq":
        return 10 * k + 50
    return k
