import hashlib
import io
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service import images
from service.encoded import EncodedPicture
from service.errors import ImageError
from service.images import FORMATS, Limits, decode, from_text, thumbnail
from tests.service.pictures import RED, as_base64, encoded, noise, opened, plain, png

LIMITS = Limits(max_bytes=100_000, max_pixels=10_000)


def grey(values: np.ndarray, kind: str = "TIFF") -> np.ndarray:
    picture = decode(encoded(Image.fromarray(values), kind), LIMITS, param="x")
    channels = np.asarray(picture)
    assert (channels == channels[..., :1]).all()
    return channels[..., 0]


@pytest.mark.parametrize("top", [100, 255, 256, 40_000, 65_535])
def test_16_bits_are_scaled_alike_however_dark_the_picture(top: int) -> None:
    values = np.array([[0, top // 2, top]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        assert grey(values, kind).tolist() == (values / 65535 * 255).astype(int).tolist()


@pytest.mark.parametrize("top", [1.0, 0.5])
def test_floats_up_to_one_are_shares_of_white(top: float) -> None:
    assert grey(np.array([[0.0, top]], dtype=np.float32)).tolist() == [[0, int(top * 255)]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([-5.0, np.nan, 255.0], [0, 0, 255]),
        ([0.0, 65535.0], [0, 255]),
        ([0.0, 5e5, 1e6], [0, 127, 255]),
    ],
)
def test_other_floats(values: list[float], expected: list[int]) -> None:
    assert grey(np.array([values], dtype=np.float32)).tolist() == [expected]


@pytest.mark.parametrize(("top", "white"), [(255, 255), (65_535, 255), (1_000_000, 255)])
def test_32_bits(top: int, white: int) -> None:
    assert grey(np.array([[0, top]], dtype=np.int32)).tolist() == [[0, white]]


def test_limits_are_inclusive() -> None:
    content = png(1, (100, 100))
    for limits in (LIMITS, Limits(max_bytes=len(content), max_pixels=10_000)):
        assert decode(content, limits, param="x").size == (100, 100)
    for limits in (
        Limits(max_bytes=len(content) - 1, max_pixels=10_000),
        Limits(max_bytes=len(content), max_pixels=9_999),
    ):
        with pytest.raises(ImageError) as caught:
            decode(content, limits, param="x")
        assert (caught.value.status, caught.value.code) == (413, "image_too_large")


def test_text_is_refused_before_it_is_decoded_when_it_is_too_long() -> None:
    small = Limits(max_bytes=300, max_pixels=1)
    assert len(from_text(as_base64(bytes(300)), small, param="x")) == 300
    with pytest.raises(ImageError) as caught:
        from_text("!" * 500, small, param="x")
    assert caught.value.code == "image_too_large"


@pytest.mark.parametrize("kind", FORMATS)
def test_damage_is_always_an_error_of_the_picture(kind: str) -> None:
    random = np.random.default_rng(0)
    content = np.frombuffer(encoded(noise(1), kind), dtype=np.uint8)
    outcomes = set()
    for _ in range(150):
        damaged = content.copy()
        # Headers are short and full of meaning, so most of the damage is done there.
        places = random.integers(0, min(len(damaged), random.choice([40, 400, 10**6])), 3)
        damaged[places] = random.choice([0, 1, 127, 255, int(random.integers(256))])
        cut = damaged[: random.integers(1, len(damaged))] if random.random() < 0.3 else damaged
        try:
            assert decode(cut.tobytes(), LIMITS, param="x").mode == "RGB"
            outcomes.add(200)
        except ImageError as error:
            outcomes.add(error.status)
    assert 400 in outcomes


def test_avif_without_a_picture_in_it() -> None:
    content = encoded(noise(1), "AVIF")
    with pytest.raises(ImageError) as caught:
        decode(content.replace(b"av01", b"xv01"), LIMITS, param="x")
    assert caught.value.status in (400, 415)


def test_decoding_side_by_side_leaves_the_processs_warnings_alone() -> None:
    before = list(warnings.filters)
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        start.wait(20)
        for _ in range(50):
            decode(png(seed), LIMITS, param="x")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert list(warnings.filters) == before


def test_thumbnails_leave_the_picture_as_it_is() -> None:
    picture = plain(RED, (400, 100))
    small = opened(thumbnail(picture, side=40))
    assert small.size == (40, 10)
    assert picture.size == (400, 100)
    assert np.abs(np.asarray(small, dtype=int) - RED).max() < 8


def test_a_picture_outlives_its_file() -> None:
    picture = decode(png(1), LIMITS, param="x")
    assert picture.copy().tobytes() == Image.open(io.BytesIO(png(1))).tobytes()


_READ_A_DAMAGED_TIFF = """
import io, sys
from PIL import Image
from service.images import quiet_decoders

if sys.argv[1] == "quietly":
    quiet_decoders()
whole = io.BytesIO()
Image.effect_noise((64, 64), 90).save(whole, "TIFF", compression="tiff_lzw")
content = bytearray(whole.getvalue())
content[40:400] = bytes(360)
try:
    Image.open(io.BytesIO(bytes(content))).load()
except OSError:
    print("refused")
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="libraries are found on Linux")
@pytest.mark.parametrize("how", ["quietly", "as it comes"])
def test_libtiff_says_nothing_between_the_lines_of_the_log(how: str) -> None:
    command = [sys.executable, "-c", _READ_A_DAMAGED_TIFF, how]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout == "refused\n"
    assert (ended.stderr == "") == (how == "quietly")


def test_libraries_are_found_by_their_names_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "libtiff of mine"
    folder.mkdir()
    library = folder / "libtiff-1.so.6"
    library.touch()
    maps = tmp_path / "maps"
    lines = [str(library), str(folder / "other.so"), f"{folder / 'libtiff.so'} (deleted)", "[heap]"]
    maps.write_text("".join(f"7f-80 r-xp 00000000 08:01 42    {line}\n" for line in [*lines, ""]))
    opened: list[str] = []
    monkeypatch.setattr(
        images, "Path", lambda path: maps if path == "/proc/self/maps" else Path(path)
    )
    monkeypatch.setattr(images.ctypes, "CDLL", opened.append)
    images._loaded("libtiff")
    assert opened == [str(library)]


@pytest.mark.parametrize("size", [0, 1, 2046, 2047, 2048, 4094, 2**17, 2**17 + 1])
def test_the_hash_is_that_of_all_bytes(size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    read = EncodedPicture(content=content, param="a").read(Limits(max_bytes=2**18, max_pixels=1))
    assert read.content_hash == hashlib.sha256(content).hexdigest()
