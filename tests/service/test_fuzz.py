"""A short form of the fuzz run against a real process, and that the damage it does is real."""

from pathlib import Path

import numpy as np

from service.images import FORMATS, Limits, decode
from tests.service import fuzz
from tests.service.mutations import MUTATIONS, with_right_checksums
from tests.service.picture_layout import segments, sizes
from tests.service.pictures import encoded, noise, png
from tests.service.seed_pictures import seeds


def test_damaged_pictures_of_every_format(tmp_path: Path) -> None:
    # So few pictures are a part of the warm-up, in which threads and decoders take what they keep.
    bound_mib = 4 * fuzz.BOUND_MIB
    report = fuzz.run(
        pictures=200, seed=7, connections=4, whole=1, keep=tmp_path, bound_mib=bound_mib
    )
    assert report.failures == []
    assert sum(report.counts.values()) == 200
    for told in ("200", "400 invalid_image", "415 unsupported_image"):
        assert report.counts[told] > 5, report.counts


def test_a_run_can_be_repeated() -> None:
    named = seeds(1)
    made = [fuzz.make(named, 3, number) for number in range(20)]
    assert made == [fuzz.make(named, 3, number) for number in range(20)]
    assert made != [fuzz.make(named, 4, number) for number in range(20)]


def test_seeds_are_of_every_format_and_sound(tmp_path: Path) -> None:
    limits = Limits(max_bytes=2**25, max_pixels=10**8)
    unsound = {"PNG of 144 million pixels", "PNG that promises pixels", "zlib", "nothing"}
    unsound.add("PNG with a text that grows")
    kinds = set()
    for name, content in seeds(1, tmp_path):
        if name not in unsound:
            decode(content, limits, param=name)
            kinds.add(name.split()[0])
    assert kinds >= set(FORMATS)


def test_every_mutation_changes_pictures_of_every_format() -> None:
    others = [encoded(noise(2), kind) for kind in FORMATS]
    for mutation in MUTATIONS:
        for kind in FORMATS:
            content = encoded(noise(1), kind)
            random = np.random.default_rng(0)
            made = {mutation(random, content, others) for _ in range(20)}
            assert len(made - {content}) > 3, (mutation.__name__, kind)


def test_layouts_find_their_way() -> None:
    picture = noise(1, (300, 200))
    for kind in FORMATS:
        content = encoded(picture, kind)
        if kind not in ("BMP", "PPM"):
            assert segments(content), kind
        if kind not in ("PPM", "WEBP"):
            assert {n.read(content) for n in sizes(content)} >= {300, 200}, kind
    assert len(sizes(encoded(picture, "WEBP"))) == 2
    assert {s.kind for s in segments(png(1))} == {b"IHDR", b"IDAT", b"IEND"}


def test_checksums_are_mended() -> None:
    content = bytearray(png(1))
    content[16 + 3] ^= 1  # the width
    mended = with_right_checksums(bytes(content))
    assert mended != content
    assert with_right_checksums(mended) == mended
    assert with_right_checksums(png(1)) == png(1)
