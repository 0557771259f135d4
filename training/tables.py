"""TOML and `key=value` overrides -> frozen dataclasses, with errors that help.

An unknown key is an error that names the nearest known one; a value of another kind is an error
that names the key, the value and the rule.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A recipe that cannot be run; the message names the key, the value and the rule."""


def require(holds: bool, key: str, value: object, rule: str) -> None:
    """Raises `ConfigError` unless the rule holds."""
    if not holds:
        raise ConfigError(f"{key} = {value!r}: {rule}")


def read(path: Path) -> dict[str, Any]:
    """The TOML file of a recipe, laid over the one that its key `base` names, if it has one.

    `base` is a path relative to the file that names it, and may have a base itself. Tables are
    merged key by key; anything else takes the place of what the base says.

    Raises:
        ConfigError: a file that is missing, cannot be read, is not TOML, or is its own base.
    """
    chain: list[Path] = []
    table: dict[str, Any] = {}
    while path.resolve() not in chain:
        chain.append(path.resolve())
        own = _toml(path)
        base = own.pop("base", None)
        table = _merged(own, table)
        if base is None:
            return table
        require(isinstance(base, str), "base", base, f"must be a path, in {str(path)!r}")
        path = path.parent / base
    raise ConfigError(f"base = {base!r}: {str(path)!r} must not be its own base")


def build(cls: type[T], table: Mapping[str, Any]) -> T:
    """The dataclass `cls`, and those that it holds, from a nested mapping of plain values.

    Raises:
        ConfigError: an unknown key, or a value that is not of its kind.
    """
    return typing.cast(T, _build(cls, table, prefix="", root=cls))


def plain(value: Any) -> Any:
    """A dataclass, or what it holds, as values that JSON and TOML know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def override(table: dict[str, Any], text: str) -> None:
    """Sets one `key=value`, with dots for tables, in a nested mapping.

    A value is read as TOML where it is valid TOML, and as a plain string elsewhere, so that
    `run_dir=runs/a` and `data.train='["a.tar", "b.tar"]'` both say what they seem to.

    Raises:
        ConfigError: text without a key, or a table where there is a value.
    """
    key, separator, written = text.partition("=")
    require(bool(separator and key), "override", text, "must look like key=value")
    try:
        value = tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        value = written
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        require(isinstance(table, dict), key, written, f"{parent} is a value, not a table")
    table[last] = value


def _build(cls: type, table: Mapping[str, Any], *, prefix: str, root: type) -> Any:
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise ConfigError(f"unknown key {name!r}; {_nearest(name, root)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            require(isinstance(value, Mapping), name, value, "must be a table")
            values[key] = _build(typing.cast(type, hint), value, prefix=f"{name}.", root=root)
        else:
            values[key] = _convert(value, hint, name)
    return cls(**values)


def _convert(value: Any, hint: Any, name: str) -> Any:
    if isinstance(hint, types.GenericAlias):
        items = [value] if isinstance(value, str) else value
        require(isinstance(items, list), name, value, "must be a list")
        inner = hint.__args__
        if len(inner) == 2 and inner[1] is not Ellipsis:
            require(len(items) == 2, name, value, "must have two numbers")
        return tuple(_convert(item, inner[0], name) for item in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    require(right, name, value, f"must be {words.get(hint, hint)}")
    if hint is float:
        require(math.isfinite(value), name, value, "must be finite")
    return value


def _nearest(name: str, root: type) -> str:
    known = sorted(_keys(root, ""))
    leaf = name.rpartition(".")[2]
    tables = {key.partition(".")[0] for key in known if "." in key}
    close = difflib.get_close_matches(name, [*known, *sorted(tables)], n=1, cutoff=0.5)
    close = close or [key for key in known if key.rpartition(".")[2] == leaf]
    close = close or [
        key
        for near in difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in known], n=1)
        for key in known
        if key.endswith(near)
    ]
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def _keys(cls: type, prefix: str) -> list[str]:
    keys: list[str] = []
    for key, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            keys += _keys(typing.cast(type, hint), f"{prefix}{key}.")
        else:
            keys.append(f"{prefix}{key}")
    return keys


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"recipe {str(path)!r} does not exist") from error
    except OSError as error:
        raise ConfigError(f"recipe {str(path)!r} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} is not TOML: {error}") from error


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merged(old, value)
        merged[key] = value
    return merged
