"""State dicts: from and to RAdam and ZeroRedundancyOptimizer, at any world size."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import Parameter

from sharded_radam import ShardedRAdam
from sharded_radam.buckets.range_tensor import RangeTensor
from sharded_radam.state.dicts import plain_name
from tests.buckets.test_flat import Allocations
from tests.cases import assert_same, make_params, missing_at, quietly, set_grads
from tests.ranks import WORLD_SIZES, run

pytestmark = pytest.mark.quick

SAVED_AT, END = 8, 14


def train(optimizer: torch.optim.Optimizer, params: list[Parameter], first: int, last: int) -> None:
    for step in range(first, last + 1):
        set_grads(params, step, missing_at(step))
        optimizer.step()


def make(
    world_cap: float = 1e-3, dtype: torch.dtype = torch.float32, **flags: Any
) -> tuple[ShardedRAdam, list[Parameter]]:
    params = make_params(dtype)
    groups: list[dict[str, Any]] = [{"params": params[:3]}, {"params": params[3:], "lr": 0.01, "weight_decay": 0.1}]
    return ShardedRAdam(groups, bucket_cap_mb=world_cap, **flags), params


def save(rank: int, world_size: int, folder: str, dtype: str, flags: dict[str, Any]) -> None:
    """Train, consolidate on the last rank, and write what a user would write."""
    optimizer, params = make(dtype=getattr(torch, dtype), **flags)
    train(optimizer, params, 1, SAVED_AT)
    to = world_size - 1
    consolidated = optimizer.consolidate_state_dict(to=to)
    assert (consolidated is None) == (rank != to)
    if rank == to:
        for _ in range(2):  # as the second call of ZeroRedundancyOptimizer
            assert_equal_dicts(optimizer.state_dict(), consolidated)
        torch.save({"optim": consolidated, "params": [p.detach().clone() for p in params]}, f"{folder}/{world_size}.pt")
    train(optimizer, params, SAVED_AT + 1, END)
    if rank == 0:
        torch.save([param.detach().clone() for param in params], f"{folder}/{world_size}.end.pt")


def load(_rank: int, _world_size: int, file: str, end: list[Tensor], dtype: str, flags: dict[str, Any]) -> None:
    """Load a file into new optimizers with other buckets, and train on to the same bits."""
    saved = torch.load(file, weights_only=True)
    for cap, as_views in ((25.0, True), (2e-3, False)):
        optimizer, params = make(cap, getattr(torch, dtype), parameters_as_bucket_view=as_views, **flags)
        train(optimizer, params, 1, 2)  # state to be replaced
        with torch.no_grad():
            for param, value in zip(params, saved["params"], strict=True):
                param.copy_(value)
        before = copy.deepcopy(saved["optim"])
        optimizer.load_state_dict(saved["optim"])
        assert_equal_dicts(saved["optim"], before)
        train(optimizer, params, SAVED_AT + 1, END)
        assert_same(params, end, file)


def assert_equal_dicts(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal_dicts(one[key], other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_equal_dicts(a, b)
    else:
        assert one == other


@pytest.mark.parametrize(
    ("dtype", "flags"),
    [("float32", {"foreach": True}), ("bfloat16", {}), ("complex64", {})],
    ids=["float32-foreach", "bfloat16-fused", "complex64-fused"],
)
def test_saved_at_any_and_loaded_at_any_world_size(tmp_path: Path, dtype: str, flags: dict[str, Any]) -> None:
    for world_size in WORLD_SIZES:
        run(save, world_size, str(tmp_path), dtype, flags)
    end = torch.load(tmp_path / "1.end.pt", weights_only=True)
    for saved_at in WORLD_SIZES:
        for world_size in WORLD_SIZES:
            run(load, world_size, str(tmp_path / f"{saved_at}.pt"), end, dtype, flags)
    if dtype == "float32":
        load_into_radam(tmp_path, end)


def load_into_radam(folder: Path, end: list[Tensor]) -> None:
    for world_size in WORLD_SIZES:
        saved = torch.load(folder / f"{world_size}.pt", weights_only=True)
        params = make_params()
        radam = torch.optim.RAdam([{"params": params[:3]}, {"params": params[3:]}], foreach=True)
        for param, value in zip(params, saved["params"], strict=True):
            param.data.copy_(value)
        radam.load_state_dict(saved["optim"])
        train(radam, params, SAVED_AT + 1, END)
        assert_same(params, end)


def check_from_peers(rank: int, world_size: int) -> None:
    """What RAdam and ZeroRedundancyOptimizer(RAdam) saved, and ours to them, bit-equal afterwards."""
    theirs = make_params()
    zero = ZeroRedundancyOptimizer(theirs, torch.optim.RAdam, foreach=True, weight_decay=0.1)
    for step in range(1, SAVED_AT + 1):
        set_grads(theirs, step)
        zero.step()
    zero.consolidate_state_dict(to=0)
    box = [zero.state_dict() if rank == 0 else None, [param.detach().clone() for param in theirs]]
    dist.broadcast_object_list(box, src=0)
    saved, values = box
    assert saved is not None
    ours = make_params()
    sharded = ShardedRAdam(ours, foreach=True, bucket_cap_mb=1e-3)
    sharded.load_state_dict(saved)  # type: ignore[arg-type]
    assert isinstance(values, list)
    for param, value in zip(ours, values, strict=True):
        param.data.copy_(value)
    for step in range(SAVED_AT + 1, END + 1):
        for optimizer, params in ((zero, theirs), (sharded, ours)):
            set_grads(params, step)
            optimizer.step()
    assert_same(ours, theirs)
    back = [sharded.consolidate_state_dict(to=0)]
    dist.broadcast_object_list(back, src=0)
    assert back[0] is not None
    ZeroRedundancyOptimizer(make_params(), torch.optim.RAdam, foreach=True).load_state_dict(back[0])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_from_and_to_zero_redundancy_optimizer(world_size: int) -> None:
    run(check_from_peers, world_size)


def check_local(rank: int, world_size: int) -> None:
    optimizer, params = make(foreach=True)
    train(optimizer, params, 1, 7)
    if rank == 0:  # not collective: one rank alone may call it
        optimizer.sharded_state_dict()
    local = optimizer.sharded_state_dict()
    kinds = {type(state["exp_avg"]) for state in local["state"].values()}
    assert kinds == {RangeTensor if world_size > 1 else Tensor}
    shapes = [state["exp_avg"].shape for state in local["state"].values()]
    assert shapes == [param.shape for param in params]
    assert local.keys() == {"state", "param_groups"}
    numel = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    assert numel <= -(-sum(p.numel() for p in params) // world_size) + 64 * (len(params) + world_size)
    snapshot = copy.deepcopy(local)
    end = [param.detach().clone() for param in params]
    train(optimizer, params, 8, 10)
    wanted = [param.detach().clone() for param in params]
    with torch.no_grad():
        for param, value in zip(params, end, strict=True):
            param.copy_(value)
    optimizer.load_state_dict(snapshot)
    train(optimizer, params, 8, 10)
    assert_same(params, wanted)
    if world_size == 1:
        return
    for write in (lambda: torch.save({"optim": local}, io.BytesIO()), lambda: pickle.dumps(local)):
        with pytest.raises(RuntimeError, match=r"consolidate_state_dict\(to=0\) on all ranks"):
            write()
    with pytest.raises(RuntimeError, match=r"cannot be pickled: save what consolidate_state_dict"):
        pickle.dumps(optimizer)
    other, _ = make(25.0)
    with pytest.raises(ValueError, match=r"has the elements .*, and this rank owns"):
        other.load_state_dict(local)
    with pytest.raises(ValueError, match=f"to={world_size}: expected a rank of the group, 0 to {world_size - 1}"):
        optimizer.consolidate_state_dict(to=world_size)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_local_state_dict(world_size: int) -> None:
    run(check_local, world_size)


def check_deepcopy(_rank: int, _world_size: int) -> None:
    optimizer, params = make(foreach=True)
    train(optimizer, params, 1, 7)
    copied, copied_params = copy.deepcopy((optimizer, params))
    train(optimizer, params, 8, 12)
    train(copied, copied_params, 8, 12)
    assert_same(params, copied_params)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(params, copied_params, strict=True) if a.numel())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_deepcopy_at_any_world_size(world_size: int) -> None:
    run(check_deepcopy, world_size)


def check_memory(rank: int, world_size: int) -> None:
    """Beyond the result the target allocates one bucket, the others nothing; nothing stays."""
    params = [Parameter(torch.zeros(500_000)), Parameter(torch.zeros(300, 1000))]
    optimizer = ShardedRAdam(params, bucket_cap_mb=0.5)
    bucket_bytes = max(flat.plan.bucket_numel for flat in optimizer._shards.flats) * 4
    with Sum() as created:
        optimizer.consolidate_state_dict(to=0)
    result = 2 * 4 * 800_000 if rank == 0 else 0
    assert created.total <= result + (bucket_bytes if rank == 0 else 0) + 4096
    train(optimizer, params, 1, 1)
    assert optimizer._shards.consolidated is None


def check_forgotten(rank: int, world_size: int, folder: str) -> None:
    """The error of a save without consolidation comes before a file is opened; a dict stays until the next step."""
    optimizer, params = make(foreach=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    file = Path(folder, f"{world_size}.{rank}.pt")
    torch.save("what was there", file)
    before = file.read_bytes()
    calls: list[int] = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append(1))

    def check_refused() -> None:
        with pytest.raises(RuntimeError, match=r"only this rank's part .* Expected one of: consolidate_state_dict"):
            torch.save({"optimizer": optimizer.state_dict()}, file)
        assert file.read_bytes() == before
        assert not calls

    train(optimizer, params, 1, 3)
    check_refused()
    to = world_size - 1
    whole = copy.deepcopy(optimizer.consolidate_state_dict(to=to))
    scheduler.step()
    if rank != to:
        check_refused()
    else:
        assert whole is not None
        for _ in range(3):
            saved = optimizer.state_dict()
            assert_equal_dicts(saved["state"], whole["state"])
            assert [group["lr"] for group in saved["param_groups"]] == [0.0005, 0.005]
            saved["state"][0].clear()  # a copy; the tensors are the same ones
        calls.clear()
    lets_go: list[Callable[[], object]] = [
        lambda: train(optimizer, params, 4, 4),
        lambda: optimizer.load_state_dict(optimizer.sharded_state_dict()),
        lambda: optimizer.add_param_group({"params": [Parameter(torch.ones(3))]}),
    ]
    for action in lets_go:
        optimizer.consolidate_state_dict(to=to)
        action()
        calls.clear()
        check_refused()
    for harmless in (copy.deepcopy, repr, lambda it: it.stats()):
        harmless(optimizer)


@pytest.mark.parametrize("world_size", [size for size in (2, 3, 4) if size in WORLD_SIZES])
def test_a_forgotten_consolidation_costs_no_file(tmp_path: Path, world_size: int) -> None:
    run(check_forgotten, world_size, str(tmp_path))


class Wrapper(torch.optim.Optimizer):
    """As those of other libraries: forwards."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)


