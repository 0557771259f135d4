import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from service.ingest import IngestError, ingest
from service.keys import add_key
from service.settings import Settings
from tests.service.fakes import PATIENCE_S, FakeEncoder, created
from tests.service.pictures import encoded, noise, png

REPOSITORY = Path(__file__).parents[2]


class Service:
    """The service on a port of its own, in a thread."""

    def __init__(self, data_dir: Path, encoder: FakeEncoder, **given: Any) -> None:
        started = threading.Event()
        settings = Settings(_env_file=None, data_dir=data_dir, **given)

        class Server(uvicorn.Server):
            async def startup(self, *args: object, **kwargs: object) -> None:
                await super().startup(*args, **kwargs)
                started.set()

        app = created(settings, encoder)
        config = uvicorn.Config(app, port=0, log_config=None, ws="none")
        self._server = Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        assert started.wait(PATIENCE_S)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, encoder: FakeEncoder) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("data"), encoder)
    yield running
    running.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for path, seed in (
        ("top.png", 1),
        ("cat/one.PNG", 2),
        ("cat/\u00e4 b.png", 3),
        ("a/dog/x.jpg", 4),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        kind = "JPEG" if path.endswith("jpg") else "PNG"
        (root / path).write_bytes(encoded(noise(seed), kind))
    (root / "notes.txt").write_text("no picture")
    return root


def send(folder: Path, collection: str, url: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    return asyncio.run(ingest(folder, collection, url, parallel=3))


def command(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "service.ingest", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_folder_and_then_the_same_again(
    service: Service, folder: Path, encoder: FakeEncoder
) -> None:
    assert send(folder, "again", service.url) == (
        {"created": 4, "updated": 0, "unchanged": 0, "refused": 0},
        [],
    )
    listed = httpx.get(f"{service.url}/v1/collections/again/images").json()["images"]
    assert {one["id"]: one["metadata"] for one in listed} == {
        "top.png": {"name": "top.png"},
        "cat/one.PNG": {"name": "one.PNG", "label": "cat"},
        "cat/\u00e4 b.png": {"name": "\u00e4 b.png", "label": "cat"},
        "a/dog/x.jpg": {"name": "x.jpg", "label": "dog"},
    }
    encoder.calls.clear()
    assert send(folder, "again", service.url)[0]["unchanged"] == 4
    assert encoder.calls == []
    (folder / "top.png").write_bytes(png(9))
    assert send(folder, "again", service.url)[0] == {
        "created": 0,
        "updated": 1,
        "unchanged": 3,
        "refused": 0,
    }


def test_the_command_lists_what_was_refused(service: Service, folder: Path) -> None:
    (folder / "cat" / "broken.jpg").write_bytes(b"no picture")
    ended = command(str(folder), "--collection", "broken", "--url", service.url)
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout == "4 created, 0 updated, 0 unchanged, 1 refused\n"
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("refused: ")]
    assert line.startswith("refused: cat/broken.jpg: ")
    assert "not a picture" in line


def test_files_that_cannot_be_sent_are_refused_alone(service: Service, folder: Path) -> None:
    (folder / "dangling.png").mkdir()  # a folder with a picture's name is none
    unspeakable = os.fsdecode(b"\xff.png")
    (folder / unspeakable).write_bytes(png(5))
    locked = folder / "gone.png"
    locked.write_bytes(png(6))
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == locked:
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        counts, refused = send(folder, "alone", service.url)
    assert counts == {"created": 4, "updated": 0, "unchanged": 0, "refused": 2}
    assert sorted(path for path, _ in refused) == ["gone.png", unspeakable]
    assert "Permission denied" in dict(refused)["gone.png"]


def test_what_cannot_run_says_so_in_one_line(
    service: Service, folder: Path, tmp_path: Path
) -> None:
    ended = command(str(tmp_path / "nowhere"), "--url", service.url)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert "nowhere" in line
    ended = command(str(folder), "--url", "http://127.0.0.1:1")
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: the service at http://127.0.0.1:1 cannot be used")


def test_a_service_with_keys_is_given_one(folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    writing = add_key(keys, "writer", may_write=True)
    reading = add_key(keys, "reader", may_write=False)
    running = Service(tmp_path / "data", FakeEncoder(), keys_file=keys)
    try:
        sending = (str(folder), "--url", running.url)
        ended = command(*sending, DINOSCOPE_KEY=writing)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout == "4 created, 0 updated, 0 unchanged, 0 refused\n"
        ended = command(*sending, "--key", writing, DINOSCOPE_KEY="dinoscope_wrong")
        assert ended.stdout == "0 created, 0 updated, 4 unchanged, 0 refused\n"
        for key, told in (
            ("", "401: a key is needed"),
            ("dinoscope_wrong", "401: the key"),
            (reading, "403: the key 'reader' is read-only"),
            (f"{writing}\n", "visible ASCII"),
            (f"{writing}\u00e9", "visible ASCII"),
        ):
            ended = command(*sending, DINOSCOPE_KEY=key)
            assert (ended.returncode, ended.stdout) == (2, "")
            assert told in ended.stderr
            assert not key or key not in ended.stderr
    finally:
        running.stop()


def test_mistakes_have_a_message(service: Service, folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(IngestError, match="no picture"):
        send(empty, "x", service.url)
    for name in ("Bad", "de mo/x", "..", ""):
        with pytest.raises(IngestError, match="a name must be"):
            send(folder, name, service.url)
    for url in ("127.0.0.1:8000", "http://[", "ftp://127.0.0.1"):
        with pytest.raises(IngestError, match="cannot be used"):
            send(folder, "x", url)


def test_a_service_that_stops_midway_is_one_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Service(tmp_path / "data", FakeEncoder())
    read_bytes = Path.read_bytes
    stopped = threading.Lock()

    def stop_first(path: Path) -> bytes:
        if path.is_relative_to(folder):  # the service reads files of its own
            with stopped:
                running.stop()
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", stop_first)
    with pytest.raises(IngestError, match="cannot be used"):
        send(folder, "x", running.url)


def test_a_collection_that_vanishes_midway_is_one_error(
    service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes = Path.read_bytes

    def delete_first(path: Path) -> bytes:
        if path.is_relative_to(folder):  # the service reads files of its own
            httpx.delete(f"{service.url}/v1/collections/vanishes")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", delete_first)
    with pytest.raises(IngestError, match="answers 404"):
        send(folder, "vanishes", service.url)
