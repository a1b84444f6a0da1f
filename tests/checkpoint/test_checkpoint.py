"""Checkpoints of every kind of parameter, saved and loaded at 1 to 4 ranks, by us and by torch's optimizers."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_radam import CheckpointError, CheckpointManager, ShardedRAdam
from sharded_radam.checkpoint import parts
from sharded_radam.checkpoint.format.index import read_index
from sharded_radam.checkpoint.format.verification import verify
from sharded_radam.checkpoint.report import LoadReport
from sharded_radam.compat import VERSION
from sharded_radam.state.dicts import plain_name
from tests.buckets.test_ranges import END, SAVED_AT, Net, make, state_of, train, under_ddp, uninterrupted
from tests.cases import assert_same, quietly, set_grads
from tests.ranks import WORLD_SIZES, run

pytestmark = pytest.mark.quick


def named(kind: str) -> tuple[nn.Module, ShardedRAdam]:
    """Net with an optimizer that knows names; the kinds differ in layout only."""
    model = Net()
    params = [*model.named_parameters()]
    if kind == "other layout":
        return model, ShardedRAdam(params[::-1], foreach=True, bucket_cap_mb=5e-3)
    return model, ShardedRAdam(params, foreach=True, bucket_cap_mb=3e-3)


# Matrix


def save_training(_rank: int, world_size: int, folder: str) -> None:
    model, optimizer = named("as saved")
    module = under_ddp(model)
    train(optimizer, model, 1, SAVED_AT)
    before = [tensor.clone() for state in optimizer.state.values() for tensor in state.values()]
    manager = CheckpointManager(folder)
    report = manager.save(world_size, model=module, optimizer=optimizer)
    assert report is not None
    assert report.path == Path(folder) / f"step_{world_size}"
    assert all(map(torch.equal, before, (t for state in optimizer.state.values() for t in state.values())))


def load_training(_rank: int, _world_size: int, folder: str, step: int, kind: str) -> tuple[list[Tensor], LoadReport]:
    model, optimizer = named(kind)
    train(optimizer, model, 1, 2)  # what is there is replaced
    restored = CheckpointManager(folder).load(step, model=model, optimizer=optimizer)
    assert restored.optimizer is not None
    train(optimizer, model, SAVED_AT + 1, END)
    return [param.detach().clone() for param in model.parameters()], restored.optimizer


@pytest.mark.parametrize("saved_at", WORLD_SIZES)
def test_any_world_size_buckets_and_order(tmp_path: Path, saved_at: int) -> None:
    """Continues bit-equal; every byte is there once, and loads into plain RAdam by torch alone."""
    run(save_training, saved_at, str(tmp_path))
    wanted = uninterrupted()
    for world_size in WORLD_SIZES:
        kind = ("as saved", "other layout")[(saved_at + world_size) % 2]  # both from each, and at each
        for params, report in run(load_training, world_size, str(tmp_path), saved_at, kind):
            assert_same(params, wanted, (world_size, kind))
            assert (report.loaded, report.parameters, report.step) == (9, 9, SAVED_AT)
            text = f"9/9 parameters, 0.01622 M elements, step {SAVED_AT}, saved at world size {saved_at}"
            assert str(report) == text
    folder = tmp_path / f"step_{saved_at}"
    index = read_index(folder)
    verify(index)
    assert sorted(path.name for path in folder.iterdir()) == [
        *(".metadata", *(f"__{rank}_0.distcp" for rank in range(saved_at)), "manifest.json")
    ]
    model, optimizer = make("radam")
    target = state_of(model, optimizer)
    quietly(dcp_load, target, checkpoint_id=folder)
    set_model_state_dict(model, target["model"])
    set_optimizer_state_dict(model, optimizer, target["optim"])
    train(optimizer, model, SAVED_AT + 1, END)
    assert_same([param.detach() for param in model.parameters()], wanted)


def check_equal_parts(rank: int, world_size: int, folder: str) -> None:
    """Each rank writes its shards, and an equal part of the model; chunks have their largest size."""
    parts.CHUNK_BYTES = 4096
    try:
        model = nn.Sequential(nn.Linear(257, 130), nn.Linear(130, 17))
        optimizer = ShardedRAdam(model.named_parameters(), bucket_cap_mb=1e-2)
        CheckpointManager(folder).save(0, model=model, optimizer=optimizer)
    finally:
        parts.CHUNK_BYTES = 64 * 2**20
    index = read_index(Path(folder) / "step_0")
    assert index.info["world_size"] == world_size
    per_rank = {"model": 0, "optim": 0}
    for key, tensor in index.tensors.items():
        for box in tensor.boxes:
            num_bytes = math.prod(box.sizes) * tensor.dtype.itemsize
            assert num_bytes <= 4096
            if box.extent.file == f"__{rank}_0.distcp" and not key.endswith(".step"):
                per_rank[key.partition(".")[0]] += num_bytes
    numel = sum(param.numel() for param in model.parameters())
    assert abs(per_rank["model"] - 4 * numel / world_size) < 8
    own = sum(
        b - a for flat in optimizer._shards.flats for slot in range(len(flat.params)) for a, b in flat.spans(slot)
    )
    assert per_rank["optim"] == 8 * own


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_writes_its_part(tmp_path: Path, world_size: int) -> None:
    run(check_equal_parts, world_size, str(tmp_path))


# Checkpoints of others


def check_foreign(_rank: int, world_size: int, folder: str) -> None:
    """What torch.distributed.checkpoint wrote of plain RAdam, in each of its forms, loads by opt.load."""
    wanted = uninterrupted()
    for form in ("nested", "flattened", "numbers"):
        path = Path(folder, f"{world_size}-{form}")
        model, optimizer = make("radam")
        train(optimizer, model, 1, SAVED_AT)
        options = StateDictOptions(flatten_optimizer_state_dict=form == "flattened")
        state: Any = get_optimizer_state_dict(model, optimizer, options=options) if form != "numbers" else optimizer
        quietly(dcp_save, {"model": get_model_state_dict(model), "anything": state}, checkpoint_id=path)
        other, ours = named("as saved" if form == "numbers" else "other layout")
        weights = {"model": get_model_state_dict(other)}
        quietly(dcp_load, weights, checkpoint_id=path)
        report = ours.load(path)
        assert report.world_size is None
        assert str(report).endswith(f"step {SAVED_AT}, saved by torch")
        train(ours, other, SAVED_AT + 1, END)
        assert_same([param.detach() for param in other.parameters()], wanted, form)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_plain_radam_by_torch(tmp_path: Path, world_size: int) -> None:
    run(check_foreign, world_size, str(tmp_path))


def check_fsdp2(_rank: int, world_size: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,))

    def pair(sharded: bool) -> tuple[nn.Module, Any]:
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(13, 29), nn.Linear(29, 5))
        if sharded:
            fully_shard(model, mesh=mesh)
            return model, torch.optim.RAdam(model.parameters(), lr=0.01, foreach=True)
        return model, ShardedRAdam(model.named_parameters(), lr=0.01, foreach=True, bucket_cap_mb=1e-3)

    def steps(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
        for step in range(first, last + 1):
            optimizer.zero_grad()
            inputs = torch.randn(6, 13, generator=torch.Generator().manual_seed(step))
            model(inputs).square().mean().backward()
            optimizer.step()

    def full(model: nn.Module) -> list[Tensor]:
        return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]

    fsdp, theirs = pair(True)
    steps(fsdp, theirs, 1, SAVED_AT)
    quietly(dcp_save, state_of(fsdp, theirs), checkpoint_id=f"{folder}/theirs")
    model, ours = pair(False)
    restored = state_of(model, ours)["model"]
    quietly(dcp_load, {"model": restored}, checkpoint_id=f"{folder}/theirs")
    ours.load(f"{folder}/theirs")
    steps(model, ours, SAVED_AT + 1, END)
    CheckpointManager(f"{folder}/ours").save(9, model=model, optimizer=ours)
    steps(fsdp, theirs, SAVED_AT + 1, END)
    again, theirs_again = pair(True)
    target = state_of(again, theirs_again)
    quietly(dcp_load, target, checkpoint_id=f"{folder}/ours/step_9")
    set_model_state_dict(again, target["model"])
    set_optimizer_state_dict(again, theirs_again, target["optim"])
    for pairing in (zip(full(fsdp), full(model), strict=True), zip(full(model), full(again), strict=True)):
        for one, other in pairing:
            # Averaging over 3 ranks is not exact, so gradients differ in their last bits there.
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
            assert world_size == 3 or torch.equal(one, other)
    with pytest.raises(CheckpointError, match=r"sharded tensors; expected a model that every rank has as a whole"):
        CheckpointManager(f"{folder}/no").save(1, model=fsdp)


@pytest.mark.skipif(VERSION < (2, 11), reason="FSDP2 on CPUs fails in torch 2.6, and does not average in 2.8")
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_fsdp2(tmp_path: Path, world_size: int) -> None:
    run(check_fsdp2, world_size, str(tmp_path))


# Masters


def half_pair() -> tuple[nn.Module, ShardedRAdam]:
    model = nn.Linear(31, 57).bfloat16()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.linspace(-1, 1, param.numel()).view(param.shape))
    return model, ShardedRAdam(model.named_parameters(), bucket_cap_mb=1e-3)


def half_steps(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        set_grads(model.parameters(), step)
        optimizer.step()


def check_masters(rank: int, world_size: int, folder: str, save: bool) -> list[Tensor]:
    model, optimizer = half_pair()
    manager = CheckpointManager(folder)
    if save:
        half_steps(model, optimizer, 1, SAVED_AT)
        manager.save(1, model=model, optimizer=optimizer)
    else:
        manager.load(1, model=model, optimizer=optimizer)
    half_steps(model, optimizer, SAVED_AT + 1, END)
    saved = optimizer.consolidate_state_dict(to=0)
    masters = [state["master"] for state in saved["state"].values()] if saved else []
    return [*(param.detach().clone() for param in model.parameters()), *masters]


def check_rebuilt_masters(_rank: int, _world_size: int, folder: str) -> None:
    """A checkpoint of plain bf16 RAdam has no masters: they begin as the parameters that are loaded with it."""
    model = half_pair()[0]
    plain = torch.optim.RAdam(model.parameters())
    half_steps(model, plain, 1, SAVED_AT)
    quietly(dcp_save, state_of(model, plain), checkpoint_id=f"{folder}/plain/step_1")
    other, optimizer = half_pair()
    half_steps(other, optimizer, 1, 3)
    CheckpointManager(f"{folder}/plain").load(1, model=other, optimizer=optimizer)
    assert_same(other.parameters(), model.parameters())
    for param, flat, slot in ((p, f, s) for f in optimizer._shards.flats for s, p in enumerate(f.params)):
        for (start, stop), own in zip(flat.spans(slot), flat._pieces_of[slot], strict=True):
            assert own.master is not None
            assert torch.equal(own.master, param.detach().view(-1)[start:stop].float())
        assert optimizer.state[param]["step"] == SAVED_AT


@pytest.mark.parametrize("saved_at", WORLD_SIZES)
def test_masters(tmp_path: Path, saved_at: int) -> None:
    wanted = run(check_masters, saved_at, str(tmp_path), True)[0]
    for world_size in WORLD_SIZES:
        assert_same(run(check_masters, world_size, str(tmp_path), False)[0], wanted)
    run(check_rebuilt_masters, saved_at, str(tmp_path))


# Names and groups


class Tied(nn.Module):
    """A tied weight, a frozen one, one that never has a gradient, and integers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.head = nn.Embedding(11, 7), nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen, self.idle = nn.Linear(7, 7).requires_grad_(False), nn.Linear(7, 3)
        self.numbers = nn.Parameter(torch.arange(4), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.frozen(self.embed(tokens)))
        return logits


