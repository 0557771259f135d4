import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.conftest import ROOT, picture
from tests.training.test_device_operations import noise
from training import device_augmentations
from training.augmentations import Picture, draw_views, picture_size, render_views
from training.config import Crops
from training.decoding import decode, to_array
from training.device_augmentations import (
    Drawn,
    DrawnBatch,
    adjust_all,
    augment,
    collate_drawn,
    draw_encoded,
    view_table,
)

CROPS = Crops(global_size=32, local_count=4, local_size=14)
PHOTOS = ROOT.parent / "shared" / "data" / "photos"


def batch_of(pictures: list[Picture], crops: Crops, seed: int = 0) -> DrawnBatch:
    samples = []
    for i, source in enumerate(pictures):
        views = draw_views(*picture_size(source), crops, random.Random(f"{seed}/{i}"))
        samples.append(Drawn(torch.from_numpy(to_array(source)), view_table(views)))
    return collate_drawn(samples)


def compare(pictures: list[Picture], crops: Crops, seed: int = 0) -> None:
    """The crops of a whole batch against Pillow's of each picture.

    Tolerance, in levels: 0.5 in the mean of any crop, 0.05 over all of them; and 99.9% of the
    values within 2. Above that is what later operations make of a single level: a step of hue, or
    a value at the threshold of solarising.
    """
    found = augment(*batch_of(pictures, crops, seed), crops)
    expected = [
        render_views(
            source,
            draw_views(*picture_size(source), crops, random.Random(f"{seed}/{i}")),
            crops,
        )
        for i, source in enumerate(pictures)
    ]
    for ours, theirs in zip(found, zip(*expected, strict=True), strict=True):
        reference = np.stack(theirs, axis=1)
        assert ours.dtype == torch.uint8
        assert ours.is_contiguous()
        assert ours.shape == reference.shape
        difference = np.abs(ours.numpy().astype(np.int16) - reference)
        assert difference.mean(axis=(2, 3, 4)).max() < 0.5
        assert difference.mean() < 0.05
        assert (difference > 2).mean() < 0.001


def test_the_whole_plan_on_pictures_of_all_sizes() -> None:
    sizes = [(50, 40), (1, 30), (29, 1), (64, 64), (7, 9), (201, 133), (1, 1), (90, 300)]
    compare([noise(i, *size) for i, size in enumerate(sizes)] * 6, CROPS)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_the_whole_plan_on_other_channels(channels: int) -> None:
    bands = [
        [noise(9 * i + c, 40 + i, 37).convert("L") for c in range(channels)] for i in range(16)
    ]
    compare([b[0] if channels == 1 else b for b in bands], CROPS)


def test_the_whole_plan_on_real_photographs() -> None:
    if not PHOTOS.exists():
        pytest.skip(f"{PHOTOS.name} is not in {PHOTOS.parent}")
    paths = sorted(PHOTOS.glob("*.jpg"))[::25]
    crops = Crops(global_size=112, local_count=4, local_size=48)
    compare([decode(path.read_bytes(), path.name) for path in paths], crops)


def test_large_batches_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of([picture(i, (40 + i, 50 - i)) for i in range(7)], CROPS)
    whole = augment(*batch, CROPS)
    monkeypatch.setattr(device_augmentations, "_MAX_ELEMENTS", 100_000)
    for part, expected in zip(augment(*batch, CROPS), whole, strict=True):
        assert torch.equal(part, expected)


def test_no_local_crops() -> None:
    crops = Crops(global_size=32, local_count=0, local_size=14)
    global_crops, local_crops = augment(*batch_of([picture(0)] * 3, crops), crops)
    assert global_crops.shape == (2, 3, 3, 32, 32)
    assert local_crops.shape == (0, 3, 3, 14, 14)


def test_autocast_around_it_changes_nothing() -> None:
    batch = batch_of([picture(i) for i in range(3)], CROPS)
    expected = augment(*batch, CROPS)
    with torch.autocast("cpu", torch.bfloat16):
        found = augment(*batch, CROPS)
    assert all(map(torch.equal, found, expected))


