"""Several pictures' work, awaited together: what becomes of the others where one fails."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from service.errors import ImageError

T = TypeVar("T")


async def first_error_of(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in order.

    Raises:
        ImageError: of the first picture, in order, that has one.
        Exception: any other error, as soon as it shows; the rest is cancelled.
    """

    async def bad_picture_apart(one: Coroutine[Any, Any, T]) -> T | ImageError:
        try:
            return await one
        except ImageError as error:
            return error

    found = await all_or_none(bad_picture_apart(one) for one in work)
    for one in found:
        if isinstance(one, ImageError):
            raise one
    return [one for one in found if not isinstance(one, ImageError)]


async def all_or_none(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in order; where one fails, the others are cancelled and it is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