class Application:
    """A Stateful that has the optimizer and more."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": Wrapper(self.optimizer).state_dict(), "epoch": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict["optimizer"])


def check_asked_by_torch(rank: int, world_size: int, folder: str) -> None:
    """Whatever lies in between, torch.distributed.checkpoint gets parts, also where a consolidated dict is there."""
    wanted: list[Tensor] = []
    for resume in (False, True):
        optimizer, params = make(foreach=True)
        content: dict[str, Any] = {"a": optimizer, "b": Wrapper(optimizer), "c": Application(optimizer)}
        if not resume:
            train(optimizer, params, 1, 3)
            wanted = [value.clone() for state in optimizer.state.values() for value in state.values()]
            optimizer.consolidate_state_dict(to=0)
            quietly(dcp_save, {**content, "d": optimizer.sharded_state_dict()}, checkpoint_id=folder)
            continue
        for key in content:
            optimizer.load_state_dict(torch.optim.RAdam([{"params": params[:3]}, {"params": params[3:]}]).state_dict())
            quietly(dcp_load, {key: content[key]}, checkpoint_id=folder)
            assert all(map(torch.equal, wanted, (v for state in optimizer.state.values() for v in state.values())))
        by_hand = {"d": optimizer.sharded_state_dict()}
        quietly(dcp_load, by_hand, checkpoint_id=folder)
        optimizer.load_state_dict(by_hand["d"])
        assert all(map(torch.equal, wanted, (v for state in optimizer.state.values() for v in state.values())))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_torch_gets_parts_through_whatever_lies_between(tmp_path: Path, world_size: int) -> None:
    run(check_asked_by_torch, world_size, str(tmp_path / "x"))


class Sum(Allocations):  # type: ignore[no-untyped-call]
    """All bytes that operations allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.largest = 0
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.total += self.largest
        return result


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_memory_of_consolidation(world_size: int) -> None:
    run(check_memory, world_size)