def tied_pair(groups: Callable[[nn.Module], Any]) -> tuple[nn.Module, ShardedRAdam]:
    model = Tied()
    return model, ShardedRAdam(groups(model), bucket_cap_mb=1e-3)


def one_group(model: nn.Module) -> Any:
    return model.named_parameters()


def two_groups(model: nn.Module) -> Any:
    named = dict(model.named_parameters())
    idle = [(name, named.pop(name)) for name in [*named] if "idle" in name]
    return [{"params": [*named.items()]}, {"params": idle, "lr": 0.5}]


def prefixed(model: nn.Module) -> Any:
    return [(f"module._orig_mod.{name}", param) for name, param in model.named_parameters()]


def by_name(optimizer: ShardedRAdam) -> dict[str, Any]:
    """The whole state, on rank 0."""
    saved = optimizer.consolidate_state_dict(to=0)
    if saved is None:
        return {}
    pairs = [pair for g in saved["param_groups"] for pair in zip(g["param_names"], g["params"], strict=True)]
    return {plain_name(name): saved["state"].get(index) for name, index in pairs}


def check_names(_rank: int, world_size: int, folder: str) -> None:
    path = Path(folder, str(world_size))
    model, optimizer = tied_pair(one_group)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.arange(11)).square().sum().backward()
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.save(path)
    for groups in (one_group, two_groups, prefixed):
        other, loaded = tied_pair(groups)
        report = loaded.load(path)
        assert (report.loaded, report.step) == (5, 6)
        steps = {
            name: int(loaded.state[param]["step"]) for name, param in other.named_parameters() if param in loaded.state
        }
        assert steps == {"embed.weight": 6, "frozen.weight": 0, "frozen.bias": 0, "idle.weight": 0, "idle.bias": 0}
        # More groups than were saved: each has the options of the one that had its parameters.
        assert [group["lr"] for group in loaded.param_groups] == [0.25] * len(loaded.param_groups)
        assert equal(by_name(optimizer), by_name(loaded))
    # Fewer groups than were saved: fine if their options are equal, an error that says which are not otherwise.
    model, optimizer = tied_pair(two_groups)
    optimizer.save(path.with_name(f"{world_size}-two"))
    other, loaded = tied_pair(one_group)
    with pytest.raises(CheckpointError, match=r"param group 0 \(it was in groups that differ in lr\)"):
        loaded.load(path.with_name(f"{world_size}-two"))
    loaded.load(path.with_name(f"{world_size}-two"), strict=False)
    assert loaded.param_groups[0]["lr"] == 1e-3
    # Without names, by position; a model gives names too, also a tied parameter's other one.
    plain = Tied()
    unnamed = ShardedRAdam(plain.parameters())
    with pytest.raises(CheckpointError, match=r"the checkpoint has names of parameters, the optimizer has none"):
        unnamed.load(path)
    assert unnamed.load(path, model=plain).loaded == 5
    unnamed.save(path.with_name(f"{world_size}-numbers"))
    saved = read_index(path.with_name(f"{world_size}-numbers"))
    assert saved.tensors["optim.state.1.exp_avg"].shape == (11, 7)  # 0 are the integers
    assert ShardedRAdam(Tied().parameters()).load(path.with_name(f"{world_size}-numbers")).step == 6
    with pytest.raises(CheckpointError, match=r"Without names both must have the same groups"):
        tied_pair(two_groups)[1].load(path.with_name(f"{world_size}-numbers"))
    with pytest.raises(CheckpointError, match=r"parameters \[0\] of the optimizer are not the given model's"):
        ShardedRAdam(nn.Linear(2, 2, bias=False).parameters()).save(path.with_name("x"), model=plain)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_names_and_groups(tmp_path: Path, world_size: int) -> None:
    run(check_names, world_size, str(tmp_path))


