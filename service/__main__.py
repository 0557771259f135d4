"""python -m service: the service, its settings from the environment and `.env`."""

import logging
import os
import signal
import socket
import sys

import uvicorn

from service import cores
from service.logs import configure_logs
from service.serving import Server
from service.settings import ClientSettings, InvalidSettings, Settings, load_settings
from service.settings_help import help_of, variable

_SWITCH_S = 0.0005


def main() -> int:
    """Runs until a signal.

    Returns:
        0; 2 for settings that cannot be, a model that cannot be loaded, a port that is taken or
        collections that cannot be opened; 1 where a thread of the service died.
    """
    if len(sys.argv) > 1:
        return _help(sys.argv[1:])
    try:
        settings = load_settings()
    except InvalidSettings as error:
        return _fail(*error.complaints)
    if not os.environ.keys() & cores.BRIEF_WAITS.keys():
        os.environ |= cores.BRIEF_WAITS  # read by OpenMP when torch loads
    # A search takes less than Python's 5 ms, and so long it may wait for each turn beside a writer.
    sys.setswitchinterval(_SWITCH_S)
    from service.app import create_app
    from service.loading import check_settings

    try:
        check_settings(settings)
        app = create_app(settings, end=lambda status: server.end(status))
        listening = _listen(settings)
    except ValueError as error:
        return _fail(str(error))
    configure_logs(settings.log_format, settings.log_level)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the server takes signals itself
    server = Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            forwarded_allow_ips=list(settings.forwarded_allow_ips),
            log_level=settings.log_level,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=settings.drain_seconds,
        )
    )
    host, port, *_ = listening.getsockname()
    logging.getLogger("service").info("listening on http://%s:%d", host, port)
    with listening:
        server.run(sockets=[listening])
    if app.state.lifecycle.left_threads:
        # The interpreter would wait for them; what was acknowledged is on disk.
        logging.shutdown()
        os._exit(server.status)
    return server.status


def _listen(settings: Settings) -> socket.socket:
    host, port = settings.host, settings.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError(
            f"{variable('host')} = {host!r}, {variable('port')} = {port}: {error.strerror}"
        ) from error


def _fail(*messages: str) -> int:
    for message in messages:
        print(f"error: {message}", file=sys.stderr)
    return 2


def _help(arguments: list[str]) -> int:
    if arguments not in (["--help"], ["-h"]):
        return _fail(f"unknown argument {arguments[0]!r}; try --help")
    print("python -m service takes its settings from the environment and from .env:\n")
    print(help_of(Settings))
    print("\npython -m service.ingest takes the same for its part:\n")
    print(help_of(ClientSettings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
