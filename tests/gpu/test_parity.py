"""All engines and dtypes beside torch.optim.RAdam on the device, over the switch of rho; one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from sharded_radam import ShardedRAdam
from sharded_radam.dtypes import HALF_DTYPES
from tests.cases import HYPERPARAMETERS, STEPS, assert_same, missing_at
from tests.gpu.device import (
    DTYPES,
    IS_ASKED_FOR,
    assert_near,
    give_grads,
    needs_compiler,
    only_cuda,
    params_and_reference,
)
from tests.ranks import DEVICE

FORMS = [HYPERPARAMETERS[at] for at in ((0, 4, 2, 7, 13) if IS_ASKED_FOR else (0, 2))]
"""Without decay, with it, maximising; decoupled; other betas, a large eps, a large lr."""

capturable = only_cuda("RAdam's capturable=True is not for CPUs; tests/test_capturable.py has it on fake tensors")

ENGINES: list[Any] = [
    pytest.param({"foreach": True}, id="foreach"),
    pytest.param({"foreach": False}, id="for-loop"),
    pytest.param({"fused": True}, id="fused"),
    pytest.param({"compiled": True}, id="compiled", marks=[needs_compiler, pytest.mark.timeout(600)]),
    pytest.param({"capturable": True}, id="capturable", marks=capturable),
    pytest.param({"capturable": True, "fused": True}, id="capturable-fused", marks=capturable),
    pytest.param(
        {"capturable": True, "compiled": True},
        id="capturable-compiled",
        marks=[needs_compiler, capturable, pytest.mark.timeout(600)],
    ),
]


def states(optimizer: ShardedRAdam, params: list[Parameter], kind: str) -> list[Tensor]:
    found: list[Tensor] = [optimizer.state[param][kind] for param in params]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", ENGINES)
def test_every_step_is_radams(flags: dict[str, Any], dtype: torch.dtype) -> None:
    """To the bit for foreach and for-loop; half precision as fp32 training that is rounded after each step.

    CUDA's fused kernel rounds beta2 to fp32, so that early ``exp_avg_sq`` is 1.3e-5 away.
    """
    foreach = flags.get("foreach")
    for form in FORMS if "compiled" not in flags or dtype == torch.float32 else FORMS[:1]:
        ours, theirs = params_and_reference(dtype)
        sharded = ShardedRAdam(ours, bucket_cap_mb=1e-3, **flags, **form)
        radam = torch.optim.RAdam(theirs, foreach=foreach is not False, **form)
        for step in range(1, STEPS + 1):
            give_grads(ours, theirs, step, missing_at(step))
            sharded.step()
            radam.step()
            if foreach is not None:
                assert_same(ours, [param.to(dtype) for param in theirs], (form, step))
            else:
                wide = states(sharded, ours, "master") if dtype in HALF_DTYPES else ours
                assert_near(wide, theirs, 4, (form, step))
        assert {param.device.type for param in ours} == {DEVICE.type}
        if dtype in HALF_DTYPES:
            assert_same(ours, [master.to(dtype) for master in states(sharded, ours, "master")], form)
        check_moments(sharded, ours, radam, theirs, foreach is not None)


def check_moments(
    sharded: ShardedRAdam, ours: list[Parameter], radam: torch.optim.RAdam, theirs: list[Parameter], is_exact: bool
) -> None:
    for own, param in zip(ours, theirs, strict=True):
        for kind in ("exp_avg", "exp_avg_sq") if radam.state[param] else ():
            one, other = sharded.state[own][kind], radam.state[param][kind]
            if is_exact:
                assert torch.equal(one, other), kind
            else:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