def check_strict(_rank: int, world_size: int, folder: str) -> None:
    path = Path(folder, str(world_size))
    model = nn.ModuleDict({"a": nn.Linear(5, 6), "b": nn.Linear(6, 7), "c": nn.Linear(3, 3, bias=False)})
    optimizer = ShardedRAdam(model.named_parameters())
    half_steps(model, optimizer, 1, 3)
    optimizer.save(path)
    other = nn.ModuleDict({"a": nn.Linear(5, 6), "b": nn.Linear(7, 6), "d": nn.Linear(3, 3)})
    loaded = ShardedRAdam(other.named_parameters(), lr=0.5)
    half_steps(other, loaded, 1, 2)
    before = copy.deepcopy(loaded.consolidate_state_dict(to=0))
    with pytest.raises(CheckpointError) as caught:
        loaded.load(path)
    for text in (
        "2 missing in the checkpoint: d.weight, d.bias",
        "1 unexpected in the checkpoint: c.weight",
        "2 mismatched: b.weight (exp_avg has shape (7, 6) in the checkpoint, expected (6, 7)), b.bias (exp_avg has",
        "strict=False loads what fits",
    ):
        assert text in str(caught.value), str(caught.value)
    after = loaded.consolidate_state_dict(to=0)
    assert before is None or (after is not None and equal(before, after))
    report = loaded.load(path, strict=False)
    assert (report.loaded, report.missing, report.unexpected) == (2, ("d.weight", "d.bias"), ("c.weight",))
    assert "2/6 parameters, 7.2e-05 M elements, step 3" in str(report)
    steps = [int(loaded.state[param]["step"]) for param in other.parameters()]
    assert steps == [3, 3, 2, 2, 2, 2]
    assert loaded.param_groups[0]["lr"] == 1e-3
    after = loaded.consolidate_state_dict(to=0)
    if before and after:
        assert all(equal(before["state"][at], after["state"][at]) for at in (2, 3, 4, 5))
    with pytest.raises(CheckpointError, match=r"no optimizer under 'model', only under \['optim'\]"):
        loaded.load(path, prefix="model")
    half_steps(other, loaded, 4, 4)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_strict(tmp_path: Path, world_size: int) -> None:
    run(check_strict, world_size, str(tmp_path))


