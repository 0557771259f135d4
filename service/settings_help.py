"""Settings in words: what each may be, and what is wrong with a value that cannot be.

The rule that `--help` tells is the rule that an error tells: both are made of the field itself.
"""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings

PREFIX = "DINOSCOPE_"
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
_BOUNDS = ((Ge, "ge", "from"), (Gt, "gt", "above"), (Le, "le", "to"), (Lt, "lt", "below"))


@dataclass(frozen=True)
class Rule:
    """Stands in a field's `Annotated[...]` where its type does not say all that holds for it."""

    words: str


def variable(name: str) -> str:
    """A field's environment variable."""
    return PREFIX + name.upper()


def help_of(settings: type[BaseSettings]) -> str:
    """Every setting with its default, what it is for, and its rule."""
    return "\n".join(
        f"  {variable(name)} (default {_default(field)})\n"
        f"      {field.description}\n"
        f"      must be {rule_of(field)}"
        for name, field in settings.model_fields.items()
    )


def rule_of(field: FieldInfo) -> str:
    """What a value must be, to go on after "must be"."""
    for item in field.metadata:
        if isinstance(item, Rule):
            return item.words
    return _kind(field.annotation) + _range(field.metadata)


def complaints_of(error: ValidationError, settings: type[BaseSettings]) -> Iterator[str]:
    """A line for each fault: the variable, its value, the rule."""
    for fault in error.errors():
        name = str(fault["loc"][0]) if fault["loc"] else ""
        if name not in settings.model_fields:
            yield _own_words(fault)  # about several settings: its message names them
            continue
        field = settings.model_fields[name]
        is_secret = SecretStr in (field.annotation, *get_args(field.annotation))
        value = "(hidden)" if is_secret else repr(fault["input"])
        told = _own_words(fault) or f"must be {rule_of(field)}"
        yield f"{variable(name)} = {value}: {told}"


def unknown_of(names: Iterable[str], known: Iterable[str]) -> Iterator[str]:
    """A line for each variable with our prefix that is no setting, with the nearest that is."""
    settings = sorted(known)
    for name in sorted(name.upper() for name in names):
        if name.startswith(PREFIX) and name not in settings:
            nearest = difflib.get_close_matches(name, settings, n=1, cutoff=0.0)[0]
            yield f"{name} is not a setting; the nearest is {nearest}"


def _own_words(fault: ErrorDetails) -> str:
    """What a validator of ours said; nothing where pydantic found the fault."""
    return str(fault["ctx"]["error"]) if fault["type"] == "value_error" else ""


def _default(field: FieldInfo) -> str:
    value = field.default
    if value in (None, "", ()):
        return "none"
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _kind(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " or ".join(_kind(one) for one in get_args(annotation) if one is not type(None))
    if origin is tuple:
        return "values with commas between them"
    return _KINDS.get(annotation, "text")


def _range(metadata: Iterable[Any]) -> str:
    words = [
        f" {word} {getattr(item, attribute)}"
        for kind, attribute, word in _BOUNDS
        for item in metadata
        if isinstance(item, kind)
    ]
    if len(words) == 1 and words[0].startswith(" from "):
        return words[0].replace("from", "of at least", 1)
    return "".join(words)
