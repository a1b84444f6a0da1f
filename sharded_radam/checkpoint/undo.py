"""Objects of the user that are loaded into: if one of them fails on any rank, all are put back on all ranks.

They come before what cannot fail, the weights and moments, of which no copy is needed therefore.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sharded_radam.store.agreement import Agreement

logger = logging.getLogger("sharded_radam")

PutBack = Callable[[], object]

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Change(NamedTuple):
    """One object: its name, for errors; what returns a function that makes it what it is now; what loads into it."""

    what: str
    remember: Callable[[], PutBack]
    load: Callable[[], object]


def change_all(changes: Sequence[Change], agreement: Agreement) -> None:
    """Load into all objects on all ranks, or leave all as they were.

    Raises:
        CheckpointError: on every rank the same, naming the object that failed.
    """
    put_back: list[tuple[str, PutBack]] = []
    problem: Exception | None = None
    try:
        try:
            for change in changes:
                put_back.append((change.what, _try(change.what, change.remember)))  # noqa: PERF401
            for change in changes:
                _try(change.what, change.load)
        except Exception as error:
            problem = error
        agreement.decide(None, problem)
    except BaseException:
        for what, put in put_back:
            try:
                put()
            except Exception as error:
                logger.error("%s may not be what it was before the load, which failed: %r", what, error)
        raise


def _try(what: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        text = f"{what} could not be loaded, so all is as it was: {type(error).__name__}: {error}"
        raise ValueError(text) from error


def loading_into(thing: Any, what: str, state: Any) -> Change:
    """Anything with ``load_state_dict``."""
    return Change(what, lambda: remember_object(thing), lambda: thing.load_state_dict(state))


def remember_object(thing: Any) -> PutBack:
    """For anything with ``load_state_dict``: what puts its attributes back, and what its ``state_dict()`` is now."""
    attributes = dict(vars(thing)) if hasattr(thing, "__dict__") else {}
    state: Any = None
    with contextlib.suppress(Exception):  # it has none, or one that cannot be copied: then its attributes must do
        state = deepcopy(thing.state_dict())

    return lambda: _put_back(thing, attributes, thing.load_state_dict if state is not None else None, state)


def _put_back(thing: Any, attributes: Mapping[str, Any], load: Callable[[Any], object] | None, state: Any) -> None:
    """First the attributes, then what is within them, then those that loading itself counts up, say."""
    if attributes:
        reset(vars(thing), attributes)
    try:
        if load is not None:
            load(state)
    finally:
        if attributes:
            vars(thing).update({key: value for key, value in attributes.items() if isinstance(value, _PLAIN)})


def reset(live: dict[Any, Any], old: Mapping[Any, Any]) -> None:
    """Let a dict have what it had, in place."""
    live.clear()
    live.update(old)


def may_fail(model: nn.Module) -> bool:
    """Whether loading into a model runs code that is not torch's, or writes to tensors that take no values."""
    return any(map(_has_code, model.modules())) or not all(
        _is_writable(tensor) for tensor in (*model.parameters(), *model.buffers())
    )


def _has_code(module: nn.Module) -> bool:
    cls = type(module)
    return (
        cls.set_extra_state is not nn.Module.set_extra_state
        or bool(module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks)
        or not all(f.__module__.startswith("torch.") for f in (cls.load_state_dict, cls._load_from_state_dict))
    )


def _is_writable(tensor: Tensor) -> bool:
    is_repeated = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return not is_repeated and (not tensor.is_inference() or torch.is_inference_mode_enabled())


def remember_model(model: nn.Module) -> PutBack:
    """What puts a model's tensors, extra state and attributes back; it costs a copy of the tensors."""
    tensors = [(t, t.detach().clone()) for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()]
    modules = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    extra = {
        module: deepcopy(module.get_extra_state())
        for module, *_ in modules
        if type(module).set_extra_state is not nn.Module.set_extra_state
    }

    @torch.no_grad()
    def put_back() -> None:
        try:
            for module, attributes, *_ in modules:
                _put_back(module, attributes, module.set_extra_state if module in extra else None, extra.get(module))
        finally:
            for module, _, params, buffers in modules:
                reset(module._buffers, buffers)
                for name, param in params.items():
                    if module._parameters.get(name) is not param:  # so that optimizers hear of it
                        module.register_parameter(name, param)
            for tensor, copy in tensors:
                if _is_writable(tensor):
                    tensor.copy_(copy)

    return put_back
