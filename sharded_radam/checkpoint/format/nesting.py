"""Nested values <-> names with dots, and what each is made of, as torch.distributed.checkpoint has them.

``{"a": {"b": 1}}`` is saved as ``a.b`` with the path ``("a", "b")``. Names cannot be taken apart again, since keys may
have dots: paths can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.errors import DamagedError
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.reading import read_value

Path = tuple[str | int, ...]
Names = dict[Path, str]
"""Paths within one value -> the names that its parts are saved under; ``()`` alone if it is saved in one piece."""


def flatten_nested(nested: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """Nested dicts and lists -> names with dots, and the keys that each is made of; as torch's checkpoints have it.

    Raises:
        ValueError: two values have one name.
    """
    flat: dict[str, Any] = {}
    paths: dict[str, Path] = {}
    for path, leaf in _leaves((), nested):
        name = ".".join(map(str, path))
        if name in flat:
            raise ValueError(f"two values are named {name}")
        flat[name], paths[name] = leaf, path
    return flat, paths


def _leaves(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves((*path, str(key)), inner)
    elif isinstance(value, list) and _has_tensors_or_dicts(value):
        for index, inner in enumerate(value):
            yield from _leaves((*path, index), inner)
    else:
        yield path, value


def _has_tensors_or_dicts(values: list[Any]) -> bool:
    """A list without is one value: so it is in torch."""
    return any(
        _has_tensors_or_dicts(value) if isinstance(value, list) else isinstance(value, Mapping | Tensor)
        for value in values
    )


def leaves_of(value: Any) -> dict[Path, Any]:
    """A value in torch's parts if these are all that there is to it; otherwise in one piece.

    torch makes text of all keys, lists of tuples, and nothing of what is empty.
    """
    try:
        flat, paths = flatten_nested({"": value})
        leaves = {paths[key][1:]: leaf for key, leaf in flat.items()}
        return leaves if leaves and _is_same(nest(leaves), value) else {(): value}
    except ValueError:  # two parts with one name
        return {(): value}


def nest(leaves: Mapping[Path, Any]) -> Any:
    """A value out of its parts: dicts, and lists where keys are numbers.

    Raises:
        DamagedError: no value has these parts.
    """
    if () in leaves:
        if len(leaves) > 1:
            raise DamagedError("a value is saved both in one piece and in parts")
        return leaves[()]
    branches: dict[str | int, dict[Path, Any]] = {}
    for path, leaf in leaves.items():
        branches.setdefault(path[0], {})[path[1:]] = leaf
    nested = {key: nest(branch) for key, branch in branches.items()}
    if not any(isinstance(key, int) for key in nested):
        return nested
    if {*nested} != {*range(len(nested))}:
        raise DamagedError("elements of a list are missing")
    return [nested[number] for number in range(len(nested))]


def _is_same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return [*one] == [*other] and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return one is other


def below(index: Index, prefix: str) -> Iterable[tuple[Path, str]]:
    """The names that begin so, and the path of each from there on."""
    for key in [*index.tensors, *index.objects]:
        if key.startswith(prefix):
            yield path_from(index, key, len(prefix)), key


def path_from(index: Index, key: str, start: int) -> Path:
    """The path of a name from a character on, at which a key begins."""
    begin, path = 0, index.paths.get(key, (key,))
    for number, element in enumerate(path):
        if begin == start:
            return path[number:]
        begin += len(str(element)) + len(".")
    return (key[start:],) if start < len(key) else ()  # what was saved had names with dots already


def read_nested(index: Index, names: Names, files: DataFiles) -> Any:
    """A value as it was saved, in one piece or in parts."""
    return nest({path: read_value(index, key, files) for path, key in names.items()})
