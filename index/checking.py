"""The store's own check: whether file and memory are what they should be."""

from contextlib import closing

import numpy as np

from index.errors import StoreDamaged
from index.mirror import Mirror


def check(mirror: Mirror) -> list[str]:
    """What is wrong, in words; [] when all is well. Reads everything; writes wait meanwhile."""
    with mirror.commits.paused():
        problems = mirror.store.database.check()
        if not problems:
            try:
                problems = [*_check_records(mirror), *_check_memory(mirror)]
            except StoreDamaged as error:
                problems = [str(error)]
    return problems


def _check_records(mirror: Mirror) -> list[str]:
    problems = []
    with mirror.store.database.reading() as connection:
        (last,) = connection.execute("SELECT last_number FROM collection").fetchone()
        (highest,) = connection.execute(
            "SELECT coalesce(max(max(key), max(row)), 0) FROM records"
        ).fetchone()
        if highest > last:
            problems.append(f"number {highest} is in use, and {last} was the last to be given out")
        for space, table in mirror.store.tables().items():
            (lacking,) = connection.execute(
                f"SELECT count(*) FROM records WHERE row NOT IN (SELECT row FROM {table})"
            ).fetchone()
            (spare,) = connection.execute(
                f"SELECT count(*) FROM {table} WHERE row NOT IN (SELECT row FROM records)"
            ).fetchone()
            if lacking or spare:
                problems.append(
                    f"space {space!r}: {lacking} records without a vector, "
                    f"{spare} vectors without a record"
                )
    for space in mirror.store.spaces:
        with closing(mirror.store.vectors_in(space)) as blocks:
            for _ in blocks:  # reading them finds what is of a wrong length or not finite
                pass
    return problems


def _check_memory(mirror: Mirror) -> list[str]:
    view, rows = mirror.current(), mirror.store.all_rows()
    numbers = view.numbers[: view.count]
    live = numbers[view.live[: view.count]]
    problems = []
    if not np.array_equal(live, rows):
        problems.append(f"{len(live)} rows are in memory and {len(rows)} in the file, or others")
    if view.dead != view.count - len(live) or (np.diff(numbers) <= 0).any():
        problems.append("the rows in memory are not in order")
    for name, space in view.spaces.items():
        if space.rows != view.count:
            problems.append(f"space {name!r}: {space.rows} vectors in memory for {view.count} rows")
    return problems
