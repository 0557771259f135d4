"""python -m service, in a process of its own."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from index.collection_set import CollectionSet
from service.__main__ import main
from service.cores import BRIEF_WAITS
from service.settings import Settings
from service.settings_help import rule_of

REPOSITORY = Path(__file__).parents[2]


def run(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DINOSCOPE_") and name not in BRIEF_WAITS
    }
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


@pytest.mark.skipif(sys.platform != "linux", reason="of the OpenMP that torch brings for Linux")
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, {"GOMP_SPINCOUNT": "5000", "OMP_WAIT_POLICY": "ACTIVE"}),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, {"GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "PASSIVE"}),
    ],
)
def test_how_torchs_threads_wait(
    tmp_path: Path, given: dict[str, str], told: dict[str, str]
) -> None:
    ended = run(tmp_path, **given, OMP_DISPLAY_ENV="VERBOSE", DINOSCOPE_MODEL="no_such")
    assert ended.returncode == 2
    for name, value in told.items():
        assert f"{name} = '{value}'" in ended.stderr


@pytest.fixture
def in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The same without the seconds that importing torch takes: (status, stdout, stderr)."""

    def call(*arguments: str, **environment: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["service", *arguments])
        monkeypatch.setenv("DINOSCOPE_PORT", "0")
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
            assert field.description
            told = f"{field.description}\n      must be {rule_of(field)}\n"
            assert f"  DINOSCOPE_{name.upper()} (default " in shown
            assert told in shown
        assert "DINOSCOPE_PORT (default 8000)" in shown
        assert "DINOSCOPE_CORS_ORIGINS (default none)" in shown
        assert "DINOSCOPE_KEY (default none)" in shown


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
        ([], {"DINOSCOPE_FETCH_ALLOW": "ten:80"}, [("DINOSCOPE_FETCH_ALLOW", "'ten:80'", "10.1")]),
        ([], {"DINOSCOPE_PROT": "1"}, [("DINOSCOPE_PROT", "DINOSCOPE_PORT")]),
        ([], {"DINOSCOPE_HOST": "no such host"}, [("DINOSCOPE_HOST", "'no such host'")]),
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


def test_a_port_in_use_ends_the_process_with_one_line(
    in_process: Callable[..., tuple[int, str, str]],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, shown, complaints = in_process(DINOSCOPE_PORT=port)
    assert (status, shown) == (2, "")
    assert_lines(complaints, (f"DINOSCOPE_PORT = {port}", "in use"))


def test_a_folder_or_keys_that_cannot_be_used_end_the_process_with_one_line(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    given = {"DINOSCOPE_PORT": "0", "DINOSCOPE_DATA_DIR": str(data), "DINOSCOPE_DEVICE": "cpu"}
    taken = CollectionSet(data)
    try:
        ended = run(tmp_path, **given)
    finally:
        taken.close()
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "Traceback" not in ended.stderr
    logged = [json.loads(line) for line in ended.stderr.splitlines()]
    (failure,) = [line["message"] for line in logged if line["level"] == "critical"]
    assert_lines(failure, (str(data), "in use"))

    (tmp_path / "keys").write_text("# ours\nnonsense\n")
    ended = run(tmp_path, DINOSCOPE_KEYS_FILE="keys", **given)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert_lines(ended.stderr.splitlines()[-1], ("keys, line 2", "three parts"))


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
        ("decode_threads", -1),
        ("max_batch_size", -1),
        ("log_level", "loud"),
        ("fetch_allow", "10.1.0.0/16, example.com"),
        ("fetch_timeout_s", 0),
        ("max_fetches", 0),
    ],
)
def test_settings_that_cannot_be(name: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(_env_file=None, **{name: value})
    assert [fault["loc"] for fault in caught.value.errors()] == [(name,)]
