"""A video of where CLS looks in the last block, beside the frames (the original's videos)."""

import argparse
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from backbone.artifact import ArtifactError
from backbone.descriptors import mass_mask
from backbone.vit import VisionTransformer
from training.config import ConfigError
from training.evaluation.command import Session, add_common_options, positive, session, tell
from training.evaluation.video_files import Frame, frame_writer, open_frames
from training.precision import autocast, autocast_dtype
from training.sources import DataError

COLORMAPS = ("inferno", "viridis", "magma", "plasma", "cividis", "turbo", "jet", "gray")
RATE = Fraction(24)
"""Frames a second, where the input does not tell."""

_GAP = 4  # pixels between panels
_MOST_PER_SECOND = 1000

Head = Literal["mean", "all"] | int


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How maps are drawn.

    Attributes:
        head: the mean of all heads, the number of one from 0 up, or "all" of them in a grid.
        mass: where given, only the patches that hold this share of the attention are coloured.
        colormap: one of `COLORMAPS`.
        overlay: strength of the map over the frame, 0 (the frame alone) to 1 (the map alone).

    Raises:
        ConfigError: a value that cannot be.
    """

    head: Head = "mean"
    mass: float | None = None
    colormap: str = "inferno"
    overlay: float = 0.6

    def __post_init__(self) -> None:
        if self.mass is not None and not 0.0 < self.mass <= 1.0:
            raise ConfigError(f"--mass {self.mass} is not above 0 and at most 1")
        if self.colormap not in COLORMAPS:
            raise ConfigError(f"--colormap {self.colormap!r} is none of {', '.join(COLORMAPS)}")
        if not 0.0 <= self.overlay <= 1.0:
            raise ConfigError(f"--overlay {self.overlay} is not from 0 to 1")


def panels(picture: Image.Image, maps: Tensor, drawing: Drawing) -> Image.Image:
    """A frame beside its maps [A, h, w] of attention to patches, as `drawing` wants them.

    Two panels of the frame's size side by side; with every head a grid, row by row, of the frame
    and the heads in their order.

    Raises:
        ConfigError: matplotlib, which has the colour maps, is not installed.
    """
    if drawing.head == "mean":
        maps = maps.mean(dim=0, keepdim=True)
    elif isinstance(drawing.head, int):
        maps = maps[drawing.head][None]
    tiles = [picture, *(overlay(picture, each, drawing) for each in maps)]
    columns = 2 if len(tiles) == 2 else math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    width, height = picture.width + _GAP, picture.height + _GAP
    sheet = Image.new("RGB", (columns * width - _GAP, rows * height - _GAP), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return sheet


def overlay(picture: Image.Image, attention: Tensor, drawing: Drawing) -> Image.Image:
    """One map [h, w] in colours over the frame.

    The top of the colours is the strongest patch, or 4 times the mean where that is more: a map
    that is almost even stays dark instead of having its noise blown up, from frame to frame anew.
    """
    top = max(float(attention.max()), 4 * float(attention.mean()), 1e-12)
    smooth = Image.fromarray((attention / top).numpy()).resize(
        picture.size, Image.Resampling.BICUBIC
    )
    colours = _colours(np.asarray(smooth).clip(0.0, 1.0), drawing.colormap)
    if drawing.mass is not None:
        kept = mass_mask(attention.flatten(), drawing.mass).reshape(attention.shape)
        mask = Image.fromarray(kept.numpy().astype(np.uint8))
        inside = np.asarray(mask.resize(picture.size, Image.Resampling.NEAREST)) > 0
        colours = np.where(inside[..., None], colours, np.uint8(0))
    return Image.blend(picture, Image.fromarray(colours), drawing.overlay)


def attention_frames(
    frames: Iterable[Frame],
    own: Session,
    drawing: Drawing,
    *,
    short_side: int = 480,
) -> Iterator[Image.Image]:
    """Each frame beside its maps, at the size that the network sees; a batch at a time in memory.

    Raises:
        ArtifactError: a network without attention.
        ConfigError: a head that the network does not have.
        DataError: a frame that cannot be read, or of another size than the first; it is named.
    """
    network = own.artifact.network().to(own.here.device)
    if not isinstance(network, VisionTransformer):
        raise ArtifactError(
            f"--model {own.model.name} is a {own.artifact.architecture.name}, which has no "
            "attention; a Vision Transformer has"
        )
    if isinstance(drawing.head, int) and drawing.head >= network.num_heads:
        raise ConfigError(
            f"--head {drawing.head}: model {own.model.name!r} has the heads 0 to "
            f"{network.num_heads - 1}"
        )
    dtype = autocast_dtype(own.precision, own.here.device)
    preprocess = own.artifact.preprocess
    for batch in _batches(_of_one_size(frames), own.batch_size):
        views = [
            preprocess.whole(each, short_side=short_side, multiple=network.patch_size)
            for each in batch
        ]
        with torch.inference_mode(), autocast(own.here.device, dtype):
            features = network(torch.stack(views).to(own.here.device), attention="cls")
        maps = features.attention[:, :, 1:].float().cpu().unflatten(2, features.grid)
        size = views[0].shape[2], views[0].shape[1]
        for picture, each in zip(batch, maps, strict=True):
            yield panels(picture.resize(size, Image.Resampling.BICUBIC), each, drawing)


def add_command(names: Any) -> None:
    """Adds `attention_video` to the command line of `python -m training.evaluation`."""
    parser: argparse.ArgumentParser = names.add_parser(
        "attention_video", help=__doc__, description=__doc__
    )
    add_common_options(parser, batch_size=4)
    parser.add_argument("--input", required=True, type=Path, help="a folder of frames, or a video")
    parser.add_argument("--out", required=True, type=Path, help="NAME.mp4, or a folder for frames")
    parser.add_argument("--fps", type=_rate, help=f"default: the input video's own, else {RATE}")
    parser.add_argument("--size", type=positive, default=480, help="short side in pixels")
    parser.add_argument("--head", type=_head, default="mean", help="mean, all, or a number from 0")
    parser.add_argument("--mass", type=float, help="colour only patches that hold this share")
    parser.add_argument("--colormap", default="inferno", choices=COLORMAPS)
    parser.add_argument("--overlay", type=float, default=0.6, help="0: the frame, 1: the map")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    drawing = Drawing(
        head=options.head,
        mass=options.mass,
        colormap=options.colormap,
        overlay=options.overlay,
    )
    with session(options) as own:
        if not own.here.is_main:
            return  # frames follow each other into one file: one process draws them
        if options.out.resolve() == options.input.resolve():
            raise ConfigError(f"--out {options.out} is the input; give another name")
        frames = open_frames(options.input)
        rate = options.fps or frames.rate or RATE
        drawn, size = 0, (0, 0)
        with frame_writer(options.out, rate) as write:
            made = attention_frames(frames, own, drawing, short_side=options.size)
            for picture in tqdm(made, total=frames.count, unit="frame", dynamic_ncols=True):
                write(picture)
                drawn, size = drawn + 1, picture.size
            if drawn == 0:
                raise DataError(f"{str(options.input)!r} holds no frame; expected a video")
        tell(
            options,
            own,
            name="attention_video",
            figures={
                "attention_video": {
                    "out": str(options.out),
                    "frames": drawn,
                    "width": size[0],
                    "height": size[1],
                    "fps": float(rate),
                }
            },
            protocol={"size": options.size, **asdict(drawing)},
            data={
                "paths": [str(options.input)],
                "pictures": drawn,
                **_describe(options.input),
            },
            table=f"{options.out}: {drawn} frames of {size[0]} x {size[1]} pixels",
        )


def _of_one_size(frames: Iterable[Frame]) -> Iterator[Image.Image]:
    first: Image.Image | None = None
    for name, picture in frames:
        first = first or picture
        if picture.size != first.size:
            raise DataError(
                f"{name!r} is {picture.width} x {picture.height} pixels; expected {first.width} x "
                f"{first.height}, the size of the first frame"
            )
        yield picture


def _batches(pictures: Iterator[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    while batch := list(islice(pictures, size)):
        yield batch


def _colours(values: npt.NDArray[np.float32], colormap: str) -> npt.NDArray[np.uint8]:
    """Values [h, w] from 0 to 1 -> colours [h, w, 3]."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError(
            "attention_video colours maps by matplotlib: pip install '.[training]'"
        ) from error
    colours: npt.NDArray[np.uint8] = mpl.colormaps[colormap](values, bytes=True)[..., :3]
    return colours


def _describe(path: Path) -> dict[str, str]:
    """A hash of a video's content, or of the names in a folder of frames."""
    if path.is_dir():
        names = "\n".join(sorted(each.name for each in path.iterdir()))
        return {"names_sha256": hashlib.sha256(names.encode()).hexdigest()}
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _head(text: str) -> Head:
    named: dict[str, Head] = {"mean": "mean", "all": "all"}
    if text in named:
        return named[text]
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither mean nor all nor a number from 0 up")


def _rate(text: str) -> Fraction:
    try:
        rate = Fraction(text).limit_denominator(10000)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= _MOST_PER_SECOND:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number above 0 and up to {_MOST_PER_SECOND}, such as 24 or 30000/1001"
        )
    return rate
