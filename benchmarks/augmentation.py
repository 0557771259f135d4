"""Multi-crop with Pillow against batches on a device, and what reduced-scale decoding saves.

    python benchmarks/augmentation.py [FOLDER] [--device cuda] [--json]

FOLDER holds JPEG photographs; the default is the repository's own. Pillow runs on one core. On the
CPU, so does the device's path: matrix products that touch every pixel are made for a GPU, and the
ratio says what they cost without one. The large picture is a photograph brought to 12 megapixels.
Both sides of a ratio are run in turns, and the best of each is taken.
"""

import argparse
import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from training.augmentations import View, draw_views, render_views
from training.config import Crops
from training.decoding import decode, decode_views, to_array
from training.device_augmentations import Drawn, augment, collate_drawn, view_table

PHOTOS = Path(__file__).parents[1] / "docs" / "pictures"
LARGE = (4000, 3000)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=PHOTOS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32, help="pictures in a batch")
    parser.add_argument("--side", type=int, default=400, help="the pictures' longer side, pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    paths = sorted(options.folder.glob("*.jpg"))[: options.batch]
    if not paths:
        parser.error(f"{options.folder} holds no .jpg")
    pictures = [decode(path.read_bytes(), path.name) for path in paths]

    results: dict[str, Any] = {"device": name_of(device), "pictures": len(pictures)}
    for label, crops in {
        "224_96": Crops(),
        "64_32": Crops(global_size=64, local_count=6, local_size=32),
    }.items():
        side = min(options.side, 2 * crops.global_size)
        fitted = [fit(pictures[i % len(pictures)], side) for i in range(options.batch)]
        results |= {f"{k}_{label}": v for k, v in both_ways(fitted, crops, device, options).items()}
    results |= reduced_decoding(pictures[0], Crops(), options.repeats)
    if options.json:
        print(json.dumps(results))
    else:
        for key, value in results.items():
            print(f"{key}: {value}")


def both_ways(
    pictures: list[Image.Image], crops: Crops, device: torch.device, options: argparse.Namespace
) -> dict[str, float]:
    """Images/s of both paths from decoded pictures to 8-bit crops, and how much they differ."""
    views = [draw_views(*p.size, crops, random.Random(i)) for i, p in enumerate(pictures)]
    batch = collate_drawn(
        [
            Drawn(torch.from_numpy(to_array(p)), view_table(v))
            for p, v in zip(pictures, views, strict=True)
        ]
    )
    canvas = batch.canvas.to(device)

    def pillow() -> Any:
        return [render_views(p, v, crops) for p, v in zip(pictures, views, strict=True)]

    def on_device() -> Any:
        made = augment(canvas, batch.sizes, batch.views, crops)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return made

    reference = np.stack([made[0] for made in pillow()], axis=1).astype(np.int16)
    difference = np.abs(on_device()[0].cpu().numpy() - reference)
    slow, fast = in_turns([pillow, on_device], options.repeats)
    return {
        "pillow_images_per_s": round(len(pictures) / slow, 1),
        "device_images_per_s": round(len(pictures) / fast, 1),
        "device_vs_pillow": round(slow / fast, 2),
        "mean_difference_levels": round(float(difference.mean()), 5),
    }


def reduced_decoding(picture: Image.Image, crops: Crops, repeats: int) -> dict[str, float]:
    """A 12-megapixel JPEG to its crops: decoded whole, and as large as its views need."""
    buffer = io.BytesIO()
    picture.resize(LARGE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    content = buffer.getvalue()

    def draw(width: int, height: int) -> list[View]:
        return draw_views(width, height, crops, random.Random(0))

    def whole() -> Any:
        source = decode(content, "large")
        return render_views(source, draw(*source.size), crops)

    def reduced() -> Any:
        source, views = decode_views(content, "large", draw)
        return render_views(source, views, crops)

    a, b, c, d = in_turns(
        [
            lambda: decode(content, "large"),
            lambda: decode_views(content, "large", draw),
            whole,
            reduced,
        ],
        repeats,
    )
    difference = np.abs(whole()[0].astype(np.int16) - reduced()[0])
    side = decode_views(content, "large", draw)[0]
    return {
        "large_decoded_at": round(LARGE[0] / side.width) if isinstance(side, Image.Image) else 1,
        "large_whole_ms": round(1000 * c, 1),
        "large_reduced_ms": round(1000 * d, 1),
        "reduced_decode_ratio": round(a / b, 2),
        "reduced_decode_and_crop_ratio": round(c / d, 2),
        "reduced_mean_difference_levels": round(float(difference.mean()), 3),
    }


def in_turns(functions: list[Callable[[], Any]], repeats: int) -> list[float]:
    """The best time of each, in seconds."""
    best = [float("inf")] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def fit(picture: Image.Image, side: int) -> Image.Image:
    share = side / max(picture.size)
    return picture.resize((round(picture.width * share), round(picture.height * share)))


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, one core"


if __name__ == "__main__":
    main()
