import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from backbone.architectures import Architecture
from backbone.artifact import Artifact, write_artifact
from backbone.descriptors import mass_mask
from backbone.preprocess import Preprocess
from tests.training.conftest import ROOT, picture
from training.evaluation.__main__ import main
from training.evaluation.jaccard import _alike, _Sample, cells, jaccard, score, summarise
from training.evaluation.masks import ObjectMask, open_pairs, read_mask, read_voc
from training.sources import DataError

ECSSD = ROOT.parent / "shared" / "data" / "ecssd"
SIZES = [(40, 30), (40, 30), (30, 40), (31, 31), (40, 30)]


def write_model(path: Path, name: str = "vit_tiny", seed: int = 0) -> Artifact:
    architecture = Architecture(name=name, patch_size=8, image_size=32)
    torch.manual_seed(seed)
    artifact = Artifact(
        architecture=architecture,
        preprocess=Preprocess.in_proportion(32, patch_size=architecture.patch_size),
        weights=architecture.build().state_dict(),
    )
    write_artifact(artifact, path)
    return artifact


def box(width: int, height: int, value: int = 255) -> Image.Image:
    """A mask whose object is a box in the upper left."""
    values = np.zeros((height, width), dtype=np.uint8)
    values[3 : height // 2, 2 : width // 3] = value
    return Image.fromarray(values)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def write_pairs(folder: Path) -> None:
    """Five pictures of three sizes; the last one's mask is empty."""
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for i, size in enumerate(SIZES):
        picture(i, size).save(folder / "images" / f"{i}.jpg")
        box(*size, value=0 if i == len(SIZES) - 1 else 255).save(folder / "masks" / f"{i}.png")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pairs(tmp_path)
    return tmp_path


def command_line(model: Path, data: Path, *more: str) -> list[str]:
    folders = ["--images", str(data / "images"), "--masks", str(data / "masks")]
    shared = ["--model", str(model), "--device", "cpu", "--workers", "0"]
    return ["attention_jaccard", *shared, *folders, *more]


def test_values_known_by_hand() -> None:
    inside, counted = torch.tensor([4, 2, 0, 0]), torch.tensor([4, 4, 4, 2])
    for kept, expected in (
        ([1, 1, 0, 0], 6 / 8),
        ([1, 0, 0, 0], 4 / 6),
        ([0, 0, 1, 1], 0.0),
        ([1, 1, 1, 1], 6 / 14),
        ([0, 0, 0, 0], 0.0),
    ):
        assert jaccard(torch.tensor(kept).bool(), inside, counted).item() == pytest.approx(expected)
    assert math.isnan(jaccard(torch.ones(4).bool(), torch.zeros(4), counted).item())


@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (7, 2)])
def test_cells_are_the_map_upsampled(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    inside, counted = torch.rand(23, 17) < 0.3, torch.rand(23, 17) < 0.8
    inside &= counted
    kept = torch.rand(grid) < 0.5
    upsampled = F.interpolate(kept[None, None].float(), size=(23, 17), mode="nearest-exact")
    whole = upsampled[0, 0].bool() & counted
    expected = (whole & inside).sum() / (whole | inside).sum()
    found = jaccard(kept.flatten(), *cells(ObjectMask(inside.numpy(), counted.numpy()), grid))
    assert found.item() == pytest.approx(expected.item())


def test_best_head_is_each_pictures_own() -> None:
    scores = torch.tensor([[0.2, 0.6, 0.3], [0.8, 0.4, 0.5], [math.nan] * 3]).double()
    assert summarise(scores) == {
        "jaccard_best_head": pytest.approx(0.7),
        "jaccard_mean": pytest.approx(0.5),
        "jaccard_of_mean_map": pytest.approx(0.4),
        "jaccard_per_head": pytest.approx([0.5, 0.5]),
    }


def brute_force(artifact: Artifact, data: Path, size: int, mass: float) -> dict[str, Any]:
    """One picture at a time, with whole masks at the size of the ground truth."""
    network, rows = artifact.network(), []
    for i in range(len(SIZES) - 1):
        with Image.open(data / "images" / f"{i}.jpg") as opened:
            view = artifact.preprocess.whole(opened, short_side=size, multiple=8)
        truth = torch.from_numpy(np.asarray(Image.open(data / "masks" / f"{i}.png")).copy()) > 127
        with torch.no_grad():
            heads = network(view[None], attention="cls").attention[0, :, 1:]
        maps = torch.cat((heads, heads.mean(dim=0, keepdim=True)))
        grid = [side // 8 for side in view.shape[-2:]]
        kept = mass_mask(maps, mass).reshape(1, -1, *grid).float()
        whole = F.interpolate(kept, size=truth.shape, mode="nearest-exact")[0].bool()
        rows.append((whole & truth).sum(dim=(1, 2)) / (whole | truth).sum(dim=(1, 2)))
    each = torch.stack(rows)
    return {
        "jaccard_best_head": each[:, :-1].amax(dim=1).mean().item(),
        "jaccard_mean": each[:, :-1].mean().item(),
        "jaccard_of_mean_map": each[:, -1].mean().item(),
        "jaccard_per_head": each[:, :-1].mean(dim=0).tolist(),
    }


def test_a_whole_run_beside_others(
    data: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = data / "other.safetensors"
    artifacts = {"other": write_model(other, seed=5), "tiny": write_model(model)}
    more = ["--beside", "untrained", str(other), "--mass", "0.6", "0.8", "--size", "40"]
    more += ["--seed", "5", "--json", "--save", str(data / "out" / "figures.json")]
    assert main(command_line(model, data, *more)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((data / "out" / "figures.json").read_text())
    for mass in (0.6, 0.8):
        for name, figures in (("tiny", found), ("other", found["beside"][str(other)])):
            expected = brute_force(artifacts[name], data, 40, mass)
            for key, value in expected.items():
                assert figures["masses"][str(mass)][key] == pytest.approx(value, abs=1e-6)
                assert mass == 0.8 or figures[key] == figures["masses"]["0.6"][key]
    # Untrained: the architecture of --model, with weights that the seed decides on.
    assert found["beside"]["untrained"]["masses"] == found["beside"][str(other)]["masses"]
    assert found["fingerprint"] == artifacts["tiny"].fingerprint
    assert found["beside"][str(other)]["fingerprint"] == artifacts["other"].fingerprint
    assert (found["data"]["pictures"], found["data"]["empty_masks"]) == (5, 1)
    assert found["protocol"]["size"] == 40
    assert "above 127" in found["protocol"]["mask"]


def test_the_table_and_the_examples(
    data: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = data / "out" / "sheet.png"
    assert main(command_line(model, data, "--save-examples", str(sheet), "--batch-size", "2")) == 0
    out = capsys.readouterr().out
    assert "of 4 pictures, in percent (1 left out: their masks hold no object)" in out
    assert "0.6    69" in out  # 32 * 480 / 224
    with Image.open(sheet) as drawn:
        tiles = np.asarray(drawn)
    assert tiles.shape == (4 * 184 - 4, 4 * 244 - 4, 3)
    # A landscape fills its tile: the object's upper left is white in the mask, black around it.
    truth = tiles[:180, 244 : 244 + 240, 0]
    assert (truth[30, 30], truth[5, 5], truth[150, 200]) == (255, 0, 0)
    assert set(np.unique(tiles[:180, 488 : 488 + 240])) == {0, 255}


def _no_mask(data: Path) -> None:
    (data / "masks" / "2.png").unlink()


def _other_size(data: Path) -> None:
    box(30, 40).save(data / "masks" / "1.png")


def _empty_folder(data: Path) -> None:
    for path in (data / "masks").iterdir():
        path.unlink()


def _no_folder(data: Path) -> None:
    (data / "images").rename(data / "elsewhere")


def _broken_mask(data: Path) -> None:
    (data / "masks" / "3.png").write_bytes((data / "masks" / "3.png").read_bytes()[:60])


def _broken_picture(data: Path) -> None:
    (data / "images" / "3.jpg").write_bytes(b"no picture")


def _classes(data: Path) -> None:
    box(40, 30, value=15).save(data / "masks" / "0.png")


def _twice(data: Path) -> None:
    picture(0, (40, 30)).save(data / "images" / "0.png")


def _all_empty(data: Path) -> None:
    for i, size in enumerate(SIZES):
        box(*size, value=0).save(data / "masks" / f"{i}.png")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_no_mask, ["2.jpg", "has no mask", "expected '2' with the suffix"]),
        (_other_size, ["1.png", "30 x 40", "1.jpg", "40 x 30", "must have the size"]),
        (_empty_folder, ["masks", "holds no picture"]),
        (_no_folder, ["images", "is no folder"]),
        (_broken_mask, ["3.png", "cannot be read"]),
        (_broken_picture, ["3.jpg", "cannot be read"]),
        (_classes, ["0.png", "largest value is 15", "0 and 255"]),
        (_twice, ["0.jpg", "0.png", "one mask"]),
        (_all_empty, ["none of the 5 masks holds an object"]),
    ],
)
def test_data_that_cannot_be_used(
    data: Path,
    model: Path,
    spoil: Callable[[Path], None],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(data)
    assert main(command_line(model, data)) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in said


def test_options_and_models_that_cannot_be_used(
    data: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convnet = data / "convnet.safetensors"
    write_model(convnet, "resnet18")
    for arguments, words in (
        (command_line(convnet, data), "resnet18, a convolutional network: it has no attention"),
        (command_line(model, data, "--beside", str(convnet)), "convnet.safetensors' is a resnet18"),
        (command_line(model, data, "--beside", "nothing"), "'nothing' is neither a file"),
        (command_line(model, data, "--mass", "0.6", "1.5"), "--mass 1.5: must be above 0"),
        (command_line(model, data, "--size", "7"), "--size 7 is smaller than a patch"),
        (command_line(model, data, "--voc", str(data)), "or --voc DIR alone"),
        (command_line(model, data)[:-2], "give --images DIR and --masks DIR"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


def test_forms_of_masks(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    expected = np.asarray(box(40, 30)) > 0
    palette = box(40, 30, value=3)
    palette.putpalette([0, 0, 0, 9, 9, 9, 0, 0, 0, 1, 1, 1])
    sixteen = Image.fromarray(np.asarray(box(40, 30)).astype(np.uint16) * 257)
    forms = [box(40, 30), box(40, 30, value=1), box(40, 30).convert("1"), palette, sixteen]
    for form in [*forms, box(40, 30).convert("RGB"), box(40, 30, value=128)]:
        form.save(path)
        assert np.array_equal(read_mask(path).inside, expected), form.mode
        assert read_mask(path).counted.all()


@pytest.mark.parametrize(
    ("mode", "colour", "said"),
    [
        ("RGBA", (255, 255, 255, 0), "has transparency; expected grey of 0 and 255"),
        ("LA", (255, 0), "has transparency"),
        ("RGB", (255, 0, 0), "has colours; expected grey of 0 and 255"),
        ("L", 76, "its largest value is 76; expected 0 and 255, 0 and 1, or a palette"),
    ],
)
def test_masks_that_would_be_misread(tmp_path: Path, mode: str, colour: Any, said: str) -> None:
    path = tmp_path / "mask.png"
    Image.new(mode, (8, 6), colour).save(path)
    with pytest.raises(DataError, match=said):
        read_mask(path)


def test_nested_folders_and_masks_that_are_not_asked_for(data: Path) -> None:
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        (data / kind / "part").mkdir()
        (data / kind / f"0.{suffix}").rename(data / kind / "part" / f"a.b.{suffix}")
    box(3, 3).save(data / "masks" / "unused.png")
    pairs = open_pairs(data / "images", data / "masks")
    assert pairs.pictures.names == ["1.jpg", "2.jpg", "3.jpg", "4.jpg", "part/a.b.jpg"]
    assert pairs.masks[-1] == data / "masks" / "part" / "a.b.png"
    assert pairs.read(4).picture.size == (40, 30)


@pytest.fixture
def voc(data: Path) -> Path:
    folder = data / "VOC2012"
    for part in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (folder / part).mkdir(parents=True)
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_2\n2007_0\n")
    for i, (width, height) in enumerate(SIZES[:4]):
        picture(i, (width, height)).save(folder / "JPEGImages" / f"2007_{i}.jpg")
        values = np.asarray(box(width, height, value=15)).copy()
        values[0] = 255
        mask = Image.fromarray(values)
        mask.putpalette(bytes(range(256)) * 3)
        mask.save(folder / "SegmentationClass" / f"2007_{i}.png")
    return folder


def test_voc_layout(voc: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = read_voc(voc / "SegmentationClass" / "2007_0.png")
    assert np.array_equal(mask.inside, np.asarray(box(*SIZES[0])) > 0)
    assert not mask.counted[0].any()
    assert mask.counted[1:].all()
    common = ["attention_jaccard", "--model", str(model), "--workers", "0", "--voc", str(voc)]
    assert main([*common, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["pictures"] == 2
    assert "void" in found["protocol"]["mask"]
    (voc / "SegmentationClass").rename(voc / "SegmentationObject")
    assert main([*common, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["jaccard_mean"] == found["jaccard_mean"]

    for path, words in (
        ("SegmentationObject/2007_2.png", "'2007_2', whose mask"),
        ("JPEGImages/2007_0.jpg", "'2007_0', which is not in JPEGImages"),
        ("SegmentationObject", "no SegmentationClass"),
        ("ImageSets/Segmentation/val.txt", "not of VOC12's layout"),
    ):
        (voc / path).rename(voc / "away")
        assert main(common) == 2
        assert words in capsys.readouterr().err
        (voc / "away").rename(voc / path)
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("\n")
    assert main(common) == 2
    assert "val.txt' is empty" in capsys.readouterr().err
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_bytes(b"2007_2\xff\n")
    assert main(common) == 2
    assert "val.txt' is not text in UTF-8" in capsys.readouterr().err


def test_void_counts_for_neither_side() -> None:
    inside = np.zeros((4, 4), dtype=bool)
    inside[:, 0] = True
    counted = np.ones((4, 4), dtype=bool)
    counted[:, 2:] = False
    pixels = cells(ObjectMask(inside, counted), (2, 2))
    attention = torch.tensor([[[0.5, 0.1, 0.5, 0.1]]])
    found = score(attention, pixels.inside[None], pixels.counted[None], [1.0])
    assert found.tolist() == [[[0.5, 0.5]]]  # all is kept: 4 of the 8 pixels that count


def test_views_of_one_size_go_together_and_few_wait() -> None:
    widths = [8 * (1 + i * i % 7 % 5) for i in range(60)]
    nothing = torch.zeros(1)
    taken = 0

    def samples() -> Iterator[_Sample]:
        for place, width in enumerate(widths):
            assert place - taken < 4 * 3  # all that were read and not given back
            yield _Sample(place, torch.zeros(3, 8, width), nothing, nothing)

    places = []
    for batch in _alike(samples(), 3):
        assert len(batch) <= 3 * 4
        assert len({sample.view.shape for sample in batch}) == 1
        places += [sample.place for sample in batch]
        taken += len(batch)
    assert sorted(places) == list(range(60))


def test_many_sizes_do_not_pile_up() -> None:
    nothing = torch.zeros(1)
    samples = [_Sample(i, torch.zeros(3, 8, 8 * (i + 1)), nothing, nothing) for i in range(20)]
    given = iter(samples)
    first = next(_alike(given, 2))
    assert [sample.place for sample in first] == [0]
    assert next(given).place == 8  # four batches' views were waiting


@pytest.mark.skipif(not ECSSD.is_dir(), reason="needs ../shared/data/ecssd")
def test_real_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, suffix in (("images", "jpg"), ("masks", "png")):
        (tmp_path / part).mkdir()
        for path in sorted((ECSSD / part).iterdir())[:6]:
            (tmp_path / part / f"{path.stem}.{suffix}").symlink_to(path.resolve())
    more = ["--json", "--beside", "untrained"]
    assert main(command_line(Path("default"), tmp_path, *more)) == 0
    found = json.loads(capsys.readouterr().out)
    for figures in (found, found["beside"]["untrained"]):
        assert 0.05 < figures["jaccard_mean"] < figures["jaccard_best_head"] < 0.9
        assert len(figures["jaccard_per_head"]) == 3
