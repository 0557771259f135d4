"""A small video in DAVIS's layout: a textured square that wanders over a textured background."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.evaluation.davis import write_mask

SIZE = (128, 96)  # width and height in pixels
SIDE = 32


def place(frame: int) -> tuple[int, int]:
    """The square's left and top."""
    return 12 + 14 * frame, 20 + 6 * frame


def true_mask(frame: int) -> npt.NDArray[np.uint8]:
    mask = np.zeros(SIZE[::-1], dtype=np.uint8)
    left, top = place(frame)
    mask[top : top + SIDE, left : left + SIDE] = 1
    return mask


def frame_picture(frame: int) -> Image.Image:
    rng = np.random.default_rng(5)
    grass = rng.integers(0, 70, (24, 32, 3), dtype=np.uint8) + np.array([0, 90, 20], np.uint8)
    stripes = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    stripes[:, :, 0] = 230
    stripes[::6] = stripes[1::6] = (250, 240, 60)
    picture = Image.fromarray(grass).resize(SIZE)
    picture.paste(Image.fromarray(stripes), place(frame))
    return picture


def write_davis(root: Path, *names: str, frames: int = 6) -> Path:
    """Sequences of the same video, in the published layout; returns `root`."""
    for name in names:
        pictures, masks = root / "JPEGImages/480p" / name, root / "Annotations/480p" / name
        pictures.mkdir(parents=True)
        masks.mkdir(parents=True)
        for i in range(frames):
            frame_picture(i).save(pictures / f"{i:05d}.jpg", quality=95)
            write_mask(masks / f"{i:05d}.png", true_mask(i))
    lists = root / "ImageSets/2017"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in names))
    return root
