"""Parameters that arrive while the next forward pass runs.

After a step the gathers of the buckets are still under way. A module's forward waits for the buckets of its own
parameters. Until then these Parameters have another class, whose only difference is that whatever torch does with one
of them waits first; so nobody reads a stale value.

On a CPU, who has waited has done so for everybody. On a device with streams only the current stream waits, so the
Parameters keep their class until the next step, but for the forward of their module: each stream that reads them waits,
once.
"""

from __future__ import annotations

import atexit
import copy
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import Parameter

from sharded_radam import streams
from sharded_radam.buckets.flat import Flat
from sharded_radam.transport import Handle

_AT_EXIT_S = 30.0
"""How long a process that ends waits for a rank that does not take what is sent to it."""

_under_way: weakref.WeakValueDictionary[int, Arrivals] = weakref.WeakValueDictionary()
"""Whose parameters somebody may still have to wait for."""

_unread: set[Arrivals] = set()
"""Those of them for all of whose parameters nobody has waited; without owners too, they must arrive."""


_grad: Any = Tensor.grad

_HARMLESS = {
    getattr(getattr(Tensor, name), way)
    for name in ("grad", "requires_grad", "shape", "dtype", "device", "is_leaf", "grad_fn", "layout", "is_sparse")
    for way in ("__get__", "__set__")
    if hasattr(getattr(Tensor, name), way)
}
"""What does not read values; ``zero_grad`` between two steps must not wait."""


class ArrivingParameter(Parameter):
    """A Parameter whose values are under way."""

    @property
    def grad(self) -> Tensor | None:
        """The gradient; ``__torch_function__`` takes three times as long for it, and backward and steps often ask."""
        with torch._C.DisableTorchFunctionSubclass():
            return _grad.__get__(self)  # type: ignore[no-any-return]

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            _grad.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            _grad.__delete__(self)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        _wait_for_all()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        _wait_for_all()
        with _as_parameter(self):  # so the copy is one
            return copy.deepcopy(self, memo)


@contextmanager
def _as_parameter(param: Tensor) -> Iterator[None]:
    before: Any = type(param)
    param.__class__ = Parameter
    try:
        yield
    finally:
        param.__class__ = before


def _wait_for_all() -> None:
    for reference in _under_way.valuerefs():
        arrivals = reference()
        if arrivals is not None:
            arrivals.wait()