def check_almost_nothing(rank: int, world_size: int, folder: str) -> None:
    """One element, of which most ranks own nothing; and no element at all."""
    for numel in (1, 0):
        param = nn.Parameter(torch.ones(numel, 1))
        optimizer = ShardedRAdam([("a", param)], lr=0.5)
        param.grad = torch.ones(numel, 1)
        optimizer.step()
        optimizer.save(Path(folder, f"{world_size}-{numel}"))
        other = ShardedRAdam([("a", nn.Parameter(torch.zeros(numel, 1)))])
        report = other.load(Path(folder, f"{world_size}-{numel}"))
        assert (report.loaded, report.numel, report.step) == (1, 2 * numel, 1)
        assert bool(optimizer._shards.flats[0].spans(0)) == (rank == 0 and numel == 1)
        assert equal(by_name(optimizer), by_name(other))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_that_own_nothing(tmp_path: Path, world_size: int) -> None:
    run(check_almost_nothing, world_size, str(tmp_path))


def test_several_optimizers_in_one_checkpoint(tmp_path: Path) -> None:
    nets = [nn.Linear(3, 4), nn.Linear(3, 4)]
    plain = [torch.optim.RAdam(net.named_parameters()) for net in nets]
    for step, (net, optimizer) in enumerate(zip(nets, plain, strict=True), 1):
        half_steps(net, optimizer, 1, step)
    content = {f"opt{at}": get_optimizer_state_dict(*pair) for at, pair in enumerate(zip(nets, plain, strict=True))}
    quietly(dcp_save, content, checkpoint_id=tmp_path / "two")
    ours = ShardedRAdam(nn.Linear(3, 4).named_parameters())
    with pytest.raises(CheckpointError, match=r"several optimizers, under \['opt0', 'opt1'\]: say which by prefix="):
        ours.load(tmp_path / "two")
    assert [ours.load(tmp_path / "two", prefix=f"opt{at}").step for at in (0, 1)] == [1, 2]