def test_a_step_lets_go_of_the_consolidated_dict() -> None:
    """It would be older than the state."""
    optimizer, params = make()
    train(optimizer, params, 1, 3)
    old = optimizer.consolidate_state_dict()
    train(optimizer, params, 4, 4)
    assert optimizer.state_dict() is not old
    assert optimizer.state_dict()["state"][1]["step"] == 4


def saved_by_radam(names: list[str] | None = None) -> tuple[dict[str, Any], list[Parameter]]:
    params = make_params()
    radam = torch.optim.RAdam(list(zip(names, params, strict=True)) if names else params, lr=0.01, foreach=True)
    train(radam, params, 1, SAVED_AT)
    return radam.state_dict(), params


@pytest.mark.parametrize("kind", ["int", "float", "0-d", "1-element", "float64", "int64"])
def test_step_may_be_of_any_type(kind: str) -> None:
    kinds: dict[str, Callable[[Any], Any]] = {
        "int": int,
        "float": float,
        "0-d": lambda step: torch.tensor(float(step)),
        "1-element": lambda step: torch.tensor([float(step)]),
        "float64": lambda step: torch.tensor(float(step), dtype=torch.float64),
        "int64": lambda step: torch.tensor(int(step)),
    }
    convert = kinds[kind]
    saved, params = saved_by_radam()
    saved = {**saved, "state": {k: {**s, "step": convert(s["step"])} for k, s in saved["state"].items()}}
    optimizer = ShardedRAdam(params, foreach=True)
    optimizer.load_state_dict(saved)
    assert {type(state["step"]) for state in optimizer.state.values()} == {Tensor}
    assert [int(optimizer.state[p]["step"]) for p in params] == [
        int(saved["state"].get(i, {"step": 0})["step"]) for i in range(len(params))
    ]


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64"])
def test_saved_steps_do_not_depend_on_a_narrow_default_dtype(name: str) -> None:
    """bf16 cannot count past 256; RAdam's counters are float32 at least, whatever the default dtype."""
    before = torch.get_default_dtype()
    param = Parameter(torch.ones(3, dtype=torch.float32))
    optimizer = ShardedRAdam([param])
    optimizer.state[param]["step"] = torch.tensor(1001.0, dtype=torch.float64)
    try:
        torch.set_default_dtype(getattr(torch, name))
        saved = optimizer.consolidate_state_dict()
        local = ShardedRAdam([param]).state_dict()
    finally:
        torch.set_default_dtype(before)
    assert saved is not None
    assert saved["state"][0]["step"] == 1001
    wanted = torch.float64 if name == "float64" else torch.float32
    assert saved["state"][0]["step"].dtype == local["state"][0]["step"].dtype == wanted


