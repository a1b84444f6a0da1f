"""Reading a pickle as data: nothing that it names is imported or called, and nothing is hashed or copied.

Python's unpickler calls what a file gives it, sets attributes of what it has found, and hashes keys that may be nested
a million deep; a ``find_class`` of one's own changes little of that. :func:`parse` follows the opcodes that protocols 2
to 5 have for plain objects. It builds a tree of :class:`Name`, :class:`Instance`, :class:`Pairs`, scalars, tuples and
lists, in time and memory that are proportional to the bytes.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any

from sharded_radam.checkpoint.format.errors import DamagedError, ForbiddenError

_LONGEST_NAME = 200
"""Characters of a class's, with its module."""

_UINT32, _INT32 = struct.Struct("<I"), struct.Struct("<i")
_BINGET, _LONG_BINGET, _MARK, _EMPTY_DICT = (ord(o) for o in (b"h", b"j", b"(", b"}"))
_BININT1, _BININT, _EMPTY_TUPLE, _BINPUT, _STOP = (ord(o) for o in (b"K", b"J", b")", b"q", b"."))


class Name(str):
    """The full name of a class, function or dtype: ``"torch.float32"``."""

    __slots__ = ()


class Instance:
    """What a call of ``name`` with ``args`` makes, and the state that it is given then."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: Name, args: Any) -> None:
        self.name = name
        self.args = args
        self.state: Any = None


PERSISTENT = Name("persistent")
"""The name of an instance that is kept outside of the pickle; its argument says where."""


class Pairs(list[tuple[Any, Any]]):
    """Keys and values of a dict."""

    __slots__ = ()


class Ordered(Pairs):
    """Those of a ``collections.OrderedDict``, and its attributes."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None


def ordered_dict() -> Pairs:
    """Stand for ``collections.OrderedDict()``. With arguments, which would be copied, it is not what torch pickles."""
    return Pairs()


class _Stack:
    """What the opcodes work on: values, the marks among them, and the memo."""

    def __init__(
        self, content: bytes, check: Callable[[str], object], functions: Mapping[str, Callable[..., Any]]
    ) -> None:
        self.content = content
        self.check = check
        self.functions = functions
        self.at = 0
        self.values: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def take(self, length: int) -> bytes:
        part = self.content[self.at : self.at + length]
        if len(part) != length:
            raise ValueError("it ends too early")
        self.at += length
        return part

    def line(self) -> str:
        end = self.content.index(b"\n", self.at)
        part = self.content[self.at : end]
        self.at = end + 1
        return part.decode()

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "little")

    def run(self) -> Any:  # noqa: C901
        """Follow the opcodes to the end. The most frequent ones are here, since calls take half of the time."""
        content, values, marks, memo = self.content, self.values, self.marks, self.memo
        while True:
            opcode = content[self.at]
            self.at += 1
            if opcode == _BINGET:
                values.append(memo[content[self.at]])
                self.at += 1
            elif opcode == _LONG_BINGET:
                values.append(memo[_UINT32.unpack_from(content, self.at)[0]])
                self.at += 4
            elif opcode == _MARK:
                marks.append(len(values))
            elif opcode == _EMPTY_DICT:
                values.append(Pairs())
            elif opcode == _BININT1:
                values.append(content[self.at])
                self.at += 1
            elif opcode == _BININT:
                values.append(_INT32.unpack_from(content, self.at)[0])
                self.at += 4
            elif opcode == _EMPTY_TUPLE:
                values.append(())
            elif opcode == _BINPUT:
                memo[content[self.at]] = values[-1]
                self.at += 1
            elif opcode == _STOP:
                return values.pop()
            else:
                _OPCODES[opcode](self)

    def text(self, length: int) -> None:
        self.values.append(self.take(length).decode("utf-8", "surrogatepass"))

    def marked(self) -> list[Any]:
        """Take all values after the last mark."""
        first = self.marks.pop()
        taken = self.values[first:]
        del self.values[first:]
        return taken

    def tuple(self, length: int) -> None:
        first = len(self.values) - length
        if first < 0:
            raise IndexError("a tuple of more values than there are")
        self.values[first:] = [tuple(self.values[first:])]

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError("a name that is no text")
        if len(module) + len(name) > _LONGEST_NAME:
            raise ValueError("a name that is too long")
        full = Name(f"{module}.{name}")
        self.check(full)
        self.values.append(full)

    def call(self) -> None:
        args = self.values.pop()
        name = self.values.pop()
        if type(name) is not Name or type(args) is not tuple:
            raise TypeError("a call of something that is no name")
        function = self.functions.get(name)
        self.values.append(function(*args) if function else Instance(name, args))

    def build(self) -> None:
        state = self.values.pop()
        if type(self.values[-1]) not in (Instance, Ordered) or self.values[-1].state is not None:
            raise TypeError("a state for something that has none")
        self.values[-1].state = state

    def add(self, kind: type[list[Any]], items: list[Any]) -> None:
        if type(self.values[-1]) is not kind and not (kind is Pairs and type(self.values[-1]) is Ordered):
            raise TypeError(f"items for something that is no {kind.__name__}")
        self.values[-1].extend(zip(items[::2], items[1::2], strict=True) if kind is Pairs else items)

    def two(self) -> list[Any]:
        value, key = self.values.pop(), self.values.pop()
        return [key, value]

    def long(self) -> None:
        self.values.append(int.from_bytes(self.take(self.number(1)), "little", signed=True))

    def remember(self, number: int) -> None:
        self.memo[number] = self.values[-1]

    def persistent(self) -> None:
        self.values.append(Instance(PERSISTENT, (self.values.pop(),)))


