import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest

from service import app
from service.memory import give_back, trimmer
from tests.service.conftest import Serve


def resident_mib() -> float:
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS:")
    )
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(trimmer() is None, reason="no glibc")
def test_what_was_freed_goes_back() -> None:
    trim = trimmer()
    assert trim is not None
    held = [np.ones(5000, dtype=np.uint8) for _ in range(30_000)]  # 143 MiB in small pieces
    kept = held[-1]  # at the end of the heap, which so cannot shrink by itself
    del held
    before = resident_mib()
    trim()
    assert resident_mib() < before - 80
    assert kept.sum() == 5000


@pytest.mark.anyio
async def test_again_and_again_until_it_is_cancelled() -> None:
    threads: list[int] = []
    task = asyncio.create_task(give_back(lambda: threads.append(threading.get_ident()), every_s=0))
    while len(threads) < 3:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert threading.get_ident() not in threads


@pytest.mark.anyio
async def test_the_service_does_it(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[None] = []
    monkeypatch.setattr(app, "trimmer", lambda: lambda: trims.append(None))
    monkeypatch.setattr(app, "_TRIM_EVERY_S", 0.0)
    async with serve():
        while len(trims) < 3:
            await asyncio.sleep(0.001)
    ended = len(trims)
    await asyncio.sleep(0.05)
    assert len(trims) == ended
