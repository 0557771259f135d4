"""Which of several media types an answer is given in."""

from functools import lru_cache

NPY = ("application/x-npy", "application/octet-stream")
"""One array as a NumPy .npy file, without pickle."""


@lru_cache(maxsize=64)
def preferred(accept: str, offered: tuple[str, ...]) -> str:
    """The offered media type that an `Accept` header likes best (RFC 9110, section 12.5.1).

    Of equal weights a type that is named wins over a pattern, then the one that is offered first.
    Where nothing that is offered is accepted, or the header is empty, it is the first.
    """
    wishes = [_parsed(part) for part in accept.split(",") if part.strip()]
    best, rank = offered[0], (0.0, 0)
    for kind in offered:
        patterns = ("*/*", f"{kind.partition('/')[0]}/*", kind)  # what is more precise decides
        found = [(patterns.index(w), weight) for w, weight in wishes if w in patterns]
        if found:
            precision, weight = max(found)
            if weight > 0.0 and (weight, precision) > rank:
                best, rank = kind, (weight, precision)
    return best


def _parsed(part: str) -> tuple[str, float]:
    kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
    weight = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                weight = min(1.0, max(0.0, float(value)))
            except ValueError:
                weight = 0.0  # a weight that is none accepts nothing
    return kind, weight if weight == weight else 0.0  # nan
