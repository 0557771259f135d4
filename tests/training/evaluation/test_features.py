from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from backbone.preprocess import Preprocess
from tests.training.conftest import CPU, write_pictures
from training.distributed import World
from training.evaluation.features import collect, extract, reading_workers, stream
from training.sources import DataError, open_pictures

VIEW = Preprocess(resize=18, crop=16, copy_size=16).centre_crop


def embed(batch: Tensor) -> dict[str, Tensor]:
    return {"mean": batch.mean(dim=(2, 3)), "first": batch[:, :, 0, 0]}


@pytest.mark.parametrize(("workers", "threads"), [(0, 1), (0, 3), (1, 1)])
def test_whoever_reads_the_vectors_are_those_of_each_picture(
    tmp_path: Path, workers: int, threads: int
) -> None:
    write_pictures(tmp_path, 11)
    pictures = open_pictures([tmp_path])
    torch.set_num_threads(threads)
    found = extract(pictures, VIEW, embed, here=CPU, batch_size=4, workers=workers)
    for i in range(11):
        with Image.open(tmp_path / pictures.names[i]) as picture:
            alone = embed(VIEW(picture)[None])
        for name in ("mean", "first"):
            torch.testing.assert_close(found[name][i], alone[name][0])


def test_processes_shares_together_are_the_whole(tmp_path: Path) -> None:
    """Also where there are fewer pictures than processes: an empty share knows what others have."""
    write_pictures(tmp_path, 2)
    pictures = open_pictures([tmp_path])
    whole = extract(pictures, VIEW, embed, here=CPU)
    parts = []
    for rank in range(3):
        here = World(rank, 3, torch.device("cpu"))
        parts += list(stream(pictures, VIEW, embed, here=here, batch_size=1))
    assert sorted(len(places) for places, _ in parts) == [0, 1, 1]
    together = collect(parts, CPU)
    for name, vectors in whole.items():
        assert all(found[name].shape[1] == 3 for _, found in parts)
        torch.testing.assert_close(together[name], vectors)


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_pictures(tmp_path, 5)
    pictures = open_pictures([tmp_path])
    (tmp_path / "003.png").unlink()
    with pytest.raises(DataError, match=r"picture '003\.png' cannot be read: .*No such file"):
        extract(pictures, VIEW, embed, here=CPU)
    (tmp_path / "003.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"picture '003\.png' cannot be read"):
        extract(pictures, VIEW, embed, here=CPU)


def test_who_reads_for_a_device() -> None:
    assert reading_workers(torch.device("cpu")) == 0
    assert 1 <= reading_workers(torch.device("cuda")) <= 16
