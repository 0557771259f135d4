"""Reads a pickle of plain values and NumPy arrays of numbers, without running anything in it.

A pickle names functions, and unpickling calls them. Here no function that a file names is ever
looked up: the few names that NumPy's arrays and scalars need stand for constructors of this module,
and any other name is an error.
"""

import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np

_NUMBER = re.compile(r"[<>|=]?(?:[?]|b1|[iu][1248]|f[248])")


def read_plain_pickle(content: bytes) -> Any:
    """The pickled value: None, numbers, strings, bytes, lists, tuples, dicts; arrays.

    NumPy arrays come back as `PlainArray`, its scalars as Python's numbers. Pickles of Python 2 are
    read too, their strings as Latin-1.

    Raises:
        ValueError: a global that is not allowed, which is named, or bytes that are no pickle.
    """
    try:
        return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except _ForbiddenError as error:
        raise ValueError(str(error)) from error
    except Exception as error:
        # Bytes that are wrong make the unpickler raise nearly anything.
        raise ValueError(f"is no pickle of plain values: {error}") from error


class PlainArray:
    """A NumPy array's pickle, of numbers alone; `values` once its state was read."""

    def __init__(self) -> None:
        self.values: np.ndarray[Any, Any] = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, content = state
        self._fill(content, dtype, shape, "F" if fortran else "C")

    @classmethod
    def from_buffer(cls, content: Any, dtype: Any, shape: Any, order: str) -> "PlainArray":
        """An array as protocol 5 tells it."""
        array = cls()
        array._fill(content, dtype, shape, order)
        return array

    def _fill(self, content: Any, dtype: Any, shape: Any, order: str) -> None:
        if not isinstance(dtype, _Dtype):
            raise ValueError("an array without a type")
        if isinstance(content, str):  # Python 2's strings are bytes
            content = content.encode("latin1")
        if order not in ("C", "F"):
            raise ValueError(f"an array in order {order!r}")
        flat = np.frombuffer(content, dtype.dtype)
        self.values = flat.reshape(shape, order="F" if order == "F" else "C")


class _ForbiddenError(pickle.UnpicklingError):
    pass


class _Dtype:
    def __init__(self, code: object) -> None:
        if not isinstance(code, str) or not _NUMBER.fullmatch(code):
            raise ValueError(f"an array of {code!r}; only numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Constructor:
    """Stands for a global; the file can call it, and can change nothing in it."""

    __slots__ = ("_build",)

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build

    def __call__(self, *arguments: Any) -> Any:
        return self._build(*arguments)

    def __setstate__(self, state: object) -> None:
        raise _ForbiddenError("a pickle that changes what it names")


def _latin1(text: str, codec: str) -> bytes:
    if codec not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in {codec!r}")
    return text.encode("latin1")


def _scalar(dtype: _Dtype, content: bytes | str) -> Any:
    raw = content.encode("latin1") if isinstance(content, str) else content
    return np.frombuffer(raw, dtype.dtype, count=1)[0].item()


def _bytes(*arguments: Any) -> bytes:
    if arguments:
        raise ValueError("bytes made of something")
    return b""


def _marker(*_: Any) -> None:
    raise ValueError("numpy.ndarray is called")


_NUMPY: dict[str, Callable[..., Any]] = {
    "multiarray._reconstruct": lambda *_: PlainArray(),
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": PlainArray.from_buffer,
}
_ALLOWED: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _marker,
    "numpy.dtype": lambda code, *_: _Dtype(code),
    "_codecs.encode": _latin1,
    "__builtin__.bytes": _bytes,  # how protocol 2 writes empty bytes
    **{f"numpy.{core}.{name}": made for core in ("core", "_core") for name, made in _NUMPY.items()},
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        if wanted not in _ALLOWED:
            raise _ForbiddenError(
                f"names {wanted}, which is not allowed: only plain values and NumPy arrays of "
                "numbers are read, and nothing is run"
            )
        return _Constructor(_ALLOWED[wanted])