class Arrivals:
    """Handles of the gathers under way, by flat and bucket, and the parameters that wait for them."""

    def __init__(self) -> None:
        self._handles: dict[tuple[int, int], list[Handle]] = {}
        self._num_buckets = 0
        self._is_in_graph = False  # whether a graph reads parameters
        self._buckets: dict[int, list[tuple[int, int]]] = {}
        self._params: dict[int, Tensor] = {}
        self._device: torch.device | None = None  # with streams
        self._waited: dict[Any, set[tuple[int, int]]] = defaultdict(set)  # by stream
        self._modules: dict[nn.Module, None] = {}
        self._lock = threading.RLock()

    def hook(self, model: nn.Module) -> None:
        """Let the forward of each module wait for its own parameters.

        Raises:
            ValueError: a module is compiled: it takes its parameters without asking.
        """
        for name, module in model.named_modules():
            if _is_compiled(module):
                where = f"its module '{name}'" if name else "it"
                raise ValueError(
                    f"overlap_forward() is not for compiled models, and {where} is: compiled code takes parameters "
                    "without asking whether they have arrived. Leave it away"
                )
        for module in model.modules():
            if module not in self._modules:
                self._modules[module] = None
                devices = {param.device for param in module.parameters(recurse=False)}
                if devices:
                    module.register_forward_pre_hook(_Gate(self))
                if any(map(streams.has_streams, devices)):
                    module.register_forward_hook(_Gate(self, is_exit=True), always_call=True)

    def begin(self, flats: Sequence[Flat], handles: dict[tuple[int, int], list[Handle]]) -> None:
        """Take over the gathers of a step; those before have ended."""
        self._device = next((flat.buffer.device for flat in flats if streams.has_streams(flat.buffer.device)), None)
        is_compiled = any(map(_is_compiled, self._modules))  # since overlap_forward() was called
        if is_compiled or self._is_in_graph or self._is_captured():  # nobody asks when the graph runs
            for handle in (handle for some in handles.values() for handle in some):
                handle.wait()
            return
        self._handles = {where: some for where, some in handles.items() if some}
        self._num_buckets = len(self._handles)
        self._waited.clear()
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for index, flat in enumerate(flats):
            for bucket in range(flat.plan.num_buckets):
                if (index, bucket) in self._handles:
                    for slot, _, _ in flat.plan.overlaps(*flat.plan.bucket_range(bucket)):
                        param = flat.params[slot]
                        found[id(param)].append((index, bucket))
                        self._params[id(param)] = param
        self._buckets = found
        if self._handles:
            _under_way[id(self)] = self
            _unread.add(self)
        for param in self._params.values():
            if type(param) is Parameter:
                param.__class__ = ArrivingParameter
        self.wait_for([param for param in self._params.values() if type(param) is not ArrivingParameter])

    def wait_for(self, params: Iterable[Tensor]) -> None:
        """Return when these parameters have arrived.

        On a device with streams: when kernels that are launched on the current one may read them.
        """
        if self._is_captured():
            self._is_in_graph = True
            return
        with self._lock:
            waited = self._waited[self._stream()]
            for param in params:
                for where in self._buckets.get(id(param), ()):
                    if where not in waited:
                        self._wait_for_bucket(where)
                        waited.add(where)
                if self._device is None:
                    self._forget(id(param))
            if len(waited) == self._num_buckets:
                _unread.discard(self)

    def _wait_for_bucket(self, where: tuple[int, int]) -> None:
        if self._device is None:
            for handle in self._handles.pop(where, ()):
                handle.wait()
        else:
            for handle in self._handles[where]:
                handle.wait(is_last=False)

    def _stream(self) -> Any:
        return None if self._device is None else torch.cuda.current_stream(self._device)

    def _is_captured(self) -> bool:
        """Whether the current stream is; what was launched before has ended then, and must not be waited for."""
        return self._device is not None and streams.is_captured(self._stream())

    def open(self, params: Sequence[Tensor]) -> None:
        """Return when a module may read its parameters: they have arrived, and ask nothing."""
        self.wait_for(params)
        for param in params:
            if type(param) is ArrivingParameter:
                param.__class__ = Parameter  # type: ignore[assignment]

    def close(self, params: Sequence[Tensor]) -> None:
        """Let whoever else reads a module's parameters wait again."""
        with self._lock:
            for param in params:
                if id(param) in self._params and type(param) is Parameter:
                    param.__class__ = ArrivingParameter

    def wait(self) -> None:
        """The same for all parameters."""
        if self._device is None or len(self._waited[self._stream()]) < self._num_buckets:
            self.wait_for(list(self._params.values()))

    def end(self) -> None:
        """The same, and have nobody else wait: the parameters are about to be written, or to move."""
        self.wait()
        with self._lock:
            for handles in self._handles.values():
                for handle in handles:
                    handle.forget()
            for state in (self._handles, self._buckets, self._waited):
                state.clear()
            self._num_buckets = 0
            _unread.discard(self)
            for key in list(self._params):
                self._forget(key)

    def leave(self, seconds: float) -> None:
        """Wait as a process that ends, and for some seconds only; what fails is no matter."""
        with self._lock:
            for handle in (handle for some in self._handles.values() for handle in some):
                handle.end(seconds)

    def _forget(self, key: int) -> None:
        """Have nobody wait for a parameter any more."""
        param = self._params.pop(key, None)
        if type(param) is ArrivingParameter:
            param.__class__ = Parameter  # type: ignore[assignment]
        if not self._params:
            _under_way.pop(id(self), None)


@atexit.register
def _let_arrive() -> None:
    """A rank whose process ends right after a step has sent what the others wait for."""
    for arrivals in list(_unread):
        arrivals.leave(_AT_EXIT_S)


class _Gate:
    """Hook of a module's forward; that of a copy of the module, or of one that was saved, has nothing to wait for.

    Args:
        arrivals: what it waits for.
        is_exit: whether it is called after the forward, and not before.
    """

    def __init__(self, arrivals: Arrivals | None = None, is_exit: bool = False) -> None:
        self._arrivals = arrivals
        self._is_exit = is_exit

    @_disable_dynamo  # imports dynamo at the first call, where torch.compiler.disable does now
    def __call__(self, module: nn.Module, *_: Any) -> None:
        if self._arrivals is not None:
            params = list(module.parameters(recurse=False))
            (self._arrivals.close if self._is_exit else self._arrivals.open)(params)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Gate:
        return _Gate()

    def __reduce__(self) -> tuple[type[_Gate], tuple[()]]:
        return _Gate, ()


def _is_compiled(module: nn.Module) -> bool:
    """By torch.compile(module), or in place by module.compile()."""
    return "_orig_mod" in module._modules or module.__dict__.get("_compiled_call_impl") is not None
