"""``.metadata`` of torch.distributed.checkpoint, written opcode by opcode: the same bytes in every Python and torch.

It is the form that every torch from 2.6 on reads. Pickling torch's own objects gives others, each release its own.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence

import torch

from sharded_radam.checkpoint.format.chunks import Extent
from sharded_radam.checkpoint.format.metadata import FILESYSTEM, MODULE, SavedTensor


def pack(
    tensors: Mapping[str, SavedTensor], objects: Mapping[str, Extent], paths: Mapping[str, tuple[str | int, ...]]
) -> bytes:
    """Return the bytes of ``.metadata``: the same for the same arguments, whatever Python and torch run this."""
    writer = _Writer()
    entries = {key: writer.instance("BytesStorageMetadata", {}) for key in objects}
    stored = [(writer.index(key, None, None), writer.extent(extent)) for key, extent in objects.items()]
    for key, tensor in tensors.items():
        chunks = [
            writer.instance(
                "ChunkStorageMetadata", {"offsets": writer.size(box.offsets), "sizes": writer.size(box.sizes)}
            )
            for box in tensor.boxes
        ]
        described = {"properties": writer.properties(tensor.dtype), "size": writer.size(tensor.shape)}
        entries[key] = writer.instance("TensorStorageMetadata", {**described, "chunks": writer.make_list(chunks)})
        for number, box in enumerate(tensor.boxes):
            stored.append((writer.index(key, box.offsets, number), writer.extent(box.extent)))
    nested = [(writer.text(key), writer.make_tuple(map(writer.key, path))) for key, path in paths.items()]
    fields = {
        "state_dict_metadata": writer.make_dict((writer.text(key), entry) for key, entry in entries.items()),
        "planner_data": writer.make_dict(nested),
        "storage_data": writer.make_dict(stored),
        "storage_meta": pickle.NONE,
    }
    return writer.finish(writer.instance("Metadata", fields))


class _Writer:
    """Values as opcodes of pickle protocol 4.

    Names of classes, texts and sizes come once, in the beginning, and then by their number. So a value has the same
    opcodes wherever it stands.
    """

    def __init__(self) -> None:
        self._beginning = [pickle.PROTO, b"\x04"]
        self._numbers: dict[str | tuple[str, str] | tuple[int, ...], bytes] = {}

    def finish(self, value: bytes) -> bytes:
        return b"".join([*self._beginning, value, pickle.STOP])

    def _numbered(self, what: str | tuple[str, str] | tuple[int, ...], opcodes: bytes) -> bytes:
        """Opcodes that get what was put into the memo under this name; ``opcodes`` make it."""
        if what not in self._numbers:
            number = len(self._numbers)
            self._beginning += [opcodes, pickle.MEMOIZE, pickle.POP]
            self._numbers[what] = (
                pickle.BINGET + bytes([number]) if number < 256 else pickle.LONG_BINGET + number.to_bytes(4, "little")
            )
        return self._numbers[what]

    def text(self, text: str) -> bytes:
        return self._numbers.get(text) or self._numbered(text, _text(text))

    def name(self, module: str, name: str) -> bytes:
        """A global: a class, function or dtype."""
        return self._numbers.get((module, name)) or self._numbered(
            (module, name), _text(module) + _text(name) + pickle.STACK_GLOBAL
        )

    def key(self, key: str | int) -> bytes:
        return self.text(key) if isinstance(key, str) else _integer(key)

    def make_tuple(self, items: Iterable[bytes]) -> bytes:
        return pickle.MARK + b"".join(items) + pickle.TUPLE

    def make_list(self, items: Iterable[bytes]) -> bytes:
        return pickle.EMPTY_LIST + pickle.MARK + b"".join(items) + pickle.APPENDS

    def make_dict(self, items: Iterable[tuple[bytes, bytes]]) -> bytes:
        return pickle.EMPTY_DICT + pickle.MARK + b"".join(key + value for key, value in items) + pickle.SETITEMS

    def call(self, function: bytes, *args: bytes) -> bytes:
        return function + self.make_tuple(args) + pickle.REDUCE

    def instance(self, name: str, fields: Mapping[str, bytes], module: str = MODULE) -> bytes:
        """An object made without its constructor, with these attributes."""
        state = self.make_dict((self.text(field), value) for field, value in fields.items())
        return self.name(module, name) + pickle.EMPTY_TUPLE + pickle.NEWOBJ + state + pickle.BUILD

    def size(self, numbers: Sequence[int]) -> bytes:
        key = tuple(numbers)
        return self._numbers.get(key) or self._numbered(
            key, self.call(self.name("torch", "Size"), self.make_tuple(map(_integer, numbers)))
        )

    def extent(self, extent: Extent) -> bytes:
        fields = {"offset": _integer(extent.start), "length": _integer(extent.length)}
        return self.instance("_StorageInfo", {"relative_path": self.text(extent.file), **fields}, FILESYSTEM)

    def index(self, key: str, offsets: Sequence[int] | None, number: int | None) -> bytes:
        return self.instance(
            "MetadataIndex",
            {
                "fqn": self.text(key),
                "offset": pickle.NONE if offsets is None else self.size(offsets),
                "index": pickle.NONE if number is None else _integer(number),
            },
        )

    def properties(self, dtype: torch.dtype) -> bytes:
        """dtype, layout, requires_grad, memory format, pin_memory: torch 2.15 reads these five, and adds a sixth."""
        state = self.make_tuple(
            [
                self.name("torch", str(dtype).removeprefix("torch.")),
                self.call(self.name("torch.serialization", "_get_layout"), self.text("torch.strided")),
                pickle.NEWFALSE,
                self.call(self.name(MODULE, "_MEM_FORMAT_ENCODING"), _integer(0)),
                pickle.NEWFALSE,
            ]
        )
        made = self.name(MODULE, "TensorProperties") + pickle.EMPTY_TUPLE + pickle.NEWOBJ
        return made + state + pickle.BUILD


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    if len(encoded) < 256:
        return pickle.SHORT_BINUNICODE + bytes([len(encoded)]) + encoded
    return pickle.BINUNICODE + len(encoded).to_bytes(4, "little") + encoded


def _integer(number: int) -> bytes:
    if 0 <= number < 256:
        return pickle.BININT1 + bytes([number])
    if -(2**31) <= number < 2**31:
        return pickle.BININT + number.to_bytes(4, "little", signed=True)
    encoded = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded
