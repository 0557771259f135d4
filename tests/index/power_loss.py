"""What is on a disk after the power went: a model of the worst that POSIX allows.

A file's bytes are there up to its last sync; of what was written to it since, each sector may be
there or not. A name is there, or gone, once its folder was synced; of what was done to a folder's
names since, the first few steps are there. This is harsher than common file systems: theirs sync a
new file's name with the file.
"""

import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, Union

_HEAD = struct.Struct("=QQqQQ")
_SECTOR = 512
_ACKNOWLEDGED = "acknowledged"


@dataclass(frozen=True)
class Entry:
    """One line of the diary, see faulty_disk.c: what was done to the file number `inode`."""

    kind: str
    inode: int
    place: int
    path: str
    data: bytes


def read_diary(path: Path, root: Path) -> list[Entry]:
    """All that was done, in order; paths are below `root`."""
    content, at, entries = path.read_bytes(), 0, list[Entry]()

    def below(text: bytes) -> str:
        return os.path.relpath(text.decode(), root)

    while at < len(content):
        kind, inode, place, first, second = _HEAD.unpack_from(content, at)
        at += _HEAD.size
        name, data = content[at : at + first], content[at + first : at + first + second]
        at += first + second
        if chr(kind) == "r":
            data = below(data).encode()
        entries.append(Entry(chr(kind), inode, place, below(name) if name else "", data))
    return entries


@dataclass
class _File:
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # None: cut to this size

    def sync(self) -> None:
        for place, data in self.pending:
            _apply(self.durable, place, data)
        self.pending.clear()

    def after_power_loss(self, chance: random.Random, kept: float) -> bytes:
        content = bytearray(self.durable)
        for place, data in self.pending:
            if data is None:
                if chance.random() < kept:
                    _apply(content, place, None)
                continue
            start = 0
            while start < len(data):
                end = min(len(data), start + _SECTOR - (place + start) % _SECTOR)
                if chance.random() < kept:
                    _apply(content, place + start, data[start:end])
                start = end
        return bytes(content)

    def now(self) -> bytes:
        content = bytearray(self.durable)
        for place, data in self.pending:
            _apply(content, place, data)
        return bytes(content)


@dataclass
class _Folder:
    durable: dict[str, "_Node"] = field(default_factory=dict)
    current: dict[str, "_Node"] = field(default_factory=dict)
    pending: list[tuple[str, str, Union["_Node", None]]] = field(default_factory=list)

    def do(self, step: tuple[str, str, Union["_Node", None]]) -> None:
        self.pending.append(step)
        _step(self.current, step)

    def sync(self) -> None:
        self.durable = dict(self.current)
        self.pending.clear()

    def after_power_loss(self, chance: random.Random, kept: float) -> dict[str, "_Node"]:
        names = dict(self.durable)
        for step in self.pending:
            if chance.random() >= kept:
                break
            _step(names, step)
        return names


_Node: TypeAlias = _File | _Folder


class Disk:
    """A disk to which the entries of a diary are done, one after the other."""

    def __init__(self) -> None:
        self._root = _Folder()
        self._nodes: dict[int, _Node] = {}

    def do(self, entry: Entry) -> None:
        if entry.kind in "cd":
            node: _Node = _File() if entry.kind == "c" else _Folder()
            self._nodes[entry.inode] = node
            folder, name = self._place(entry.path)
            folder.do(("add", name, node))
        elif entry.kind in "ur":
            folder, name = self._place(entry.path)
            if entry.kind == "u":
                folder.do(("remove", name, None))
            else:
                target, new_name = self._place(entry.data.decode())
                assert target is folder, "a rename from folder to folder is not modelled"
                folder.do((name, new_name, None))
        elif (found := self._nodes.get(entry.inode)) is None:
            pass  # the sync of the folder above the root
        elif entry.kind == "s":
            found.sync()
        else:
            assert isinstance(found, _File)
            found.pending.append((entry.place, entry.data if entry.kind == "w" else None))

    def acknowledged(self) -> list[str]:
        """The lines of the file of acknowledgements, as the process has written them."""
        node = self._root.current.get(_ACKNOWLEDGED)
        return node.now().decode().splitlines() if isinstance(node, _File) else []

    def write_after_power_loss(self, folder: Path, chance: random.Random, *, kept: float) -> None:
        """What is left, into `folder`.

        Args:
            kept: how likely it is that a sector or a name that was not synced is there.
        """
        # The root's own names are no part of what is tested: whoever made it saw to them.
        for name, node in self._root.current.items():
            if name != _ACKNOWLEDGED:
                _write(folder / name, node, chance, kept)

    def _place(self, path: str) -> tuple[_Folder, str]:
        *folders, name = path.split("/")
        folder = self._root
        for each in folders:
            found = folder.current[each]
            assert isinstance(found, _Folder)
            folder = found
        return folder, name


def cuts(entries: list[Entry], chance: random.Random, count: int) -> Iterator[tuple[int, Disk]]:
    """The disk before entries at random: half of them those by which something was acknowledged."""
    told = [
        number + 1
        for number, entry in enumerate(entries)
        if entry.kind == "w" and entry.data.startswith(b'["done"')
    ]
    chosen = chance.sample(told, min(len(told), count // 2))
    chosen += chance.sample(range(len(entries)), min(len(entries), count - len(chosen)))
    disk, done = Disk(), 0
    for cut in sorted(chosen):
        for entry in entries[done:cut]:
            disk.do(entry)
        done = cut
        yield cut, disk


def _apply(content: bytearray, place: int, data: bytes | None) -> None:
    if data is None:
        del content[place:]
        content.extend(bytes(place - len(content)))
        return
    content.extend(bytes(max(0, place - len(content))))
    content[place : place + len(data)] = data


def _step(names: dict[str, _Node], step: tuple[str, str, _Node | None]) -> None:
    what, name, node = step
    if what == "add" and node is not None:
        names[name] = node
    elif what == "remove":
        names.pop(name, None)
    else:
        names[name] = names.pop(what)


def _write(path: Path, node: _Node, chance: random.Random, kept: float) -> None:
    if isinstance(node, _File):
        path.write_bytes(node.after_power_loss(chance, kept))
        return
    path.mkdir()
    for name, child in node.after_power_loss(chance, kept).items():
        _write(path / name, child, chance, kept)
