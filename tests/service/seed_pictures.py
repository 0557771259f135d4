"""Whole pictures of every allowed format and many of their kinds, for a fuzzer to damage."""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from tests.service.pictures import encoded, noise, png_header

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"

Kind = tuple[str, str, str, dict[str, Any]]  # what it is called, Pillow's mode, format, options

_KINDS: tuple[Kind, ...] = (
    ("JPEG", "RGB", "JPEG", {"quality": 85}),
    ("JPEG progressive", "RGB", "JPEG", {"progressive": True, "quality": 70}),
    ("JPEG restarts", "RGB", "JPEG", {"restart_marker_rows": 2}),
    ("JPEG grey", "L", "JPEG", {}),
    ("JPEG CMYK", "CMYK", "JPEG", {}),
    ("PNG", "RGB", "PNG", {}),
    ("PNG alpha", "RGBA", "PNG", {}),
    ("PNG palette", "P", "PNG", {"transparency": 3}),
    ("PNG 1 bit", "1", "PNG", {}),
    ("PNG 16 bits", "I;16", "PNG", {}),
    ("PNG grey and alpha", "LA", "PNG", {}),
    ("GIF", "P", "GIF", {}),
    ("GIF interlaced", "L", "GIF", {"interlace": 1, "transparency": 7}),
    ("WEBP", "RGB", "WEBP", {"quality": 60}),
    ("WEBP alpha", "RGBA", "WEBP", {"quality": 60}),
    ("WEBP lossless", "RGB", "WEBP", {"lossless": True, "method": 0}),
    ("AVIF", "RGB", "AVIF", {"speed": 10}),
    ("AVIF alpha", "RGBA", "AVIF", {"speed": 10, "quality": 40}),
    ("BMP", "RGB", "BMP", {}),
    ("BMP palette", "P", "BMP", {}),
    ("BMP 1 bit", "1", "BMP", {}),
    ("BMP alpha", "RGBA", "BMP", {}),
    ("PPM", "RGB", "PPM", {}),
    ("PGM", "L", "PPM", {}),
    ("PGM 16 bits", "I", "PPM", {}),
    ("PBM", "1", "PPM", {}),
    ("PFM", "F", "PPM", {}),
    ("TIFF", "RGB", "TIFF", {}),
    ("TIFF LZW", "RGB", "TIFF", {"compression": "tiff_lzw"}),
    ("TIFF deflate, alpha", "RGBA", "TIFF", {"compression": "tiff_adobe_deflate"}),
    ("TIFF JPEG", "RGB", "TIFF", {"compression": "jpeg"}),
    ("TIFF packbits", "L", "TIFF", {"compression": "packbits"}),
    ("TIFF fax", "1", "TIFF", {"compression": "group4"}),
    ("TIFF 16 bits", "I;16", "TIFF", {}),
    ("TIFF 32 bits", "I", "TIFF", {}),
    ("TIFF float", "F", "TIFF", {"compression": "tiff_lzw"}),
    ("TIFF CMYK", "CMYK", "TIFF", {"compression": "tiff_lzw"}),
    ("TIFF Lab", "LAB", "TIFF", {}),
)
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
_WITH_METADATA = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF")


def seeds(count: int, folder: Path = PHOTOS) -> list[tuple[str, bytes]]:
    """Names and contents: every kind of every format, `count` times, and what is odd.

    Made of the folder's photographs where it is there, else of noise.
    """
    photos = sorted(folder.glob("*.jpg"))
    whole = [photos[i * len(photos) // count] for i in range(count)] if photos else []
    made: list[tuple[str, bytes]] = [("JPEG as it was", path.read_bytes()) for path in whole]
    for i in range(count):
        made += _of_one(_open(whole[i]) if whole else noise(i, (160, 120)))
    return [*made, *_odd()]


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        small = picture.convert("RGB")
    small.thumbnail((144, 144))  # more seeds a second, and more damage to what is not pixels
    return small


def _of_one(picture: Image.Image) -> Iterator[tuple[str, bytes]]:
    for name, mode, kind, options in _KINDS:
        yield name, encoded(_to_mode(picture, mode), kind, **options)
    frames = [picture.rotate(angle) for angle in (90, 180)]
    for kind in _ANIMATED:
        content = encoded(picture, kind, save_all=True, append_images=frames)
        yield f"{kind} of three frames", content
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    exif[0x010E] = "a photograph"
    exif.get_ifd(0x8769)[0x9003] = "2024:01:01 00:00:00"
    for kind in _WITH_METADATA:
        content = encoded(picture, kind, exif=exif, icc_profile=profile)
        yield f"{kind} with EXIF and ICC", content


def _to_mode(picture: Image.Image, mode: str) -> Image.Image:
    if mode == "LAB":
        spaces = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
        converted = ImageCms.profileToProfile(picture, *spaces, outputMode="LAB")
        assert converted is not None
        return converted
    if mode in ("I;16", "I"):
        values = np.asarray(picture.convert("L"), dtype=np.uint16) * np.uint16(257)
        return Image.fromarray(values if mode == "I;16" else values.astype(np.int32))
    return picture.convert(mode)


def _odd() -> Sequence[tuple[str, bytes]]:
    grey = Image.new("L", (4000, 4000))
    text = PngImagePlugin.PngInfo()
    text.add_text("bomb", "x" * 5_000_000, zip=True)
    pixel, line = Image.new("RGB", (1, 1), (9, 9, 9)), Image.new("RGB", (30_000, 1), (9, 9, 9))
    return [
        *((f"{kind} of one pixel", encoded(pixel, kind)) for kind in _FORMATS),
        *((f"{kind} of 30,000 x 1", encoded(line, kind)) for kind in _LONG),
        ("PNG of 1 x 30,000", encoded(line.rotate(90, expand=True))),
        ("PNG of 16 million pixels", encoded(grey.convert("1"))),
        ("PNG of 144 million pixels", encoded(Image.new("1", (12_000, 12_000)))),
        ("PNG with a text that grows", encoded(pixel, pnginfo=text)),
        ("PNG that promises pixels", png_header(9_000, 9_000)),
        ("PPM as text", b"P3 2 2 255 " + b"1 2 3 " * 4),
        ("PPM with notes", b"P6\n# " + b"n" * 500 + b"\n2 2\n255\n" + bytes(12)),
        ("zlib", zlib.compress(bytes(1_000_000))),
        ("nothing", b""),
    ]


_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_LONG = tuple(kind for kind in _FORMATS if kind != "WEBP")  # whose sides are 16,383 at most
