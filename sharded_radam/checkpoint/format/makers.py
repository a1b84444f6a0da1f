"""Plain values other than containers and tensors: what the functions that a pickle names would make of their arguments.

Each checks its arguments first: a file says what these are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_MOST_COLLISIONS = 100
"""Keys of one dict or set with the hash of another; who makes more of them wants to take time."""

SCALARS = {type(None), bool, int, float, str}
_KEYS = {*SCALARS, bytes, complex, torch.dtype, torch.device}


def check_keys(keys: list[Any]) -> None:
    """Raise for keys that take long to find."""
    if not all(map(_is_key, keys)):
        raise TypeError("a key that is no number, text or tuple of these")
    if len(keys) - len({*map(hash, keys)}) > _MOST_COLLISIONS:
        raise ValueError("keys that were made to have the same hash")


def _is_key(value: Any) -> bool:
    return type(value) in _KEYS or (type(value) in (tuple, torch.Size) and all(map(_is_key, value)))


def set_attributes(value: Any, attributes: Any) -> None:
    """What users put on a tensor or an OrderedDict; nothing that these have themselves."""
    if type(attributes) is not dict:
        raise TypeError("attributes that are no dict")
    for name, attribute in attributes.items():
        if type(name) is not str or hasattr(type(value), name):
            raise TypeError(f"an attribute {name!r:.100}")
        vars(value)[name] = attribute


def _only(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} in the place of a {kind.__name__}")
    return value


def _encoded(text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise TypeError("bytes in another encoding")
    return _only(str, text).encode("latin-1")  # type: ignore[no-any-return]


def _bytearray(value: Any = b"", *encoding: Any) -> bytearray:
    return bytearray(_encoded(value, *encoding) if encoding else _only(bytes, value))


def _set(kind: type[Any]) -> Callable[[Any], Any]:
    def make(values: Any) -> Any:
        check_keys(_only(list, values))
        return kind(values)

    return make


def _size(numbers: Any) -> torch.Size:
    if not all(type(number) is int for number in _only(tuple, numbers)):
        raise TypeError("a size that is not made of integers")
    return torch.Size(numbers)


def _device(kind: Any, *index: Any) -> torch.device:
    return torch.device(_only(str, kind), *(_only(int, number) for number in index))


def _parameter(data: Any, requires_grad: Any, hooks: Any, attributes: Any = None) -> nn.Parameter:
    if hooks:
        raise TypeError("a parameter with hooks")
    param = nn.Parameter(_only(Tensor, data), _only(bool, requires_grad))
    if attributes is not None:
        set_attributes(param, attributes)
    return param


_BUILTINS: Mapping[str, Callable[..., Any]] = {
    "bytes": lambda: b"",  # others are encoded texts
    "bytearray": _bytearray,
    "set": _set(set),
    "frozenset": _set(frozenset),
    "complex": lambda real, imaginary: complex(_only(float, real), _only(float, imaginary)),
}
MAKERS: Mapping[str, Callable[..., Any]] = {
    **{f"builtins.{name}": make for name, make in _BUILTINS.items()},
    **{f"__builtin__.{name}": make for name, make in _BUILTINS.items()},  # as protocol 2 calls it
    "_codecs.encode": _encoded,
    "collections.Counter": lambda *counts: Counter(*(_only(dict, count) for count in counts)),
    "torch.Size": _size,
    "torch.device": _device,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
