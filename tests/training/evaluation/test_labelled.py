from pathlib import Path

import pytest

from tests.training.conftest import write_pictures
from training.evaluation.labelled import open_train_and_val
from training.sources import DataError


def folders(root: Path, **counts: int) -> str:
    for label, count in counts.items():
        write_pictures(root / label, count)
    return str(root)


def test_both_sets_count_the_classes_of_the_first(tmp_path: Path) -> None:
    train = folders(tmp_path / "train", cat=2, ant=3, bee=2)
    val = folders(tmp_path / "val", cat=1, bee=1)
    bank, queries = open_train_and_val([train], [val])
    assert bank.classes == queries.classes == ["ant", "bee", "cat"]
    assert bank.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert queries.labels.tolist() == [1, 2]


def test_a_class_of_one_picture_is_refused_by_its_name(tmp_path: Path) -> None:
    train = folders(tmp_path / "train", cat=2, ant=1)
    with pytest.raises(DataError) as raised:
        open_train_and_val([train], [train])
    for said in ("class 'ant' in --train has 1 picture", "'ant/", "at least 2"):
        assert said in str(raised.value)
    assert len(open_train_and_val([train], [train], least=1)[0].labels) == 3


def test_classes_that_do_not_match_are_told_from_both_sides(tmp_path: Path) -> None:
    train, val = folders(tmp_path / "a", cat=2, ant=2), folders(tmp_path / "b", dog=1, cat=1)
    with pytest.raises(DataError) as raised:
        open_train_and_val([train], [val])
    for said in ("has 1 class that --train lacks", "'dog' of 'dog/", "--train has 2", "'ant'"):
        assert said in str(raised.value)
