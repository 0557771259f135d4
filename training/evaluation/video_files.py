"""Frames of a video, one at a time: out of a folder or a video file, and into one.

Video files need PyAV, the extra `evaluation`; folders of frames need nothing more.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from PIL import Image

from training.config import ConfigError
from training.decoding import decode
from training.evaluation.outputs import check_file, check_folder
from training.picture_files import is_picture
from training.sources import DataError

if TYPE_CHECKING:
    from av.container import InputContainer

WriteFrame = Callable[[Image.Image], None]

MP4 = ".mp4"
_OTHER_VIDEOS = frozenset({".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mpg", ".ogv", ".webm"})
_QUALITY = {"crf": "18"}  # x264's rate factor; 18 is hard to tell from the original


class Frame(NamedTuple):
    """A picture, RGB and upright, and how a message names it."""

    name: str
    picture: Image.Image


class Frames(Protocol):
    """A video that can be read from its start, as often as wanted.

    Attributes:
        rate: frames a second, where it is known.
        count: of frames, where it is known.
    """

    rate: Fraction | None
    count: int | None

    def __iter__(self) -> Iterator[Frame]:
        """Each frame in its order. Raises DataError for one that cannot be read, by its name."""


def open_frames(path: Path) -> Frames:
    """A folder of frames, or a video file.

    Raises:
        ConfigError: a video file, and PyAV is not installed.
        DataError: nothing there, a folder without pictures, or a file that is no video.
    """
    if path.is_dir():
        return _FrameFolder(path)
    if not path.is_file():
        raise DataError(f"{str(path)!r} does not exist; expected a folder of frames or a video")
    return _VideoFile(path)


@contextmanager
def frame_writer(out: Path, rate: Fraction) -> Iterator[WriteFrame]:
    """Gives what writes the next frame; all frames must be of one size.

    `out` is a file NAME.mp4 (H.264, yuv420p; there when it is whole) or else a folder, into which
    frames go as 00000.png and so on.

    Args:
        rate: frames a second, of a file.

    Raises:
        ConfigError: another kind of video, a folder that holds pictures already, a file where PyAV
            is not installed or cannot encode H.264, or what cannot be written.
    """
    if out.suffix.lower() in _OTHER_VIDEOS:
        raise ConfigError(f"--out {out}: videos are written as {MP4}, or give a folder for frames")
    if out.suffix.lower() == MP4:
        with _video_writer(out, rate) as write:
            yield write
        return
    if out.is_file():
        raise ConfigError(f"--out {out} is a file; expected NAME{MP4}, or a folder for frames")
    if out.is_dir() and any(is_picture(path.name) for path in out.iterdir()):
        raise ConfigError(f"--out {out} holds pictures already; frames must not mix with them")
    check_folder("--out", out)
    yield _write_in_turn(out)


class _FrameFolder:
    rate: Fraction | None = None

    def __init__(self, folder: Path) -> None:
        paths = (path for path in folder.iterdir() if is_picture(path.name) and path.is_file())
        self._paths = sorted(paths, key=lambda path: _by_numbers(path.name))
        self.count: int | None = len(self._paths)
        if not self._paths:
            raise DataError(f"{str(folder)!r} holds no picture; expected the frames of a video")

    def __iter__(self) -> Iterator[Frame]:
        for path in self._paths:
            yield Frame(str(path), decode(path.read_bytes(), str(path)))


class _VideoFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        with _opened(path) as container:
            stream = container.streams.video[0]
            self.rate: Fraction | None = stream.average_rate or None
            self.count: int | None = stream.frames or None

    def __iter__(self) -> Iterator[Frame]:
        with _opened(self._path) as container:
            frame: Any
            for number, frame in enumerate(container.decode(video=0)):
                picture: Image.Image = frame.to_image()
                if frame.rotation:  # a telephone's, that was held upright
                    picture = picture.rotate(frame.rotation, expand=True)
                yield Frame(f"frame {number} of {self._path}", picture)


@contextmanager
def _opened(path: Path) -> "Iterator[InputContainer]":
    """A video file with a stream of pictures; whatever PyAV raises inside names the file."""
    av = _av(f"{str(path)!r} is a video file")
    try:
        # Opened here, so that a file's name is never taken for an address.
        with path.open("rb") as file, av.open(file, mode="r") as container:
            if not container.streams.video:
                raise DataError(f"{str(path)!r} has no stream of pictures; expected a video")
            yield container
    except (av.FFmpegError, OSError) as error:  # OSError: a seek beyond the ends of a stump
        raise DataError(
            f"{str(path)!r} cannot be read as a video: {error.strerror}; expected a folder of "
            "frames or a video"
        ) from error


@contextmanager
def _video_writer(out: Path, rate: Fraction) -> Iterator[WriteFrame]:
    av = _av(f"--out {out} is a video file")
    if "libx264" not in av.codecs_available:
        raise ConfigError(f"--out {out}: this PyAV cannot encode H.264; give a folder for frames")
    check_file("--out", out)
    partial = out.with_name(f"{out.name}.partial")
    try:
        with av.open(str(partial), mode="w", format="mp4") as container:
            stream: Any = container.add_stream("libx264", rate=rate, options=_QUALITY)
            stream.pix_fmt = "yuv420p"
            written = 0

            def write(picture: Image.Image) -> None:
                nonlocal written
                picture = _even(picture)
                if written == 0:
                    stream.width, stream.height = picture.size
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
                written += 1

            yield write
            if written:
                container.mux(stream.encode(None))
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _write_in_turn(folder: Path) -> WriteFrame:
    numbers = iter(range(10**9))

    def write(picture: Image.Image) -> None:
        picture.save(folder / f"{next(numbers):05d}.png", compress_level=3)

    return write


def _even(picture: Image.Image) -> Image.Image:
    """With a black line more where a side is odd: colours are stored for 2 x 2 pixels each."""
    width, height = (side + side % 2 for side in picture.size)
    return picture if picture.size == (width, height) else picture.crop((0, 0, width, height))


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Orders names as people number them: frame9 before frame10."""
    parts = re.findall(r"\d+|\D+", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _av(reason: str) -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            f"{reason}, which needs PyAV: pip install '.[evaluation]', or use folders of frames"
        ) from error
    return av
