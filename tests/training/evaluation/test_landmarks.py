"""The ground truth of revisited Oxford and Paris: a pickle that is read and never run."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.training.evaluation.landmark_folder import write_landmarks
from training.decoding import decode
from training.evaluation.landmarks import Query, open_landmarks
from training.evaluation.plain_pickle import PlainArray, read_plain_pickle
from training.sources import DataError


class Shell:
    """Unpickled the usual way, it runs a command."""

    def __init__(self, line: str) -> None:
        self.line = line

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.line,)


@pytest.mark.parametrize("protocol", range(6))
def test_numbers_strings_and_arrays(protocol: int) -> None:
    value = {
        "plain": [1, -2.5, True, None, "é", b"\x00\xff", b"", (1, [2])],
        "scalars": [np.int64(3), np.float32(2.5), np.bool_(True)],
        "arrays": [np.arange(3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.zeros(0, int)],
        "big_endian": np.arange(3, dtype=">i4"),
    }
    found = read_plain_pickle(pickle.dumps(value, protocol=protocol))
    assert found["plain"] == value["plain"]
    assert found["scalars"] == [3, 2.5, True]
    for array, expected in zip(found["arrays"], value["arrays"], strict=True):
        assert isinstance(array, PlainArray)
        assert np.array_equal(array.values, expected)
    assert found["big_endian"].values.tolist() == [0, 1, 2]


def test_both_names_of_numpys_core() -> None:
    content = pickle.dumps(np.arange(2), protocol=2)
    for core in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        renamed = content.replace(b"numpy._core.multiarray", core)
        renamed = renamed.replace(b"numpy.core.multiarray", core)
        assert read_plain_pickle(renamed).values.tolist() == [0, 1]


def test_python_2() -> None:
    assert read_plain_pickle(b"(dp0\nS'caf\\xe9'\np1\n(lp2\nI1\nas.") == {"café": [1]}
    # An array's bytes are a string there.
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I2\ntcnumpy\ndtype\n(S'i4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
        b"I00\nS'\\x05\\x00\\x00\\x00\\xff\\x00\\x00\\x00'\ntb."
    )
    assert read_plain_pickle(array).values.tolist() == [5, 255]


@pytest.mark.parametrize("protocol", range(6))
def test_a_command_in_a_pickle_does_not_run(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    content = pickle.dumps({"imlist": [Shell(f"touch {mark}")]}, protocol=protocol)
    with pytest.raises(ValueError, match=r"names \w+\.system, which is not allowed"):
        read_plain_pickle(content)
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()  # so the test can fail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        (b"cnumpy\nload\n(S'x'\ntR.", "numpy.load"),
        (pickle.dumps(np.array([object()])), "only numbers"),
        (pickle.dumps(np.array(["text"])), "only numbers"),
        (b"cnumpy\nndarray\n(I1000000000\ntR.", "numpy.ndarray is called"),
        (b"c_codecs\nencode\n(Vx\nVidna\ntR.", "bytes in 'idna'"),
        (b"c_codecs\nencode\n}Va\nI1\nsb.", "changes what it names"),
        (b"not a pickle", "no pickle"),
        (pickle.dumps([1, 2, 3])[:-4], "no pickle"),
        (b"", "no pickle"),
    ],
)
def test_anything_else_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_plain_pickle(content)


def test_open_landmarks(tmp_path: Path) -> None:
    write_landmarks(tmp_path / "roxford5k", "roxford5k")
    for folder, dataset in [
        (tmp_path, None),
        (tmp_path, "roxford5k"),
        (tmp_path / "roxford5k", "roxford5k"),
    ]:
        (found,) = open_landmarks(folder, dataset)
        assert found.name == "roxford5k"
        assert list(found.database.names) == ["a0.jpg", "a1.jpg", "b0.jpg", "b1.jpg", "c0.jpg"]
        assert list(found.queries.names) == ["qa.jpg", "qb.jpg"]
        assert found.truth[0] == Query((4.4, 2.0, 20.0, 18.0), [0], [1], [4])
    write_landmarks(tmp_path / "rparis6k", "rparis6k")
    assert [each.name for each in open_landmarks(tmp_path)] == ["roxford5k", "rparis6k"]


def test_difficulties() -> None:
    query = Query((0, 0, 1, 1), [1], [2], [3])
    assert query.relevant("easy") == ([1], [3, 2])
    assert query.relevant("medium") == ([1, 2], [3])
    assert query.relevant("hard") == ([2], [3, 1])
    with pytest.raises(ValueError, match="'harder' is none of easy, medium, hard"):
        query.relevant("harder")


def test_queries_are_cut_to_their_boxes(tmp_path: Path) -> None:
    write_landmarks(tmp_path, "roxford5k")
    (found,) = open_landmarks(tmp_path)
    cropped = decode(found.cropped_queries().read(0), "qa.jpg")
    with Image.open(tmp_path / "jpg" / "qa.jpg") as whole:
        assert cropped.tobytes() == whole.crop((4, 2, 20, 18)).tobytes()


def test_a_box_outside_of_its_picture(tmp_path: Path) -> None:
    gnd = write_landmarks(tmp_path, "roxford5k")
    gnd["gnd"][1]["bbx"] = [100, 0, 120, 10]
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(gnd))
    (found,) = open_landmarks(tmp_path)
    with pytest.raises(DataError, match=r"box \[100.*\] of query 'qb.jpg' lies outside .* 24 x 20"):
        found.cropped_queries().read(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gnd: gnd.pop("qimlist"), r"lacks \['qimlist'\]; it has \['gnd', 'imlist'\]"),
        (lambda gnd: gnd["gnd"].pop(), "gnd has 1 queries and qimlist 2"),
        (lambda gnd: gnd.update(imlist="a0"), "imlist is a str, not a list"),
        (lambda gnd: gnd.update(imlist=[]), "imlist is empty"),
        (lambda gnd: gnd["imlist"].append("../../secret"), "not a file's name"),
        (lambda gnd: gnd["imlist"].append("a9"), r"lacks 1 pictures .* 'a9.jpg'"),
        (lambda gnd: gnd["gnd"][0].pop("hard"), r"gnd\[0\] lacks \['hard'\]"),
        (lambda gnd: gnd["gnd"][0]["easy"].append(5), r"gnd\[0\].easy holds 5, not the place"),
        (lambda gnd: gnd["gnd"][0]["easy"].append(0.5), r"gnd\[0\].easy holds 0.5"),
        (lambda gnd: gnd["gnd"][0].update(bbx=[1, 2, 3]), r"gnd\[0\].bbx is \[1, 2, 3\]"),
    ],
)
def test_a_ground_truth_that_is_wrong(tmp_path: Path, change: Any, message: str) -> None:
    gnd = write_landmarks(tmp_path, "roxford5k")
    change(gnd)
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(gnd))
    with pytest.raises(DataError, match=message) as error:
        open_landmarks(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_another_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither roxford5k/gnd_roxford5k.pkl or rparis6k"):
        open_landmarks(tmp_path)
