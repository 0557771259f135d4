"""The same model behind LitServe, with Pillow and torchvision doing the preprocessing.

    python benchmarks/serving_litserve.py --port 8001 --batch 16 --timeout 0.002 --workers 1

One process for HTTP, and `--workers` processes that decode and compute batches.
"""

import argparse
import sys
from pathlib import Path
from typing import Annotated, Any

import litserve
import torch
from fastapi import File

# A script's own folder comes first in the path.
sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.serving_textbook import Textbook


class Embeddings(litserve.LitAPI):
    def __init__(self, *, model: str, threads: int, **options: Any) -> None:
        super().__init__(**options)
        self._model_name = model
        self._threads = threads

    def setup(self, device: str) -> None:
        torch.set_num_threads(self._threads)
        self._textbook = Textbook(self._model_name, device)

    def decode_request(self, request: Annotated[bytes, File()]) -> torch.Tensor:
        return self._textbook.prepare(request)

    def batch(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return inputs

    def predict(self, x: list[torch.Tensor] | torch.Tensor) -> torch.Tensor:
        return self._textbook.embed(x) if isinstance(x, list) else self._textbook.embed([x])[0]

    def unbatch(self, output: torch.Tensor) -> list[torch.Tensor]:
        return list(output)

    def encode_response(self, output: torch.Tensor) -> dict[str, list[float]]:
        return {"embedding": output.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="default")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--timeout", type=float, default=0.0, help="seconds a batch may wait")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="torch's, in each worker")
    options = parser.parse_args()
    api = Embeddings(
        model=options.model,
        threads=options.threads,
        max_batch_size=options.batch,
        batch_timeout=options.timeout,
    )
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=options.workers, timeout=300
    )
    server.run(
        host="127.0.0.1",
        port=options.port,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
