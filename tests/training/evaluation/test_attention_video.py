"""Videos of attention maps: frames and files in, frames and files out."""

import json
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backbone.architectures import Architecture
from backbone.artifact import Artifact, write_artifact
from backbone.preprocess import Preprocess
from tests.training.conftest import command, finish
from tests.training.evaluation.videos import SIDE, SIZE, frame_picture, place
from training.config import ConfigError
from training.evaluation.__main__ import main
from training.evaluation.attention_video import Drawing, overlay, panels
from training.evaluation.video_files import frame_writer, open_frames

FRAMES = 5


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames numbered without leading zeros, 8 to 12: their names sort otherwise."""
    folder = tmp_path_factory.mktemp("frames")
    for i in range(FRAMES):
        frame_picture(i).save(folder / f"frame{i + 8}.png")
    (folder / "notes.txt").write_text("not a frame")
    return folder


@pytest.fixture(scope="module")
def video(frames: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av")
    path = tmp_path_factory.mktemp("video") / "square.mp4"
    with frame_writer(path, Fraction(30000, 1001)) as write:
        for frame in open_frames(frames):
            write(frame.picture)
    return path


@pytest.fixture
def without_av(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)


def command_line(given: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--model", "default", "--device", "cpu", "--size", "48"]
    return ["attention_video", *fixed, "--input", str(given), "--out", str(out), *more]


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err[err.rindex("error: ") :]


def square(picture: Image.Image) -> float:
    """The horizontal middle of what is strongly red."""
    red, green, blue = (np.asarray(picture)[..., c].astype(int) for c in range(3))
    return float(np.nonzero((red > 150) & (red > blue + 80) & (red >= green))[1].mean())


def test_a_folder_of_frames_into_another_without_pyav(
    frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], without_av: None
) -> None:
    out, saved = tmp_path / "out", tmp_path / "told.json"
    assert main(command_line(frames, out, "--json", "--save", str(saved))) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told == json.loads(saved.read_text())
    # The short side of 48 makes frames of 64 x 48; two panels, 4 pixels apart.
    assert told["attention_video"] == {
        "out": str(out), "frames": FRAMES, "width": 132, "height": 48, "fps": 24.0,
    }  # fmt: skip
    assert told["protocol"]["head"] == "mean"
    assert sorted(path.name for path in out.iterdir()) == [f"{i:05d}.png" for i in range(FRAMES)]
    for i in range(FRAMES):  # in the order of their numbers
        with Image.open(out / f"{i:05d}.png") as sheet:
            assert sheet.size == (132, 48)
            left = sheet.crop((0, 0, 64, 48))
        assert square(left) == pytest.approx((place(i)[0] + SIDE / 2) / 2, abs=3)


def test_a_file_into_a_file(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    av = pytest.importorskip("av")
    out = tmp_path / "new" / "out.mp4"
    assert main(command_line(video, out, "--head", "all", "--mass", "0.6", "--json")) == 0
    told = json.loads(capsys.readouterr().out)["attention_video"]
    # The default model's three heads and the frame: a grid of two by two.
    assert (told["frames"], told["width"], told["height"]) == (FRAMES, 132, 100)
    assert told["fps"] == pytest.approx(29.97, abs=0.01)  # the input's own
    assert [path.name for path in out.parent.iterdir()] == ["out.mp4"]
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(30000, 1001)
        assert len(list(container.decode(video=0))) == FRAMES


def test_fps_of_the_command_line_goes_before_the_videos_own(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.mp4"
    assert main(command_line(video, out, "--fps", "12.5", "--head", "1")) == 0
    assert "5 frames of 132 x 48 pixels" in capsys.readouterr().out
    found = open_frames(out)
    assert (found.rate, found.count) == (Fraction(25, 2), FRAMES)


def test_frames_survive_a_video_file_in_their_order(frames: Path, video: Path) -> None:
    found = list(open_frames(video))
    assert [frame.name for frame in found[:2]] == [f"frame {i} of {video}" for i in (0, 1)]
    for one, other in zip(open_frames(frames), found, strict=True):
        before, after = (np.asarray(each.picture, dtype=float) for each in (one, other))
        assert before.shape == after.shape
        assert abs(before - after).mean() < 8


def test_sides_that_are_odd_are_made_even(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with frame_writer(tmp_path / "odd.mp4", Fraction(24)) as write:
        write(Image.new("RGB", (33, 47), "red"))
    (frame,) = open_frames(tmp_path / "odd.mp4")
    assert frame.picture.size == (34, 48)


def test_a_video_that_was_held_upright(video: Path, tmp_path: Path) -> None:
    content = bytearray(video.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # past version, times, track, duration and volume
    turned = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]  # a quarter clockwise
    content[matrix : matrix + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in turned)
    (tmp_path / "upright.mp4").write_bytes(content)
    upright, plain = (next(iter(open_frames(p))) for p in (tmp_path / "upright.mp4", video))
    assert upright.picture.size == SIZE[::-1]
    expected = plain.picture.transpose(Image.Transpose.ROTATE_270)  # counted the other way round
    assert np.array_equal(np.asarray(upright.picture), np.asarray(expected))


def test_overlays_show_where_attention_is() -> None:
    picture = Image.new("RGB", (64, 48), "black")
    attention = torch.zeros(6, 8)
    attention[1, 2] = 0.5
    attention[4, 6] = 0.3
    drawing = Drawing(colormap="gray", overlay=1.0)
    bright = np.asarray(overlay(picture, attention, drawing))[..., 0]
    assert bright[12, 20] > 200  # the middle of the patch in row 1 and column 2
    assert 100 < bright[36, 52] < bright[12, 20]
    assert bright[36, 20] == 0
    kept = np.asarray(overlay(picture, attention, Drawing(colormap="gray", overlay=1.0, mass=0.5)))
    assert kept[12, 20, 0] == bright[12, 20]
    assert kept[36, 52, 0] == 0
    half = overlay(Image.new("RGB", (64, 48), "white"), attention, Drawing(overlay=0.0))
    assert np.asarray(half).min() == 255


def test_an_even_map_stays_dark() -> None:
    even = torch.full((6, 8), 1 / 49)
    found = overlay(Image.new("RGB", (64, 48)), even, Drawing(colormap="gray", overlay=1.0))
    assert 60 < np.asarray(found).mean() < 68  # a quarter of white


def test_panels_of_each_choice_of_heads() -> None:
    picture = Image.new("RGB", (40, 30), "blue")
    maps = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(0))
    assert panels(picture, maps, Drawing()).size == (84, 30)
    one = panels(picture, maps, Drawing(head=2))
    assert one.size == (84, 30)
    every = panels(picture, maps, Drawing(head="all"))
    assert every.size == (3 * 44 - 4, 3 * 34 - 4)  # seven panels in three rows
    # The third head is the fourth panel, the first of the second row.
    assert np.array_equal(
        np.asarray(every.crop((0, 34, 40, 64))), np.asarray(one.crop((44, 0, 84, 30)))
    )


def test_two_processes_write_one_video(frames: Path, tmp_path: Path) -> None:
    launcher = command("torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m")
    arguments = command_line(frames, tmp_path / "out", "--json")
    status, out, err = finish([*launcher, "training.evaluation", *arguments])
    assert status == 0, err
    assert json.loads(out)["attention_video"]["frames"] == FRAMES
    assert len(list((tmp_path / "out").iterdir())) == FRAMES


def test_input_that_is_no_video(
    frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    out = tmp_path / "out"
    broken, empty, folder = tmp_path / "broken.mp4", tmp_path / "empty.mp4", tmp_path / "folder"
    broken.write_bytes(b"no video" * 100)
    empty.touch()
    folder.mkdir()
    assert "broken.mp4' cannot be read as a video" in error(capsys, *command_line(broken, out))
    assert "empty.mp4' cannot be read as a video" in error(capsys, *command_line(empty, out))
    assert "folder' holds no picture" in error(capsys, *command_line(folder, out))
    assert "none' does not exist" in error(capsys, *command_line(tmp_path / "none", out))
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"ffconcat version 1.0\nfile '{frames / 'frame8.png'}'\n")
    assert "list.mp4' cannot be read as a video" in error(capsys, *command_line(playlist, out))
    assert not out.exists()


def test_a_video_that_breaks_off(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "half.mp4", tmp_path / "out.mp4"
    content = video.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "half.mp4' cannot be read as a video" in error(capsys, *command_line(path, out))
    assert not out.exists()


def test_a_sound_is_no_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"sound\.mp4' has no stream of pictures"):
        open_frames(path)


@pytest.mark.parametrize("out", ["out", "out.mp4"])
def test_frames_that_cannot_be_used_are_named_and_nothing_half_is_left(
    out: str, frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(3):
        frame_picture(i).save(folder / f"{i}.png")
    Image.new("RGB", (20, 10)).save(folder / "2.png")
    arguments = command_line(folder, tmp_path / out, "--batch-size", "1")
    assert "2.png' is 20 x 10 pixels; expected 128 x 96" in error(capsys, *arguments)
    (folder / "2.png").write_bytes(b"no picture")
    assert not (tmp_path / "out.mp4").exists()
    assert not list(tmp_path.glob("*.partial"))
    arguments = command_line(folder, tmp_path / "again" / out)
    assert "2.png' cannot be read" in error(capsys, *arguments)


def test_options_that_cannot_be(
    frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = command_line(frames, out)
    assert "has the heads 0 to 2" in error(capsys, *arguments, "--head", "3")
    assert "--mass 0.0 is not above 0" in error(capsys, *arguments, "--mass", "0")
    assert "--overlay 2.0 is not from 0 to 1" in error(capsys, *arguments, "--overlay", "2")
    assert "is the input" in error(capsys, *command_line(frames, frames))
    assert "videos are written as .mp4" in error(
        capsys, *command_line(frames, tmp_path / "out.avi")
    )
    full = tmp_path / "full"
    full.mkdir()
    frame_picture(0).save(full / "1.png")
    assert "holds pictures already" in error(capsys, *command_line(frames, full))
    (tmp_path / "file").touch()
    assert "is a file; expected NAME.mp4" in error(capsys, *command_line(frames, tmp_path / "file"))
    for option, value in (("--head", "first"), ("--fps", "0"), ("--fps", "x"), ("--fps", "1/0")):
        with pytest.raises(SystemExit):
            main([*arguments, option, value])
        assert f"'{value}'" in capsys.readouterr().err
    assert not out.exists() or not list(out.iterdir())


def test_video_files_without_pyav_name_the_extra(
    frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], without_av: None
) -> None:
    (tmp_path / "in.mp4").touch()
    for arguments in (
        command_line(tmp_path / "in.mp4", tmp_path / "out"),
        command_line(frames, tmp_path / "out.mp4"),
    ):
        assert "needs PyAV: pip install '.[evaluation]'" in error(capsys, *arguments)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[training\]'"):
        overlay(Image.new("RGB", (8, 8)), torch.ones(2, 2), Drawing())


@pytest.fixture
def convnet(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "convnet.safetensors"
    architecture = Architecture(name="mobilenet_v3_small", image_size=32)
    weights = architecture.build().state_dict()
    preprocess = Preprocess(resize=32, crop=32)
    write_artifact(
        Artifact(architecture=architecture, preprocess=preprocess, weights=weights), path
    )
    return path


def test_a_network_without_attention(
    convnet: Path, frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command_line(frames, tmp_path / "out", "--model", str(convnet))
    assert "mobilenet_v3_small, which has no attention" in error(capsys, *arguments)
