"""Weights & Biases, for runs that ask for it; nothing else needs it installed."""

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.config import ConfigError
from training.distributed import World


def start_wandb(project: str, run_dir: Path, recipe: Mapping[str, Any], here: World) -> Any:
    """Opens the run's page in `project`; a resumed run goes on with its own.

    Returns the client's run object on rank 0, None on other ranks and for `project` = "".

    Raises:
        ConfigError: a project is named, and wandb is not installed; on every rank.
    """
    if not project:
        return None
    try:
        wandb = importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"wandb_project = {project!r}: wandb is not installed; `pip install wandb`, or leave "
            "the key out"
        ) from error
    if not here.is_main:
        return None
    identity = run_dir / "wandb.id"
    if not identity.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        identity.write_text(uuid.uuid4().hex + "\n")
    return wandb.init(
        project=project,
        id=identity.read_text().strip(),
        name=run_dir.name,
        dir=str(run_dir),
        config=dict(recipe),
        resume="allow",
    )
