"""Parameters in whose place a module has another Parameter by now: the optimizer would train what nobody uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.modules.module import register_module_parameter_registration_hook

from sharded_radam.buckets.registrations import HookWhileUsed


class Replaced:
    """Of some parameters, those that were replaced.

    ``by`` has, for each of them, the place and the new Parameter, such as ``("Linear.weight", ...)``.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = frozenset(params)
        self.by: dict[Tensor, tuple[str, Tensor]] = {}
        _all.add(self)

    def take(self, old: Iterable[Replaced]) -> None:
        """Know what is known of these parameters elsewhere."""
        for each in old:
            self.by |= {param: new for param, new in each.by.items() if param in self._params}

    def note(self, module: Module, name: str, param: Parameter | None) -> None:
        """A module is about to have ``param`` under a name."""
        if param is None:
            return
        self.by.pop(param, None)
        before = module._parameters.get(name)
        if before is not None and before is not param and before in self._params:
            self.by[before] = f"{type(module).__name__}.{name}", param


def _on_registration(module: Module, name: str, param: Parameter | None) -> None:
    for each in _all:
        each.note(module, name, param)


# The only sign torch gives of `load_state_dict(assign=True)` or `module.weight = Parameter(...)`: the old Parameter,
# which is all that an optimizer sees, stays what it was.
_all: HookWhileUsed[Replaced] = HookWhileUsed(lambda: register_module_parameter_registration_hook(_on_registration))
