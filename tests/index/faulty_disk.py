"""A disk that fails on demand and keeps a diary: faulty_disk.c, in a process of its own.

It stands between a process and the C library, so SQLite meets it as well as Python does.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.index.helpers import REPOSITORY

_SOURCE = Path(__file__).with_name("faulty_disk.c")
_FAULT = "FAULTY_DISK_FAULT"


def build(folder: Path) -> Path:
    """Compile it into `folder`; skips the test where there is no compiler, or no such thing."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "g++"))), None)
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler (cc, gcc or g++), on Linux")
    library = folder / "faulty_disk.so"
    language = ["-x", "c"] if not compiler.endswith("g++") else ["-fpermissive", "-w"]
    command = [compiler, *language, "-shared", "-fPIC", "-O1", "-o", str(library), str(_SOURCE)]
    subprocess.run([*command, "-ldl", "-lpthread"], check=True)
    return library


def run_on(library: Path, root: Path, module: str, *arguments: str) -> str:
    """Run `python -m module ROOT arguments` with everything below `root` on such a disk.

    Its diary is `root` with `.diary` behind it. Gives what was printed; fails with it.
    """
    disk = {
        "LD_PRELOAD": str(library),
        "FAULTY_DISK_ROOT": f"{root}/",
        "FAULTY_DISK_DIARY": f"{root}.diary",
        _FAULT: f"{root}.fault",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", module, str(root), *arguments]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | disk, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def faults(call: str, number: int, pattern: str) -> Iterator[None]:
    """Inside, in a process that `run_on` runs, calls fail so; see faulty_disk.c."""
    path = Path(os.environ[_FAULT])
    path.write_text(f"{call} {number} {pattern}\n")
    try:
        yield
    finally:
        path.unlink()
