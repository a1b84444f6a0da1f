"""Parameters that arrive while the next forward pass runs.

After a step the gathers of the buckets are still under way. A module's forward waits for the buckets of its own
parameters. Until then these Parameters have another class, whose only difference is that whatever torch does with one
of them waits first; so nobody reads a stale value.
"""

from __future__ import annotations

import atexit
import copy
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from sharded_radam.buckets.flat import Flat
from sharded_radam.transport import Handle

_AT_EXIT_S = 30.0
"""How long a process that ends waits for a rank that does not take what is sent to it."""

_waiting: dict[int, Any] = {}
"""For the id of each arriving Parameter, what waits for it and all that came with it."""


_HARMLESS = {
    getattr(getattr(Tensor, name), way)
    for name in ("grad", "requires_grad", "shape", "dtype", "device", "is_leaf", "grad_fn", "layout", "is_sparse")
    for way in ("__get__", "__set__")
    if hasattr(getattr(Tensor, name), way)
}
"""What does not read values; ``zero_grad`` between two steps must not wait."""


class ArrivingParameter(Parameter):
    """A Parameter whose values are under way."""

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
        return copy.deepcopy(self, memo)  # by now a Parameter, so the copy is one


def _wait_for_all() -> None:
    for wait in set(_waiting.values()):
        wait()


class Arrivals:
    """Handles of the gathers under way, by flat and bucket, and the parameters that wait for them."""

    def __init__(self) -> None:
        self._handles: dict[tuple[int, int], list[Handle]] = {}
        self._buckets: dict[int, list[tuple[int, int]]] = {}
        self._params: dict[int, Tensor] = {}
        self._modules: dict[nn.Module, RemovableHandle] = {}
        self._streams: list[Any] = []
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
            if module not in self._modules and any(True for _ in module.parameters(recurse=False)):
                self._modules[module] = module.register_forward_pre_hook(_Gate(self))

    def begin(self, flats: Sequence[Flat], handles: dict[tuple[int, int], list[Handle]]) -> None:
        """Take over the gathers of a step, which was called on the current stream."""
        devices = {flat.buffer.device for flat in flats if flat.buffer.is_cuda and torch.cuda.is_available()}
        self._streams = [torch.cuda.current_stream(device) for device in devices]
        self._handles = {where: some for where, some in handles.items() if some}
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for index, flat in enumerate(flats):
            for bucket in range(flat.plan.num_buckets):
                if (index, bucket) in self._handles:
                    for slot, _, _ in flat.plan.overlaps(*flat.plan.bucket_range(bucket)):
                        param = flat.params[slot]
                        found[id(param)].append((index, bucket))
                        self._params[id(param)] = param
        self._buckets = found
        for key, param in self._params.items():
            if type(param) is Parameter:
                param.__class__ = ArrivingParameter
            _waiting[key] = self.wait
        if any(map(_is_compiled, self._modules)):  # since overlap_forward() was called
            self.wait()
        self.wait_for([param for param in self._params.values() if type(param) is not ArrivingParameter])

    def wait_for(self, params: Iterable[Tensor]) -> None:
        """Return when these parameters have arrived.

        On an accelerator: have the current stream wait, and that of the step, with which other readers synchronise.
        """
        with self._lock:
            for param in params:
                for where in self._buckets.pop(id(param), ()):
                    for handle in self._handles.pop(where, ()):
                        handle.wait(*self._streams)
                self._arrived(id(param))

    def wait(self) -> None:
        """Return when all parameters have arrived."""
        self.wait_for(list(self._params.values()))

    def end(self, seconds: float) -> None:
        """The same for a process that ends, and for some seconds only; what fails is no matter."""
        with self._lock:
            for handle in (handle for some in self._handles.values() for handle in some):
                handle.end(seconds)

    def _arrived(self, key: int) -> None:
        param = self._params.pop(key, None)
        _waiting.pop(key, None)
        if type(param) is ArrivingParameter:
            param.__class__ = Parameter  # type: ignore[assignment]


@atexit.register
def _let_arrive() -> None:
    """A rank whose process ends right after a step has sent what the others wait for."""
    for arrivals in {id(wait.__self__): wait.__self__ for wait in _waiting.values()}.values():
        arrivals.end(_AT_EXIT_S)


class _Gate:
    """Forward pre-hook of a module; that of a copy of the module, or of one that was saved, has nothing to wait for."""

    def __init__(self, arrivals: Arrivals | None = None) -> None:
        self._arrivals = arrivals

    @_disable_dynamo  # imports dynamo at the first call, where torch.compiler.disable does now
    def __call__(self, module: nn.Module, *_: Any) -> None:
        if self._arrivals is not None:
            self._arrivals.wait_for(module.parameters(recurse=False))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Gate:
        return _Gate()

    def __reduce__(self) -> tuple[type[_Gate], tuple[()]]:
        return _Gate, ()


def _is_compiled(module: nn.Module) -> bool:
    """By torch.compile(module), or in place by module.compile()."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
