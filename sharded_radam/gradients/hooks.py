"""Hooks of autograd that say when a gradient has come, and the guard against DistributedDataParallel."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from sharded_radam.buckets.registrations import HookWhileUsed
from sharded_radam.gradients.schedule import SlotKey


class Owner(Protocol):
    """Whoever takes gradients when they come."""

    def params(self) -> Iterable[tuple[SlotKey, Tensor]]:
        """All parameters."""

    def arrive(self, key: SlotKey) -> None:
        """Note that backward has accumulated the gradient of one."""


def _nobody() -> None:
    return None


@dataclass(slots=True)
class _Hook:
    """The hook of a parameter, and whose it is; an owner that takes it over changes this object."""

    handle: RemovableHandle | None = None
    owner: Callable[[], Owner | None] = _nobody


_hook_of: Any = WeakIdKeyDictionary()


class Hooks:
    """The hooks of an owner's parameters; several may have a parameter, and one of them its hook.

    Args:
        owner: gets the gradients; hooks do not keep it alive.
    """

    def __init__(self, owner: Owner) -> None:
        self._owner = weakref.ref(owner)
        self._hooks: dict[SlotKey, _Hook] = {}
        _owners.add(owner)

    def listen(self, params: Iterable[tuple[SlotKey, Tensor]], take_over: bool) -> None:
        """Have hooks of all parameters that require gradients now.

        Args:
            params: of the owner.
            take_over: take those of others too.
        """
        for key, param in params:
            known = self._hooks.get(key)
            if param.requires_grad and (known is None or known.owner is not self._owner):
                self._hooks[key] = self._listen_to(key, param, take_over)

    def _listen_to(self, key: SlotKey, param: Tensor, take_over: bool) -> _Hook:
        hook: _Hook | None = _hook_of.get(param)
        if hook is None:
            hook = _hook_of[param] = _Hook()
        if take_over or hook.owner() is None:
            if hook.handle is not None:
                hook.handle.remove()
            hook.handle = param.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                functools.partial(_on_gradient, self._owner, key)
            )
            hook.owner = self._owner
        return hook

    def of_others(self) -> list[SlotKey]:
        """Whose gradients go to another owner."""
        return [
            key
            for key, hook in self._hooks.items()
            if hook.owner is not self._owner and hook.owner() not in (self._owner(), None)
        ]

    def leave(self) -> None:
        """Remove the own hooks, also of parameters that stay: their keys will be others, and some are frozen now."""
        for hook in self._hooks.values():
            if hook.owner is self._owner and hook.handle is not None:
                hook.handle.remove()
                hook.owner, hook.handle = _nobody, None
        self._hooks.clear()


def _on_gradient(owner: weakref.ref[Owner], key: SlotKey, _param: Tensor) -> None:
    alive = owner()
    if alive is not None:
        alive.arrive(key)


# Models that are wrapped


_wrapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_not_wrapped(params: Sequence[Tensor]) -> None:
    """Raise ValueError if DistributedDataParallel averages the gradients of these parameters."""
    if not _owners.is_installed:  # nobody has seen what was wrapped
        _wrapped.update(each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel))
    for module in _wrapped:
        _check_disjoint(module, params)


def _check_disjoint(module: nn.Module, params: Sequence[Tensor]) -> None:
    ours = {id(param) for param in params}
    if any(id(param) in ours for param in module.parameters()):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel, which averages gradients, and shard_gradients=True does "
            "so too: pass the parameters of the model itself and do not wrap it, or leave shard_gradients away"
        )


def _on_module(module: nn.Module, _name: str, child: nn.Module | None) -> None:
    if isinstance(module, DistributedDataParallel) and child is not None:
        _wrapped.add(module)
        for owner in _owners:
            _check_disjoint(child, [param for _, param in owner.params()])


_owners: HookWhileUsed[Owner] = HookWhileUsed(lambda: register_module_module_registration_hook(_on_module))
