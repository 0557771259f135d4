"""Bearer keys: the file that holds their hashes, and the command that changes it.

    python -m service.keys add NAME [--read-only]
    python -m service.keys list
    python -m service.keys remove NAME

DINOSCOPE_KEYS_FILE names the file. A running service reads it again when it changes. Each of its
lines is a name, a scope (read-only or read-write) and the SHA-256 of the key in hexadecimal; lines
that are empty or begin with # say nothing.

A plain SHA-256, without salt or stretching, is the right hash here: those defend words that people
choose, which can be guessed. A key is 256 random bits, which nobody can, and its hash is computed
for every request.
"""

import argparse
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from index.durable import fsync
from service.settings import InvalidSettings, load_settings

_PREFIX = "dinoscope_"  # tells people, and scanners of leaked secrets, what a key is for
_SCOPES = {"read-only": False, "read-write": True}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAME_RULE = "1 to 64 letters, digits, dots, hyphens and underscores, a letter or digit first"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger("service")


class KeysError(ValueError):
    """A file of keys that cannot be used; names the file, the line and the rule, never a key."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """Who may come in, and what for; `digest` is the SHA-256 of the key itself."""

    name: str
    may_write: bool
    digest: bytes


class KeyRing:
    """The keys of a file, read again whenever the file changes.

    Args:
        path: one that cannot be used later on is logged, and the keys read before stay.

    Raises:
        KeysError: the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = self._stat()
        self._keys = _read_keys(path)
        if not self._keys:
            _log.warning("%s holds no key: every request is refused", path)

    def find(self, token: bytes) -> Key | None:
        """The key that a client gave, or None where there is no such key."""
        self._read_again()
        digest = hashlib.sha256(token).digest()
        found = None
        for key in self._keys:  # all of them, each in constant time: timing tells nothing
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _read_again(self) -> None:
        state = self._stat()
        if state == self._state:
            return
        self._state = state  # of before reading: a change in between is seen the next time
        try:
            self._keys = _read_keys(self._path)
        except KeysError as error:
            _log.error("%s; the keys that were read before stay", error)
        else:
            _log.info("%s has changed and holds %d keys", self._path, len(self._keys))

    def _stat(self) -> tuple[int, ...]:
        """What differs when the file does; cheap beside any answer, so each request asks."""
        try:
            found = self._path.stat()
        except OSError as error:
            return (error.errno or 0,)
        return (found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)


def add_key(path: Path, name: str, *, may_write: bool) -> str:
    """Adds a key to the file, made where there is none; gives the key, which is kept nowhere.

    Raises:
        KeysError: a name that cannot be or is taken, or a file that cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise KeysError(f"{name!r} cannot be a key's name, which is {_NAME_RULE}")
    with _changing(path) as lines:
        if any(key.name == name for key in _parse(path, lines)):
            raise KeysError(f"{path} has a key {name!r} already; remove it first")
        token = _PREFIX + secrets.token_urlsafe(32)
        scope = "read-write" if may_write else "read-only"
        lines.append(f"{name} {scope} {hashlib.sha256(token.encode()).hexdigest()}")
    return token


def remove_key(path: Path, name: str) -> None:
    """Takes a key out of the file.

    Raises:
        KeysError: no such key, or a file that cannot be used.
    """
    with _changing(path) as lines:
        if not any(key.name == name for key in _parse(path, lines)):
            raise KeysError(f"{path} has no key {name!r}")
        lines[:] = [line for line in lines if line.split()[:1] != [name]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 when done, 2 when it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m service.keys", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="make a key, and print it this once")
    adding.add_argument("name", help=_NAME_RULE)
    adding.add_argument("--read-only", action="store_true", help="it may not change anything")
    commands.add_parser("list", help="names and scopes")
    commands.add_parser("remove", help="revoke a key").add_argument("name")
    options = parser.parse_args(arguments)
    try:
        path = load_settings().keys_file
        if path is None:
            raise KeysError("DINOSCOPE_KEYS_FILE must be set: the path of the file of keys")
        if options.command == "add":
            print(add_key(path, options.name, may_write=not options.read_only))
        elif options.command == "remove":
            remove_key(path, options.name)
        else:
            for key in _read_keys(path):
                print(f"{key.name} {'read-write' if key.may_write else 'read-only'}")
    except InvalidSettings as error:
        for complaint in error.complaints:
            print(f"error: {complaint}", file=sys.stderr)
        return 2
    except (KeysError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _read_keys(path: Path) -> list[Key]:
    return list(_parse(path, _read_lines(path)))


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise KeysError(f"the keys in {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise KeysError(f"{path} must be text in UTF-8") from error


def _parse(path: Path, lines: Sequence[str]) -> Iterator[Key]:
    """Raises `KeysError` at the first bad line, without its text: it may be a key by mistake."""
    names: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue

        def require(holds: bool, rule: str, number: int = number) -> None:
            if not holds:
                raise KeysError(f"{path}, line {number}: {rule}")

        require(len(fields) == 3, "it must have three parts: a name, a scope and a SHA-256")
        name, scope, digest = fields
        require(bool(_NAME.fullmatch(name)), f"the name must be {_NAME_RULE}")
        require(name not in names, f"the name stands in line {names.get(name)} already")
        require(scope in _SCOPES, f"the scope must be one of {', '.join(_SCOPES)}")
        require(
            bool(_DIGEST.fullmatch(digest)), "the SHA-256 must be 64 hexadecimal digits, a-f small"
        )
        names[name] = number
        yield Key(name=name, may_write=_SCOPES[scope], digest=bytes.fromhex(digest))


@contextmanager
def _changing(path: Path) -> Iterator[list[str]]:
    """The file's lines; what the block leaves of them takes the place of the file, whole.

    Two commands at once take turns. The new file is the owner's alone, and of the same owner.
    """
    path = path.resolve()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        lines = _read_lines(path) if path.exists() else []
        yield lines
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 0600
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
                if path.exists() and (owner := path.stat()).st_uid != os.geteuid():
                    os.fchown(descriptor, owner.st_uid, owner.st_gid)  # the service still reads it
            fsync(Path(name))
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink()
            raise
        fsync(path.parent)
    finally:
        os.close(folder)


if __name__ == "__main__":
    sys.exit(main())
