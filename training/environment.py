"""What a run was made with: versions, devices, commit, command line."""

import json
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from training.distributed import World

_PACKAGES = ("torchvision", "numpy", "pillow")


def write_environment(run_dir: Path, here: World, *, start: int) -> None:
    """Writes `environment.json`; a resumed run says what it goes on with, and from which step."""
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**environment(here), "from_step": start}, indent=2)
    (run_dir / "environment.json").write_text(text + "\n", encoding="utf-8")


def environment(here: World) -> dict[str, Any]:
    """Plain values; neither the machine's name nor its environment variables."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processes": here.size,
        "device": here.device.type,
        "threads": torch.get_num_threads(),
        "commit": _commit(Path(__file__).resolve().parents[1]),
        "command": sys.orig_argv,
    }
    if here.device.type == "cuda":
        properties = torch.cuda.get_device_properties(here.device)
        found["device_name"] = properties.name
        found["device_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    """The commit of the repository at `root`, with "+changes" where files differ from it."""
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():  # not a repository around an installed package
        return None

    def ask(*arguments: str) -> str | None:
        done = subprocess.run(
            [git, "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    changed = commit and ask("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if changed else commit
