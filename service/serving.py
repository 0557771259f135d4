"""uvicorn as the service needs it: signals, exit status, nothing written to the log twice."""

import os
import signal
import sys
from types import FrameType

import uvicorn


class Server(uvicorn.Server):
    """A server that ends with `status`, and at once at the second signal.

    uvicorn's own raises SIGTERM again when it is done, so that the process dies of it.
    """

    status = 0

    def end(self, status: int) -> None:
        """Finishes what is under way, then ends with `status`."""
        self.status = status
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal is an order to finish; the next is not to be argued with."""
        if self.should_exit:
            print(f"{signal.Signals(sig).name} again: ending at once", file=sys.stderr, flush=True)
            os._exit(128 + sig)
        self.should_exit = True