def _pushes(value: Any) -> Callable[[_Stack], None]:
    return lambda stack: stack.values.append(value)


_OPCODES: dict[int, Callable[[_Stack], Any]] = {
    ord(opcode): action
    for opcode, action in {
        pickle.PROTO: lambda s: s.take(1),
        pickle.FRAME: lambda s: s.take(8),
        pickle.POP: lambda s: s.values.pop(),
        pickle.NONE: _pushes(None),
        pickle.NEWTRUE: _pushes(True),
        pickle.NEWFALSE: _pushes(False),
        pickle.BININT2: lambda s: s.values.append(s.number(2)),
        pickle.LONG1: _Stack.long,
        pickle.BINFLOAT: lambda s: s.values.append(struct.unpack(">d", s.take(8))[0]),
        pickle.SHORT_BINUNICODE: lambda s: s.text(s.number(1)),
        pickle.BINUNICODE: lambda s: s.text(s.number(4)),
        pickle.BINUNICODE8: lambda s: s.text(s.number(8)),
        pickle.TUPLE1: lambda s: s.tuple(1),
        pickle.TUPLE2: lambda s: s.tuple(2),
        pickle.TUPLE3: lambda s: s.tuple(3),
        pickle.TUPLE: lambda s: s.values.append(tuple(s.marked())),
        pickle.EMPTY_LIST: lambda s: s.values.append([]),
        pickle.APPEND: lambda s: s.add(list, [s.values.pop()]),
        pickle.APPENDS: lambda s: s.add(list, s.marked()),
        pickle.SETITEM: lambda s: s.add(Pairs, s.two()),
        pickle.SETITEMS: lambda s: s.add(Pairs, s.marked()),
        pickle.GLOBAL: lambda s: s.name(s.line(), s.line()),
        pickle.STACK_GLOBAL: lambda s: s.name(*s.two()),
        pickle.REDUCE: _Stack.call,
        pickle.NEWOBJ: _Stack.call,
        pickle.BUILD: _Stack.build,
        pickle.LONG_BINPUT: lambda s: s.remember(s.number(4)),
        pickle.MEMOIZE: lambda s: s.remember(len(s.memo)),
        pickle.BINPERSID: _Stack.persistent,
    }.items()
}


def parse(content: bytes, check: Callable[[str], object], functions: Mapping[str, Callable[..., Any]]) -> Any:
    """Return the object in a pickle, as data.

    Args:
        content: the bytes.
        check: raises ForbiddenError for a name that the pickle may not have.
        functions: ours, which make the value of a call of these names; what they raise is damage.

    Raises:
        ForbiddenError: a name that is not allowed.
        DamagedError: it is no pickle, or has opcodes that no plain object needs.
    """
    stack = _Stack(content, check, functions)
    try:
        return stack.run()
    except ForbiddenError:
        raise
    except (LookupError, TypeError, ValueError, struct.error) as error:
        raise DamagedError(f"it cannot be read: byte {stack.at}: {type(error).__name__}: {error}") from error
