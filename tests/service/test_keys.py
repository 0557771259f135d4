"""The file of keys, and the command that changes it."""

import hashlib
import logging
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from service.keys import KeyRing, KeysError, add_key, main, remove_key

DIGEST = hashlib.sha256(b"a").hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def test_a_key_is_found_by_itself_alone(path: Path) -> None:
    writing = add_key(path, "ci", may_write=True)
    reading = add_key(path, "page", may_write=False)
    ring = KeyRing(path)
    for token, name, may_write in ((writing, "ci", True), (reading, "page", False)):
        found = ring.find(token.encode())
        assert found is not None
        assert (found.name, found.may_write) == (name, may_write)
        assert ring.find(token[:-1].encode()) is None
        assert ring.find(token.encode() + b"x") is None
        assert ring.find(found.digest) is None
        assert ring.find(found.digest.hex().encode()) is None  # the file's content opens nothing
    assert ring.find(b"") is None


def test_the_file_holds_no_key_and_is_the_owners_alone(path: Path) -> None:
    tokens = {add_key(path, name, may_write=True) for name in ("a", "b", "c")}
    assert len(tokens) == 3
    for token in tokens:
        assert token.startswith("dinoscope_")
        assert len(token) == len("dinoscope_") + 43  # 256 bits in base64
        assert token.removeprefix("dinoscope_") not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_comments_and_other_keys_stay(path: Path) -> None:
    path.write_text(f"# of the office\n\none read-only {DIGEST}\n")
    add_key(path, "two", may_write=True)
    before = path.read_text()
    add_key(path, "three", may_write=True)
    remove_key(path, "three")
    assert path.read_text() == before
    assert before.startswith(f"# of the office\n\none read-only {DIGEST}\ntwo read-write ")


def test_two_commands_at_once_lose_nothing(path: Path) -> None:
    names = [f"key{i}" for i in range(12)]
    threads = [
        threading.Thread(target=add_key, args=(path, name), kwargs={"may_write": False})
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line.split()[0] for line in path.read_text().splitlines()) == sorted(names)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f"one read-only {DIGEST}\ntwo read-only\n", ("line 2", "three parts")),
        (f"\n# x\n{'n' * 65} read-only {DIGEST}", ("line 3", "1 to 64 letters")),
        (f"one admin {DIGEST}", ("line 1", "read-only, read-write")),
        ("one read-only dinoscope_secret", ("line 1", "64 hexadecimal digits")),
        (f"one read-only {DIGEST.upper()}", ("line 1", "64 hexadecimal digits")),
        (f"one read-only {DIGEST}\none read-only {DIGEST}", ("line 2", "line 1 already")),
        (b"\xff\xfe", ("UTF-8",)),
        (None, ("cannot be read", "No such file")),
    ],
)
def test_a_file_that_cannot_be_used(
    path: Path, content: str | bytes | None, told: tuple[str, ...]
) -> None:
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(KeysError) as caught:
        KeyRing(path)
    for part in (str(path), *told):
        assert part in str(caught.value)
    assert "secret" not in str(caught.value)


def test_changes_count_at_once_and_bad_ones_change_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="service")
    first = add_key(path, "first", may_write=True)
    ring = KeyRing(path)
    second = add_key(path, "second", may_write=True)
    assert ring.find(second.encode()) is not None
    remove_key(path, "first")
    assert ring.find(first.encode()) is None
    good = path.read_text()

    caplog.clear()
    path.write_text("nonsense")
    for _ in range(3):
        assert ring.find(second.encode()) is not None
    [complaint] = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert "line 1" in complaint.message  # told once, not at every request
    path.unlink()
    assert ring.find(second.encode()) is not None
    assert "cannot be read" in caplog.records[-1].message

    path.write_text(good.replace("second", "third"))
    found = ring.find(second.encode())
    assert found is not None
    assert found.name == "third"
    assert not any(token in caplog.text for token in (first, second))


def test_a_change_of_the_same_size_counts(path: Path) -> None:
    token = add_key(path, "one", may_write=True)
    ring = KeyRing(path)
    path.write_text(path.read_text().replace("one", "two"))
    os.utime(path, ns=(1, 1))
    found = ring.find(token.encode())
    assert found is not None
    assert found.name == "two"


@pytest.fixture
def command(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("DINOSCOPE_KEYS_FILE", str(path))

    def call(*arguments: str) -> tuple[int, str, str]:
        return (main(arguments), *capsys.readouterr())

    return call


def test_the_command(path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    status, token, complaints = command("add", "ci")
    assert (status, complaints) == (0, "")
    assert command("add", "page", "--read-only")[0] == 0
    assert command("list") == (0, "ci read-write\npage read-only\n", "")
    found = KeyRing(path).find(token.strip().encode())
    assert found is not None
    assert found.name == "ci"
    assert command("remove", "ci") == (0, "", "")
    assert command("list") == (0, "page read-only\n", "")
    assert KeyRing(path).find(token.strip().encode()) is None


def test_what_the_command_refuses(
    path: Path, command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, told in (
        (("list",), "cannot be read"),
        (("remove", "ci"), "has no key 'ci'"),
        (("add", "a b"), "'a b' cannot be a key's name"),
    ):
        status, shown, complaints = command(*arguments)
        assert (status, shown) == (2, "")
        assert complaints.startswith("error: ")
        assert told in complaints
    command("add", "ci")
    before = path.read_text()
    assert "has a key 'ci' already" in command("add", "ci")[2]
    assert path.read_text() == before
    path.write_text("nonsense")
    assert "line 1" in command("add", "two")[2]
    assert path.read_text() == "nonsense"
    monkeypatch.setenv("DINOSCOPE_KEYS_FILE", str(path.parent / "no" / "keys"))
    assert command("add", "ci")[0] == 2
    monkeypatch.delenv("DINOSCOPE_KEYS_FILE")
    assert "DINOSCOPE_KEYS_FILE" in command("list")[2]
