"""The project's training against a textbook implementation of the same method, in one run.

    python benchmarks/training.py [--json]
    python benchmarks/training.py --device cuda --architecture vit_small --global-size 224 \
        --local-size 96 --locals 8 --batch 64 --data my/pictures

Both train the same network with the same K, crops and batch: first on tensors that are ready
(`step_ratio`), then from JPEG files (`end_to_end_ratio`). The textbook reads them in workers; so do
ours on CUDA, but not on a CPU, where a worker would take a core from the step (`--own-workers`).
Ours runs in the precision that it chooses by itself, and the textbook in fp32 on a CPU and in bf16
on CUDA; the `..._same_precision` ratios set both to the textbook's. Rounds alternate, and each is
told by its fastest round, so that what else the machine does weighs on none. `textbook_dino.py`
says what the textbook is. The defaults are ViT-Ti/16 at 64 pixels, 2 + 6 crops, K = 65536, 16
pictures a step.
"""

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# A script's own folder comes first in the path, and this file would stand for the package.
sys.path[0] = str(Path(__file__).parents[1])

from backbone.architectures import VITS
from benchmarks.textbook_dino import MultiCrop, Textbook, Vit, loader
from training import data
from training.captured import CapturedStep, can_capture
from training.config import Recipe, recipe_from_dict
from training.distributed import World, choose_device
from training.plan import Plan
from training.precision import autocast_dtype
from training.pretrain import StepResult, train_step
from training.rates import Rates
from training.state import make_training

UNTIMED = 5
"""Steps before a round on CUDA: ours compile in the first, and are captured in the fourth."""

Steps = Generator[None, None, None]
"""Does a step each time that it is asked for the next."""

RATES = Rates(
    lr=1e-4,
    weight_decay=0.04,
    teacher_momentum=0.996,
    teacher_temperature=0.04,
    last_layer_frozen=False,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--precision", default="auto", choices=["auto", "fp32", "bf16"], help="ours"
    )
    parser.add_argument("--textbook-precision", default="", choices=["", "fp32", "bf16"])
    parser.add_argument("--architecture", default="vit_tiny", choices=sorted(VITS))
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--global-size", type=int, default=64)
    parser.add_argument("--local-size", type=int, default=32)
    parser.add_argument("--locals", type=int, default=6)
    parser.add_argument("--k", type=int, default=65536)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--own-workers", type=int, help="ours; on a CPU, where left out, 0")
    parser.add_argument("--steps", type=int, default=6, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="ours with compiled blocks")
    parser.add_argument("--data", type=Path, help="a folder of JPEG files; made where left out")
    parser.add_argument("--only-ready", action="store_true", help="leave out the files")
    parser.add_argument("--profile", action="store_true", help="where our step's time goes")
    parser.add_argument("--peak-tflops", type=float, help="of the device, to tell our share of it")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = choose_device(options.device)
    if options.own_workers is None:
        options.own_workers = 0 if device.type == "cpu" else options.workers
    torch.manual_seed(0)
    with contextlib.ExitStack() as stack:
        files: list[Path] = []
        if not options.only_ready:
            folder = options.data
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                write_pictures(folder, count=16 * options.batch, side=options.global_size)
            files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        found = compare(options, device, files)
    if options.json:
        print(json.dumps(found))


def compare(options: argparse.Namespace, device: torch.device, files: list[Path]) -> dict[str, Any]:
    theirs = options.textbook_precision or ("bf16" if device.type == "cuda" else "fp32")
    recipe = recipe_of(options, files)
    own_dtype, their_dtype = (autocast_dtype(p, device) for p in (options.precision, theirs))
    ours = Ours(recipe, device)
    competitors = {"ours": ours}
    if own_dtype != their_dtype:
        competitors["ours_same_precision"] = Ours(replace(recipe, precision=theirs), device)
    shape, drop = VITS[options.architecture], recipe.model.drop_path_rate

    def backbone(rate: float) -> Vit:
        sizes = (options.global_size, options.patch, shape.embed_dim, shape.depth, shape.num_heads)
        return Vit(*sizes, rate)

    textbook = Textbook(
        backbone,
        shape.embed_dim,
        k=options.k,
        crops=2 + options.locals,
        drop_path=drop,
        device=device,
        dtype=their_dtype,
    )
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": {
            "ours": str(own_dtype or torch.float32),
            "textbook": str(their_dtype or torch.float32),
        },
        "settings": {k: v for k, v in vars(options).items() if k not in ("json", "data")},
    }
    sides = [options.global_size] * 2 + [options.local_size] * options.locals
    crops = [torch.randn(options.batch, 3, side, side, device=device) for side in sides]
    ready: dict[str, Callable[[], Steps]] = {
        "textbook": partial(forever, lambda: textbook.step(crops))
    }
    for name, each in competitors.items():
        ready[name] = partial(forever, partial(each.step, crops))
    found["ready"] = race(options, device, ready, steps=options.steps)
    found |= ratios("step_ratio", found["ready"])
    say(options, "ready tensors", found["ready"])
    if options.peak_tflops:
        rate = found["ready"]["ours"]["images_per_s"]
        counted = Ours(replace(recipe, compile=False, cuda_graph=False), device)
        share = flops(counted, crops) / options.batch * rate / (options.peak_tflops * 1e12)
        found["share_of_peak"] = share
        print(f"our share of the device's peak: {share:.1%}", file=sys.stderr)
    if options.profile:
        profile(lambda: ours.step(crops), device)
    if files:
        multi_crop = MultiCrop(
            files, size=options.global_size, local=options.local_size, count=options.locals
        )
        feeds: dict[str, Callable[[], Steps]] = {
            "textbook": lambda: textbook_feed(textbook, multi_crop, options, device)
        }
        for name, each in competitors.items():
            feeds[name] = partial(each.feed, options.batch)
        found["end_to_end"] = race(options, device, feeds, steps=2 * options.steps)
        found |= ratios("end_to_end_ratio", found["end_to_end"])
        say(options, "from JPEG files", found["end_to_end"])
    return found


