"""python -m service: the service, its settings from the environment and `.env`."""

import logging
import signal
import sys

import uvicorn
from pydantic import ValidationError

from service.app import create_app, find_models
from service.settings import Settings


def main() -> int:
    """Runs until a signal; returns 2 for settings that cannot be."""
    if len(sys.argv) > 1:
        return _help(sys.argv[1:])
    try:
        settings = Settings()
    except ValidationError as error:
        for fault in error.errors():
            name = "_".join(["DINOSCOPE", *(str(part).upper() for part in fault["loc"])])
            print(f"error: {name} = {fault['input']!r}: {fault['msg']}", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        models = find_models(settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # uvicorn finishes what is under way, then raises the signal again for whoever waits for it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.run(
        create_app(settings, models=models),
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        log_config=None,
        timeout_graceful_shutdown=20,  # seconds for requests under way, inside Docker's patience
    )
    return 0


def _help(arguments: list[str]) -> int:
    if arguments not in (["--help"], ["-h"]):
        print(f"error: unknown argument {arguments[0]!r}; try --help", file=sys.stderr)
        return 2
    print("python -m service takes its settings from the environment and from .env:\n")
    for name, field in Settings.model_fields.items():
        print(f"  DINOSCOPE_{name.upper()} (default {field.default})\n      {field.description}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