class Counters(nn.Module):
    """A model with counters on the CPU, as BatchNorm has them."""

    def __init__(self, counts: list[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(800.0))
        for at, count in enumerate(counts):
            self.register_buffer(f"count{at}", torch.tensor(float(count)))
        self.last = nn.Parameter(torch.arange(101.0))


def check_counters(rank: int, world_size: int, folder: str) -> None:
    manager = CheckpointManager(folder)
    for other in range(world_size):
        manager.save(other, model=Counters([7, 7, 8 if rank == other else 7]))


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_counters_that_differ_on_one_rank(tmp_path: Path, world_size: int) -> None:
    """Cuts follow from shapes, so every element is there once; counters are rank 0's."""
    run(check_counters, world_size, str(tmp_path))
    for other in range(world_size):
        verify(read_index(tmp_path / f"step_{other}"))
        model = Counters([0, 0, 0])
        with torch.no_grad():
            model.weight.fill_(-1)
        CheckpointManager(tmp_path).load(other, model=model)
        assert torch.equal(model.weight, torch.arange(800.0))
        assert torch.equal(model.last, torch.arange(101.0))
        assert [int(model.get_buffer(f"count{at}")) for at in range(3)] == [7, 7, 8 if other == 0 else 7]


def test_what_is_in_the_manifest(tmp_path: Path) -> None:
    _, optimizer = named("as saved")
    optimizer.save(tmp_path / "a")
    body = json.loads((tmp_path / "a" / "manifest.json").read_text())["body"]
    assert body["format"] == 1
    assert {"world_size", "torch", "time", "step"} == body["info"].keys()
    size = (tmp_path / "a" / "__0_0.distcp").stat().st_size
    assert sum(length for length, _ in body["files"]["__0_0.distcp"]) == size
    # One number for nine parameters that stepped equally often is in the file once.
    tensors = read_index(tmp_path / "a").tensors
    steps = [tensor for key, tensor in tensors.items() if key.endswith(".step")]
    assert (len(steps), len({box.extent for tensor in steps for box in tensor.boxes})) == (9, 1)
