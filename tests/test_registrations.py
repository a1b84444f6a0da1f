"""Hooks of the whole process: there only while an optimizer needs them."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.modules.module import register_module_parameter_registration_hook

from sharded_radam.buckets.registrations import HookWhileUsed

pytestmark = pytest.mark.quick


class User:
    """Whoever needs the hook."""


def hooks() -> int:
    return len(nn.modules.module._global_parameter_registration_hooks)


def test_they_come_with_the_first_user_and_go_with_the_last() -> None:
    seen: list[str] = []
    before = hooks()
    hook: HookWhileUsed[User] = HookWhileUsed(
        lambda: register_module_parameter_registration_hook(lambda module, name, param: seen.append(name))
    )
    assert (hook.is_installed, list(hook), hooks()) == (False, [], before)
    for _ in range(2):
        users = [User(), User()]
        for number, user in enumerate(users):
            hook.add(user)
            assert len(list(hook)) == number + 1
            assert (hook.is_installed, hooks()) == (True, before + 1)
        nn.Module().register_parameter("here", Parameter(torch.ones(1)))
        del users[0], user
        assert (hook.is_installed, list(hook)) == (True, users)
        users.clear()
        assert (hook.is_installed, hooks()) == (False, before)
        nn.Module().register_parameter("gone", Parameter(torch.ones(1)))
    assert seen == ["here", "here"]


def test_the_last_user_is_collected_while_a_module_calls_the_hooks() -> None:
    """Torch's loop over the hooks raises if one goes meanwhile; this one goes with the next collection."""
    users = [User()]

    def drop(module: nn.Module, name: str, param: Parameter | None) -> None:
        users.clear()
        gc.collect()

    hook: HookWhileUsed[User] = HookWhileUsed(lambda: register_module_parameter_registration_hook(drop))
    hook.add(users[0])
    nn.Module().register_parameter("weight", Parameter(torch.ones(1)))
    assert not users
    assert hook.is_installed
    gc.collect()
    assert not hook.is_installed


LIFE = """
import gc
from torch import nn
from torch.nn.modules import module

def hooks():
    return len(module._global_parameter_registration_hooks), len(module._global_module_registration_hooks)

import sharded_radam
found, net = [hooks()], nn.Linear(3, 3)
for sharded in (False, True, False):
    optimizer = sharded_radam.ShardedRAdam(net.parameters(), shard_gradients=sharded)
    found.append(hooks())
    del optimizer
    gc.collect()
    found.append(hooks())
print(found)
"""


def test_import_installs_none_and_optimizers_leave_none() -> None:
    ran = subprocess.run([sys.executable, "-c", LIFE], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str([(0, 0), (1, 0), (0, 0), (1, 1), (0, 0), (1, 0), (0, 0)])
