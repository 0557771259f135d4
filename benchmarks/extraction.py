"""Extracting features against the bare forward, and searching them against extracting, in one run.

    python benchmarks/extraction.py [--json]
    python benchmarks/extraction.py --device cuda --batch 256 --pictures 20000 --data my/pictures

`extraction_ratio`: pictures/s of `training.evaluation.features.extract` from JPEG files, against
those of the forward alone on tensors that are ready, in batches of the same size. Rounds alternate,
and each is told by its fastest: on a machine that others share, take more of them. The default is
ViT-S/16 at 224 pixels, whose forward takes much longer than reading; with a small network the ratio
tells of reading. Files made for it have ImageNet's sizes, 500 x 375.

`knn_vs_extraction`: seconds of the k-NN of 5,000 queries against a bank of 75,000 random vectors,
streamed in batches as an extraction gives them, over the seconds that extracting 5,000 pictures
with the model in the repository would take at the rate measured here.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# A script's own folder comes first in the path.
sys.path[0] = str(Path(__file__).parents[1])

from backbone.architectures import VITS, Architecture
from backbone.artifact import Artifact
from backbone.preprocess import Preprocess
from backbone.pretrained import load_model
from training.distributed import World, choose_device
from training.evaluation.features import Batch, embedder, extract, reading_workers
from training.evaluation.knn import neighbours, scores
from training.sources import Pictures, every, open_pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16", "auto"])
    parser.add_argument("--architecture", default="vit_small", choices=sorted(VITS))
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="of the centre crop, in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=64, help="in a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--workers", type=int, help="where left out, what the device suggests")
    parser.add_argument("--data", type=Path, help="a folder of JPEG files; made where left out")
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--bank", type=int, default=75_000)
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    here = World(0, 1, choose_device(options.device))
    if options.workers is None:
        options.workers = reading_workers(here.device)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        if options.data is None:
            write_pictures(Path(made), count=options.pictures, side=options.size)
        pictures = open_pictures([options.data or made])
        found = compare(options, here, every(pictures, options.pictures))
    if options.json:
        print(json.dumps(found))
        return
    rates = found["images_per_s"]
    print(f"bare forward {rates['forward']:.1f} images/s, from files {rates['extract']:.1f} "
          f"(ratio {found['extraction_ratio']:.3f})")  # fmt: skip
    print(f"k-NN of {options.queries} against {options.bank}: {found['knn_seconds']:.1f} s; "
          f"extracting the queries: {found['queries_seconds']:.1f} s "
          f"(ratio {found['knn_vs_extraction']:.3f})")  # fmt: skip


def compare(options: argparse.Namespace, here: World, pictures: Pictures) -> dict[str, Any]:
    model = untrained(options)
    forward, from_files = runners(model, pictures, options, here)
    times = race({"forward": forward, "extract": from_files}, options.rounds, here)
    rates = {name: len(pictures.names) / seconds for name, seconds in times.items()}

    default = load_model("default").artifact
    _, from_files = runners(default, pictures, options, here)
    seconds = race({"queries": from_files}, options.rounds, here)["queries"]
    queries_seconds = seconds / len(pictures.names) * options.queries
    knn_seconds = race({"knn": search(options, default, here)}, min(2, options.rounds), here)["knn"]
    return {
        "device": torch.cuda.get_device_name() if here.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "settings": {k: v for k, v in vars(options).items() if k not in ("json", "data")},
        "images_per_s": rates,
        "extraction_ratio": rates["extract"] / rates["forward"],
        "knn_seconds": knn_seconds,
        "queries_seconds": queries_seconds,
        "knn_vs_extraction": knn_seconds / queries_seconds,
    }


def untrained(options: argparse.Namespace) -> Artifact:
    architecture = Architecture(
        name=options.architecture, patch_size=options.patch, image_size=options.size
    )
    return Artifact(
        architecture=architecture,
        preprocess=Preprocess.in_proportion(options.size, patch_size=options.patch),
        weights=architecture.build().state_dict(),
    )


def runners(
    model: Artifact, pictures: Pictures, options: argparse.Namespace, here: World
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The forward on ready tensors and `extract` from files, of as many pictures."""
    embed = embedder(model, here.device, precision=options.precision)
    side, count = model.preprocess.crop, len(pictures.names)
    ready = torch.randn(min(options.batch, count), 3, side, side, device=here.device)

    @torch.inference_mode()
    def forward() -> None:
        for start in range(0, count, options.batch):
            embed(ready[: count - start])

    def from_files() -> None:
        extract(
            pictures,
            model.preprocess.centre_crop,
            embed,
            here=here,
            batch_size=options.batch,
            workers=options.workers,
        )

    return forward, from_files


def search(options: argparse.Namespace, model: Artifact, here: World) -> Callable[[], None]:
    """The whole k-NN but for the vectors, of as many classes as the bank has hundreds."""
    length, classes = model.architecture.embed_dim, max(1, options.bank // 100)
    queries = F.normalize(torch.randn(options.queries, length), dim=1)
    bank = F.normalize(torch.randn(options.bank, length), dim=1)
    labels, truth = (torch.randint(classes, (len(part),)) for part in (bank, queries))
    ks = [k for k in options.k if k <= options.bank]

    def batches() -> Iterator[Batch]:
        for at in torch.arange(options.bank).split(256):
            yield at, {"cls": bank[at].to(here.device)}

    def knn() -> None:
        found = neighbours({"cls": queries}, batches(), k=max(ks), here=here)["cls"]
        scores(found, labels, truth, ks=ks, classes=classes)

    return knn


def race(runners: dict[str, Callable[[], None]], rounds: int, here: World) -> dict[str, float]:
    """Seconds of each one's fastest round. Rounds alternate; of several, the first is a warm-up."""
    best = dict.fromkeys(runners, float("inf"))
    for i in range(rounds + (rounds > 1)):
        for name, run in runners.items():
            synchronise(here)
            before = time.perf_counter()
            run()
            synchronise(here)
            if i or rounds == 1:
                best[name] = min(best[name], time.perf_counter() - before)
    return best


def synchronise(here: World) -> None:
    if here.device.type == "cuda":
        torch.cuda.synchronize()


def write_pictures(folder: Path, *, count: int, side: int) -> None:
    """JPEG files with shapes at several scales, as much larger than the crop as ImageNet's are."""
    rng = np.random.default_rng(0)
    width, height = side * 500 // 224, side * 375 // 224
    for i in range(count):
        picture = np.zeros((height, width, 3))
        for scale in (2, 5, 13, 31):
            noise = rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8)
            large = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            picture += np.asarray(large, dtype=float) / 4
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=90)


if __name__ == "__main__":
    main()