def recipe_of(options: argparse.Namespace, files: list[Path]) -> Recipe:
    table = {
        "device": options.device,
        "precision": options.precision,
        "compile": options.compile,
        "epochs": 1000,
        "batch_size": options.batch,
        "data": {"train": [str(f) for f in {f.parent for f in files}] or ["none"],
                 "workers": options.own_workers},
        "model": {"architecture": options.architecture, "patch_size": options.patch},
        "head": {"out_dim": options.k},
        "crops": {"global_size": options.global_size, "local_size": options.local_size,
                  "local_count": options.locals},
    }  # fmt: skip
    return recipe_from_dict(table)


class Ours:
    """The project's own training, as `training.pretrain` runs it."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        self.world = World(0, 1, device)
        self.training = make_training(recipe, self.world)
        self._step: Callable[..., StepResult] = partial(train_step, self.training)
        if can_capture(recipe, self.world):
            self._step = CapturedStep(self.training, self._step)

    def step(self, crops: list[Tensor]) -> None:
        self._step([crops], RATES)

    def feed(self, batch: int) -> Steps:
        """One step from files each time."""
        recipe, device = self.recipe, self.world.device
        source = data.open_source(recipe.data, Path(), self.world)
        count = data.picture_count(source)
        plan = Plan(count=count, batch_size=batch, world=self.world, seed=0)
        batches = data.crop_loader(
            source, plan, recipe.data, recipe.crops, start=0, stop=10**6, device=device
        )
        for each in batches:
            crops = data.to_crops(
                each, source, recipe.data, recipe.crops, device, compiled=recipe.compile
            )
            self.step(crops)
            yield


def textbook_feed(
    textbook: Textbook, dataset: MultiCrop, options: argparse.Namespace, device: torch.device
) -> Steps:
    batches = loader(dataset, batch=options.batch, workers=options.workers)
    while True:
        for crops in batches:
            textbook.step([crop.to(device, non_blocking=True) for crop in crops])
            yield


def forever(step: Callable[[], Any]) -> Steps:
    while True:
        step()
        yield


def race(
    options: argparse.Namespace,
    device: torch.device,
    runners: dict[str, Callable[[], Steps]],
    *,
    steps: int,
) -> dict[str, dict[str, float]]:
    """Images/s and peak memory of each, by its fastest round; one round of each in turn.

    A round begins with steps that are not timed, as many as a loader's workers read ahead, so that
    none of the timed ones finds its batch made while the clock stood still.
    """
    best = dict.fromkeys(runners, float("inf"))
    peak = dict.fromkeys(runners, 0.0)
    for _ in range(options.rounds):
        for name, start in runners.items():
            gc.collect()
            runner = start()
            if device.type == "cuda":  # a captured step's own memory does not show in its replays
                torch.cuda.reset_peak_memory_stats()
            untimed = UNTIMED if device.type == "cuda" else 1
            for _ in range(untimed if steps == options.steps else 2 * options.workers + untimed):
                next(runner)
            if device.type == "cuda":
                torch.cuda.synchronize()
            before = time.perf_counter()
            for _ in range(steps):
                next(runner)
            if device.type == "cuda":
                torch.cuda.synchronize()
                peak[name] = max(peak[name], torch.cuda.max_memory_allocated() / 2**20)
            best[name] = min(best[name], time.perf_counter() - before)
            runner.close()
    return {
        name: {
            "images_per_s": steps * options.batch / best[name],
            **({"peak_mib": peak[name]} if device.type == "cuda" else {}),
        }
        for name in runners
    }


def ratios(title: str, found: dict[str, dict[str, float]]) -> dict[str, float]:
    textbook = found["textbook"]["images_per_s"]
    same = found.get("ours_same_precision", found["ours"])
    return {
        title: found["ours"]["images_per_s"] / textbook,
        f"{title}_same_precision": same["images_per_s"] / textbook,
    }


def say(options: argparse.Namespace, title: str, found: dict[str, Any]) -> None:
    textbook = found["textbook"]["images_per_s"]
    rates = ", ".join(
        f"{name} {each['images_per_s']:.1f} images/s ({each['images_per_s'] / textbook:.2f})"
        for name, each in found.items()
    )
    print(f"{title}: {rates}", file=sys.stderr if options.json else sys.stdout)


def flops(ours: Ours, crops: list[Tensor]) -> float:
    """Of one step: the framework's own count of its matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        ours.step(crops)
    return float(counter.get_total_flops())


def profile(step: Callable[[], Any], device: torch.device) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=25), file=sys.stderr)


def write_pictures(folder: Path, *, count: int, side: int) -> None:
    """JPEG files with shapes at several scales, a little larger than the global crops."""
    rng = np.random.default_rng(0)
    for i in range(count):
        picture = np.zeros((side * 2, side * 2, 3))
        for scale in (2, 5, 13, 31):
            noise = rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8)
            large = Image.fromarray(noise).resize((side * 2, side * 2), Image.Resampling.BICUBIC)
            picture += np.asarray(large, dtype=float) / 4
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=90)


if __name__ == "__main__":
    main()
