"""Reading pickles whose names resolve to classes of ours, which nothing in the pickle can change."""

from __future__ import annotations

from typing import Any


class ForbiddenError(ValueError):
    """A pickle asks for something that a checkpoint does not need."""


class Closed(type):
    """The type of all classes that a name in a pickle resolves to: no attribute of them can be set.

    A pickle's BUILD opcode sets attributes of whatever object it comes after, classes and functions included. What it
    sets on a class lasts for the whole process, so no name may resolve to an open class, or to a function.
    """

    def __setattr__(cls, name: str, value: Any) -> None:
        raise ForbiddenError(f"the pickle sets the attribute {name!r} of a class, which no checkpoint needs")


class Record(metaclass=Closed):
    """An object as the pickle describes it: the arguments and the state of its class, which is not run."""

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Any:
        """Keep the arguments. A subclass that is called like a function returns something else."""
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:
        """Keep the state, which BUILD would otherwise make attributes of."""
        self.state = state


class ClosedDict(dict[Any, Any], metaclass=Closed):
    """Stands for collections.OrderedDict."""

    __slots__ = ()


class ClosedTuple(tuple[Any, ...], metaclass=Closed):
    """Stands for torch.Size."""

    __slots__ = ()