def test_what_a_worker_makes(tmp_path: Path) -> None:
    """Encoded bytes -> drawn -> crops: as Pillow's of the decoded picture."""
    source = picture(4, (60, 45))
    source.save(tmp_path / "a.png")
    drawn = draw_encoded((tmp_path / "a.png").read_bytes(), "a", CROPS, random.Random(5))
    assert np.array_equal(drawn.pixels.numpy(), to_array(source))
    views = draw_views(60, 45, CROPS, random.Random(5))
    assert torch.equal(drawn.views, view_table(views))


def test_large_pictures_of_any_format_come_small(tmp_path: Path) -> None:
    source = picture(4, (800, 600))
    source.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    drawn = draw_encoded(content, "a", CROPS, random.Random(0))
    assert drawn.pixels.shape in {(3, 300, 400), (3, 150, 200), (3, 75, 100)}
    views = draw_views(800, 600, CROPS, random.Random(0))
    found = augment(*collate_drawn([drawn]), CROPS)
    for ours, theirs in zip(found, render_views(source, views, CROPS), strict=True):
        difference = np.abs(ours[:, 0].numpy().astype(np.int16) - theirs)
        assert difference.mean() < 1.5


def test_what_does_not_belong_together_is_refused() -> None:
    canvas, sizes, views = batch_of([picture(i) for i in range(3)], CROPS)
    for wrong in (
        (canvas.float(), sizes, views),
        (canvas, sizes[:2], views),
        (canvas, sizes, views[:, :4]),
        (canvas[..., :-1], sizes, views),
    ):
        with pytest.raises(ValueError, match="canvas"):
            augment(*wrong, CROPS)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_on_all_crops_gives_the_same(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled on a GPU, here as it stands: equal to the last bit."""
    mode = {1: "L", 3: "RGB"}[channels]
    batch = batch_of([picture(i, (50 + i, 40)).convert(mode) for i in range(24)], CROPS)
    monkeypatch.setattr(device_augmentations, "_adjust_all_compiled", lambda: adjust_all)
    expected, found = augment(*batch, CROPS), augment(*batch, CROPS, compiled=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.uint8
        assert torch.equal(ours, theirs)


def test_pictures_of_any_size_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large canvases are resized in parts; what is compiled sees the crops of a whole batch."""
    shapes: set[torch.Size] = set()

    def seen(crops: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        shapes.add(crops.shape)
        return adjust_all(crops, rows)

    monkeypatch.setattr(device_augmentations, "_adjust_all_compiled", lambda: seen)
    monkeypatch.setattr(device_augmentations, "_MAX_ELEMENTS", 2**17)
    for side in (20, 50, 130):
        batch = batch_of([picture(i, (side + i, side)) for i in range(7)], CROPS)
        expected, found = augment(*batch, CROPS), augment(*batch, CROPS, compiled=True)
        assert all(map(torch.equal, found, expected))
    assert shapes == {torch.Size([14, 3, 32, 32]), torch.Size([28, 3, 14, 14])}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_gives_what_the_cpu_gives_and_is_never_waited_for(compiled: bool) -> None:
    batch = batch_of([noise(i, 60 + i, 50) for i in range(16)], CROPS)
    expected = augment(*batch, CROPS)
    canvas = batch.canvas.cuda()
    augment(canvas, batch.sizes, batch.views, CROPS, compiled=compiled)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = augment(canvas, batch.sizes, batch.views, CROPS, compiled=compiled)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(found, expected, strict=True):
        difference = (ours.cpu().short() - theirs.short()).abs().float()
        assert difference.mean() < 0.05
        assert (difference > 2).float().mean() < 0.001


def test_a_flip_of_the_picture_is_a_flip_of_the_box() -> None:
    """The picture is the same from right to left: so is every crop, whatever is done to it."""
    source = Image.fromarray(
        np.concatenate([to_array(picture(1)), to_array(picture(1))[..., ::-1]], 2).transpose(
            1, 2, 0
        )
    )
    views = draw_views(*source.size, CROPS, random.Random(1))
    whole = torch.from_numpy(to_array(source))
    table = view_table(views)
    table[:, 0:4] = torch.tensor([0.0, 0.0, *map(float, source.size)])
    flipped = table.clone()
    flipped[:, 4] = 1 - flipped[:, 4]
    found = augment(*collate_drawn([Drawn(whole, table), Drawn(whole, flipped)]), CROPS)
    for crops in found:
        assert (crops[:, 0].short() - crops[:, 1].short()).abs().max() <= 2