def test_missing_group_keys_get_defaults_and_others_stay() -> None:
    saved, params = saved_by_radam()
    for key in ("foreach", "maximize", "capturable", "differentiable", "decoupled_weight_decay", "betas", "eps", "lr"):
        del saved["param_groups"][0][key]
    saved["param_groups"][0]["initial_lr"] = 0.5
    optimizer = ShardedRAdam(params, lr=0.25, betas=(0.8, 0.9))
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["initial_lr"]) == (0.25, (0.8, 0.9), 1e-8, 0.5)
    assert (group["foreach"], group["maximize"], group["capturable"]) == (None, False, False)
    train(optimizer, params, 1, 1)


def test_parameters_without_saved_state_start_anew() -> None:
    saved, params = saved_by_radam()
    optimizer = ShardedRAdam(params)
    train(optimizer, params, 1, 3)
    del saved["state"][1]
    optimizer.load_state_dict(saved)
    state = optimizer.state[params[1]]
    assert (state["step"], state["exp_avg"].any(), state["exp_avg_sq"].any()) == (0, False, False)
    optimizer.load_state_dict(torch.optim.RAdam(params).state_dict())
    assert not any(state["exp_avg"].any() for state in optimizer.state.values())


def errors(saved: dict[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """Dicts that do not fit, with what the error says."""
    state, groups = saved["state"], saved["param_groups"]

    def with_state(**changes: Any) -> dict[str, Any]:
        return {"state": {**state, 1: {**state[1], **changes}}, "param_groups": groups}

    no_step = {k: v for k, v in state[1].items() if k != "step"}
    renamed = [{**groups[0], "param_names": ["x", *groups[0]["param_names"][1:]]}]
    return {
        "shape": (
            with_state(exp_avg=torch.zeros(3, 257)),
            r"exp_avg of parameter 'p1' has shape \(3, 257\), expected \(257, 3\)",
        ),
        "moment": (
            with_state(exp_avg_sq=torch.zeros(9)),
            r"exp_avg_sq of parameter 'p1' has shape \(9,\), expected \(257, 3\)",
        ),
        "no tensor": (with_state(exp_avg=[1.0]), "exp_avg of parameter 'p1' is no tensor but list"),
        "complex": (with_state(exp_avg=torch.zeros(257, 3, dtype=torch.complex64)), "'p1' is torch.complex64"),
        "no step": ({"state": {**state, 1: no_step}, "param_groups": groups}, "parameter 'p1' has no 'step'"),
        "other optimizer": (
            {"state": {**state, 1: {"momentum_buffer": torch.zeros(257, 3)}}, "param_groups": groups},
            r"'p1' has no 'step', only \['momentum_buffer'\]",
        ),
        "a whole checkpoint": ({"model": {}, "optim": saved}, r"has no \['param_groups', 'state'\], only \['model'"),
        "groups": ({"state": state, "param_groups": groups * 2}, "number of parameter groups: 2, and the optimizer 1"),
        "params": (
            {"state": state, "param_groups": [{**groups[0], "params": [0, 1]}]},
            "group 0 has 2 parameters in the dict and 10 in the optimizer",
        ),
        "names": ({"state": state, "param_groups": renamed}, "is 'p0' in the optimizer and 'x' in the loaded"),
        "capturable": (
            {"state": state, "param_groups": [{**groups[0], "capturable": True}]},
            "If capturable=True, parameters must be on one of",
        ),
    }


def test_dicts_that_do_not_fit_are_errors_and_change_nothing() -> None:
    names = [f"p{i}" for i in range(10)]
    saved, _ = saved_by_radam(names)
    params = make_params()
    optimizer = ShardedRAdam(list(zip(names, params, strict=True)))
    train(optimizer, params, 1, 4)
    before = copy.deepcopy(optimizer.state_dict())
    for case, (bad, message) in errors(saved).items():
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
        assert_equal_dicts(optimizer.state_dict(), before)
        assert optimizer.state[params[1]]["step"] == 4, case


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def check_bad_on_one_rank(rank: int, world_size: int) -> list[tuple[str, str]]:
    """The last rank's input is bad; nothing is changed, and all goes on."""
    names = [f"p{i}" for i in range(10)]
    saved, _ = saved_by_radam(names)
    params = make_params()
    optimizer = ShardedRAdam(list(zip(names, params, strict=True)), foreach=True)
    train(optimizer, params, 1, 4)
    before = copy.deepcopy(optimizer.sharded_state_dict())
    is_bad = rank == world_size - 1
    found = []
    for case, (bad, _) in errors(saved).items():
        found.append((case, outcome(partial(optimizer.load_state_dict, bad if is_bad else saved))))
    found.append(("hook", ""))
    hook = optimizer.register_load_state_dict_pre_hook(lambda *_: {} if is_bad else None)
    found[-1] = ("hook", outcome(partial(optimizer.load_state_dict, saved)))
    hook.remove()
    state = optimizer.state[params[1]]
    kept, gather = dict(state), StateDictOptions(full_state_dict=True)
    model = nn.ParameterList(params)
    for case, value in (("foreign", torch.zeros(7, 7, 7)), ("unsaveable", lambda: 0)):
        if is_bad:
            state["exp_avg" if case == "foreign" else "mine"] = value
        for name, collect in (
            ("consolidate", partial(optimizer.consolidate_state_dict, to=0)),
            ("torch", partial(get_optimizer_state_dict, model, optimizer, options=gather)),
        ):
            found.append((f"{case} {name}", outcome(collect)))
        state.pop("mine", None)
        state.update(kept)
    found.append(("to", outcome(lambda: optimizer.consolidate_state_dict(to=world_size if is_bad else 0))))
    for key, old in before["state"].items():
        for name, tensor in optimizer.sharded_state_dict()["state"][key].items():
            for one, other in zip(pieces(tensor), pieces(old[name]), strict=True):
                assert torch.equal(one, other), (key, name)
    optimizer.load_state_dict(saved)
    train(optimizer, params, SAVED_AT + 1, SAVED_AT + 1)
    whole = optimizer.consolidate_state_dict(to=0)
    assert whole is None or whole["state"][1]["step"] == SAVED_AT + 1
    return found


def pieces(tensor: Tensor) -> list[Tensor]:
    return [piece for _, piece in tensor.pieces] if isinstance(tensor, RangeTensor) else [tensor]


@pytest.mark.parametrize("world_size", [*WORLD_SIZES[1:], 8])
def test_what_is_bad_on_one_rank_is_raised_on_all(world_size: int) -> None:
    results = run(check_bad_on_one_rank, world_size)
    for result in results[1:]:
        assert result == results[0]
    messages = {case: text for case, (_, text) in errors(saved_by_radam([f"p{i}" for i in range(10)])[0]).items()}
    messages["foreign consolidate"] = messages["foreign torch"] = "exp_avg of parameter 'p1' has shape"
    messages["unsaveable consolidate"] = messages["unsaveable torch"] = "mine"
    messages["to"] = f"to={world_size}"
    for case, found in results[0]:
        assert f"rank {world_size - 1}" in found, (case, found)
        assert re.search(messages.get(case, "has no"), found), (case, found)


def test_names_may_have_the_prefixes_of_wrappers() -> None:
    assert plain_name("module._orig_mod.a.module.w") == "a.w"
    assert plain_name("module.submodule.w") == "submodule.w"
    names = [f"layer.{i}" for i in range(10)]
    saved, params = saved_by_radam([f"module.{name}" for name in names])
    optimizer = ShardedRAdam(list(zip(names, params, strict=True)))
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"][0] == "module.layer.0"
    unnamed = ShardedRAdam(make_params())
    unnamed.load_state_dict(saved)


def test_model_and_optimizer_files_have_no_padding() -> None:
    model = nn.Sequential(*(nn.Linear(3, 1) for _ in range(50)))
    optimizer = ShardedRAdam(model.parameters(), bucket_cap_mb=1e-3)
    for content in (model.state_dict(), optimizer.state_dict()["state"], optimizer.consolidate_state_dict()):
        sizes = {
            t.untyped_storage().nbytes() for t in torch.utils._pytree.tree_leaves(content) if isinstance(t, Tensor)
        }
        assert sizes <= {12, 4}


@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["float", "tensor"])
def test_loading_in_inference_mode(lr: float | Tensor) -> None:
    """And building: what is made there takes steps afterwards, as RAdam's does."""
    trained, params = make(lr=copy.deepcopy(lr))
    train(trained, params, 1, SAVED_AT)
    loaded = make_params()
    with torch.inference_mode():
        saved = copy.deepcopy(trained.state_dict())
        optimizer = ShardedRAdam([{"params": loaded[:3]}, {"params": loaded[3:]}], lr=copy.deepcopy(lr))
    for param, value in zip(loaded, params, strict=True):
        param.data.copy_(value)
    saved["state"][1]["mine"] = torch.ones(3)
    with torch.inference_mode():
        optimizer.load_state_dict(saved)
        whole = optimizer.consolidate_state_dict()
    trained.state[params[1]]["mine"] = torch.ones(3)
    assert_equal_dicts(whole, trained.consolidate_state_dict())
    optimizer.state[loaded[1]]["mine"].add_(1)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].mul_(1)  # as schedulers do
    for of in ((trained, params), (optimizer, loaded)):
        train(*of, SAVED_AT + 1, END)
    assert_same(params, loaded)


@pytest.mark.parametrize("touch", ["nothing", "own", "stepped"])
def test_frozen_parameters_have_entries_if_there_is_something_to_say(touch: str) -> None:
    """As with RAdam, which has no state of parameters that never had a gradient."""
    param, other = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = ShardedRAdam([param, other])
    if touch == "stepped":
        set_grads([param], 1)
        optimizer.step()
    if touch == "own":
        optimizer.state[param]["mine"] = 3
    param.requires_grad_(False)
    for saved in (optimizer.state_dict(), optimizer.consolidate_state_dict()):
        assert saved is not None
        assert list(saved["state"]) == ([1] if touch == "nothing" else [0, 1])
        optimizer.load_state_dict(saved)
        assert optimizer.state[param]["step"] == (touch == "stepped")
        assert optimizer.state[param].get("mine") == (3 if touch == "own" else None)
