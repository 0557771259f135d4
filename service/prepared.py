"""A picture on its way to the model: decoded once, for all that is made of it."""

from dataclasses import dataclass

from PIL import Image

from backbone.pictures import Mode
from service import images, measurements
from service.encoded import ReadPicture
from service.encoder import Array, Encoder, Task


@dataclass(frozen=True)
class Wanted:
    """What a picture is decoded for.

    Attributes:
        tasks: that inputs are made for.
        sized_for: tasks for which it is decoded large enough, though they need no inputs: what
            else is made of it is the same then.
        background_side: long side in pixels, at most, of `Prepared.background`.
    """

    tasks: tuple[Task, ...]
    sized_for: tuple[Task, ...] = ()
    thumbnail: bool = False
    background_side: int | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A picture that was decoded: its inputs to the model, and what is kept of it.

    Attributes:
        inputs: for each task that was wanted, pixels as the model takes them, float32 [C, H, W].
        content_hash: SHA-256 of the encoded picture.
        thumbnail: a small JPEG, where it was wanted.
        background: the picture at the size wanted, RGB, for maps to be drawn over.
    """

    inputs: dict[Task, Array]
    content_hash: str
    thumbnail: bytes | None
    background: Image.Image | None


def prepare(
    read: ReadPicture, wanted: Wanted, *, encoder: Encoder, limits: images.Limits
) -> Prepared:
    """Decodes it, no larger than it is wanted, and notes its size for the current request.

    Raises:
        ImageError: a picture that cannot be taken.
    """
    side = wanted.background_side

    def needed(size: images.Size) -> list[images.Size]:
        measurements.current().add_picture(*size, len(read.content))
        sizes = [encoder.needed(task, size) for task in (*wanted.tasks, *wanted.sized_for)]
        if wanted.thumbnail:
            sizes.append(images.scaled_down_size(size, images.THUMBNAIL_SIDE))
        if side is not None:
            sizes.append(images.scaled_down_size(size, side))
        return sizes

    # In colour for a model of grey too: thumbnails and maps show the picture as it is.
    mode: Mode = "RGBA" if encoder.info.picture_mode == "RGBA" else "RGB"
    decoded = images.decode_reduced(
        read.content, limits, param=read.param, mode=mode, needed=needed
    )
    picture, extent = decoded.picture, decoded.extent
    return Prepared(
        inputs={t: encoder.prepare(t, picture, extent=extent) for t in wanted.tasks},
        content_hash=read.content_hash,
        thumbnail=images.thumbnail(picture) if wanted.thumbnail else None,
        background=None if side is None else images.scaled_down(picture, side),
    )
