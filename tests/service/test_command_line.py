"""python -m service, in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.__main__ import main
from service.settings import Settings

REPOSITORY = Path(__file__).parents[2]


def run(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {k: v for k, v in os.environ.items() if not k.startswith("DINOSCOPE_")}
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_bad_value_ends_the_process_with_one_line(tmp_path: Path) -> None:
    ended = run(tmp_path, DINOSCOPE_PORT="abc")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert_lines(ended.stderr, ("DINOSCOPE_PORT", "'abc'"))
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.fixture
def in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The same without the seconds that importing torch takes: (status, stdout, stderr)."""

    def call(*arguments: str, **environment: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["service", *arguments])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        status = main()
        assert list(tmp_path.iterdir()) == []
        return (status, *capsys.readouterr())

    return call


def test_help_lists_every_setting(in_process: Callable[..., tuple[int, str, str]]) -> None:
    for option in ("--help", "-h"):
        status, shown, complaints = in_process(option, DINOSCOPE_PORT="abc")
        assert (status, complaints) == (0, "")
        for name, field in Settings.model_fields.items():
            assert f"DINOSCOPE_{name.upper()} (default {field.default})" in shown
            assert field.description
            assert field.description in shown


@pytest.mark.parametrize(
    ("arguments", "environment", "lines"),
    [
        (["--prot=1"], {}, [("'--prot=1'", "--help")]),
        ([], {"DINOSCOPE_MODEL": "dino_vits61"}, [("'dino_vits61'",)]),
        ([], {"DINOSCOPE_MODEL": "no/such/model.safetensors"}, [("no/such/model.safetensors",)]),
        (
            [],
            {"DINOSCOPE_DEVICE": "tpu", "DINOSCOPE_MAX_QUEUE": "0"},
            [("DINOSCOPE_DEVICE", "'tpu'"), ("DINOSCOPE_MAX_QUEUE", "'0'")],
        ),
    ],
)
def test_mistakes_have_one_line_each(
    in_process: Callable[..., tuple[int, str, str]],
    arguments: list[str],
    environment: dict[str, str],
    lines: list[tuple[str, ...]],
) -> None:
    status, shown, complaints = in_process(*arguments, **environment)
    assert (status, shown) == (2, "")
    assert_lines(complaints, *lines)


def assert_lines(complaints: str, *told: tuple[str, ...]) -> None:
    lines = complaints.splitlines()
    assert len(lines) == len(told), complaints
    for line, parts in zip(lines, told, strict=True):
        assert line.startswith("error: ")
        for part in parts:
            assert part in line


def test_settings_come_from_the_environment_and_the_env_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("DINOSCOPE_PORT=1234\nDINOSCOPE_HOST=0.0.0.0\nPATH=x\n")
    monkeypatch.setenv("DINOSCOPE_PORT", "4321")
    monkeypatch.setenv("PORT", "1")
    settings = Settings()
    assert (settings.port, settings.host) == (4321, "0.0.0.0")


def test_the_queue_must_hold_the_largest_request() -> None:
    with pytest.raises(ValidationError, match="largest request needs 128 places"):
        Settings(_env_file=None, max_queue=127)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 65_536),
        ("max_image_bytes", 0),
        ("max_image_pixels", 2**28),  # more than Pillow would open
        ("decode_threads", 0),
        ("max_batch_size", -1),
        ("log_level", "loud"),
    ],
)
def test_settings_that_cannot_be(name: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(_env_file=None, **{name: value})
    assert [fault["loc"] for fault in caught.value.errors()] == [(name,)]
