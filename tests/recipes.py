"""The recipes of launch/README.md, each as a program for torchrun: ``recipes.py NAME FOLDER``.

Plain torch.optim.RAdam trains without interruption; ours is saved in the middle, and resumed with a new model. Both
must end with the same bits.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_radam import CheckpointManager, ShardedRAdam

README = Path(__file__).parent.parent / "launch" / "README.md"
STEPS, HALF = 10, 5


def recipe(name: str) -> str:
    """The code below a heading, with a learning rate at which something happens."""
    section = re.split(r"^##+ ", README.read_text(), flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(f"{name}\n"))
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return (
        str(code)
        .replace("1e-3", "1e-2")
        .replace('"lr": 1e-2', '"lr": 1e-2, "foreach": True')
        .replace("lr=1e-2", "lr=1e-2, foreach=True")
    )


def plain(code: str) -> str:
    """The same with torch's optimizer."""
    return code.replace("ShardedRAdam,", "torch.optim.RAdam,").replace("ShardedRAdam(", "torch.optim.RAdam(")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 17), nn.Tanh(), nn.Linear(17, 3))


def batches() -> list[Tensor]:
    """Of this rank."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return list(torch.randn(STEPS * world_size, 5, 7, generator=torch.Generator().manual_seed(1)))[rank::world_size]


def run(code: str, **names: Any) -> dict[str, Any]:
    found = {"torch": torch, "checkpoint": None, **names}
    exec(code, found)
    return found


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name.replace("module.", ""): param.detach() for name, param in module.named_parameters()}


def check_equal(model: nn.Module, reference: nn.Module) -> None:
    ours, theirs = weights(model), weights(reference)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    before = weights(network())
    assert before.keys() != ours.keys() or not torch.equal(ours["0.weight"], before["0.weight"])


def check_file(state: dict[str, Any], model: nn.Module, steps: int) -> None:
    """A whole state, for torch.optim.RAdam."""
    optimizer = torch.optim.RAdam(model.parameters())
    optimizer.load_state_dict(state)
    assert {int(of["step"]) for of in optimizer.state.values()} == {steps}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Hugging Face Trainer


def trainer(shards: bool = False) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

    from sharded_radam.integrations.hf import ShardsCallback

    code = recipe("Hugging Face Trainer")
    tokens = torch.randint(64, (257, 16), generator=torch.Generator().manual_seed(1))
    dataset = [{"input_ids": row, "labels": row} for row in tokens]
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=12, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )  # with dropout, and weights that are tied

    def train(code: str, folder: str, steps: int, checkpoint: str | None = None) -> nn.Module:
        torch.manual_seed(0)
        args = TrainingArguments(
            folder,
            use_cpu=True,
            per_device_train_batch_size=4,
            max_steps=steps,
            save_steps=HALF,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=3,
            report_to=[],
            disable_tqdm=True,
            save_only_model=shards and "ShardsCallback" in code,
        )
        callback = ShardsCallback("shards", keep=3)
        model: nn.Module = GPT2LMHeadModel(config)
        run(code, model=model, args=args, dataset=dataset, checkpoint=checkpoint, callback=callback)
        return model

    reference = train(plain(code).replace("ConsolidateCallback()", ""), "plain", STEPS)
    if shards:
        code = code.replace("ConsolidateCallback()", "callback") + "  # ShardsCallback"
    train(code, "ours", HALF)
    model = train(code, "ours", STEPS, f"ours/checkpoint-{HALF}")
    check_equal(model, reference)
    if shards:
        assert sorted(path.name for path in Path("shards").iterdir()) == [f"step_{STEPS}", f"step_{HALF}"]
        assert not list(Path("ours").rglob("optimizer.pt"))
        with pytest.raises(ValueError, match="of another run"):
            train(code, "ours", HALF)
        with pytest.raises(ValueError, match=r"needs TrainingArguments\(save_only_model=True\)"):
            train(code.replace("# ShardsCallback", ""), "ours", HALF)
        # Back to the middle: what came later is written anew.
        check_equal(train(code, "ours", STEPS, f"ours/checkpoint-{HALF}"), reference)
    else:
        content = torch.load(f"ours/checkpoint-{STEPS}/optimizer.pt", weights_only=True)
        assert sorted(len(group["params"]) for group in content["param_groups"]) == [10, 18]
        assert {int(of["step"]) for of in content["state"].values()} == {STEPS}
        check_forgotten(
            lambda: train(code.replace("ConsolidateCallback()", ""), "ours", 15, f"ours/checkpoint-{STEPS}")
        )


def check_forgotten(train: Callable[[], object]) -> None:
    """Without the callback: rank 0's error comes before its file, and leaves the folders that are there."""
    before = contents(Path("ours"))
    dist.barrier()
    with pytest.raises(RuntimeError, match="only this rank's part" if dist.get_rank() == 0 else None):
        train()
    dist.destroy_process_group()  # rank 1 waits for rank 0, which is gone
    after = contents(Path("ours"))
    assert {path: after[path] for path in before} == before
    assert not any(path.name == "optimizer.pt" for path in after.keys() - before.keys())


# The others


def accelerate() -> None:
    from accelerate import Accelerator

    code = recipe("Accelerate").replace("Accelerator()", "Accelerator(cpu=True)")
    without = plain(code).replace("consolidate_on_save(accelerator, optimizer)", "").replace('"state"', '"plain"')
    every = torch.stack(batches())

    def train(code: str, part: Tensor, checkpoint: str | None = None) -> dict[str, Any]:
        return run(code, model=network(), loader=list(part), checkpoint=checkpoint)

    reference = train(without, every)["model"]
    train(code, every[:HALF])
    trained = train(code, every[HALF:], "state")
    model = trained["model"]
    check_equal(model, reference)
    (in_parts,) = re.findall(r"`(manager\.save\(.*?)`", README.read_text())
    with CheckpointManager("parts") as manager:
        eval(in_parts, {**trained, "manager": manager, "step": STEPS})
        again = network()
        restored = manager.load_latest(model=again, optimizer=ShardedRAdam(again.parameters()))
        assert restored is not None
        check_equal(again, reference)
    Accelerator().wait_for_everyone()
    check_file(torch.load("state/optimizer.bin", weights_only=True), model, STEPS)
    from sharded_radam.integrations.hf import consolidate_on_save

    before = Path("state/optimizer.bin").read_bytes()
    other = Accelerator(cpu=True)
    other.prepare(network(), trained["optimizer"].optimizer)  # takes the state, and gives it back
    with pytest.raises(RuntimeError, match="only this rank's part"):  # without consolidate_on_save
        other.save_state("state")
    assert Path("state/optimizer.bin").read_bytes() == before
    with pytest.raises(TypeError, match="expected a ShardedRAdam"):
        consolidate_on_save(None, torch.optim.SGD([torch.ones(1)]))


def lightning_trainer() -> None:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    code = recipe("Lightning: Trainer")  # in two epochs of the same batches

    def train(code: str, folder: str, steps: int, checkpoint: str | None = None) -> nn.Module:
        net = network()
        options = {
            "accelerator": "cpu",
            "devices": int(os.environ["WORLD_SIZE"]),
            "max_steps": steps,
            "callbacks": [ModelCheckpoint(folder, every_n_train_steps=HALF, save_top_k=-1, filename="{step}")],
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
        }
        loader: Any = torch.utils.data.DataLoader(batches()[:HALF], batch_size=None)  # type: ignore[arg-type]
        run(code, net=net, loader=loader, options=options, checkpoint=checkpoint)
        return net

    assert lightning.__version__
    reference = train(plain(code), "plain", STEPS)
    train(code, "ours", HALF)
    model = train(code, "ours", STEPS, f"ours/step={HALF}.ckpt")
    check_equal(model, reference)
    dist.barrier()
    content = torch.load(f"ours/step={STEPS}.ckpt", weights_only=True)
    check_file(content["optimizer_states"][0], model, STEPS)


def lightning_finetuning() -> None:
    """BaseFinetuning thaws the first layer in the second epoch, in a group of its own, also in what goes on from there.

    All ranks have the same batches: DistributedDataParallel averages nothing of what is frozen when it is built.
    """
    import lightning
    from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint

    class Finetuning(BaseFinetuning):  # type: ignore[misc]
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.02)

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, build: Callable[..., torch.optim.Optimizer]) -> None:
            super().__init__()
            self.net, self.build = network(), build

        def training_step(self, batch: Tensor, _index: int) -> Tensor:
            return self.net(batch).square().mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.build([p for p in self.parameters() if p.requires_grad], lr=0.01, foreach=True)

    data = list(torch.randn(HALF, 5, 7, generator=torch.Generator().manual_seed(1)))
    loader: Any = torch.utils.data.DataLoader(data, batch_size=None)  # type: ignore[arg-type]

    def train(build: Any, folder: str, epochs: int, checkpoint: str | None = None) -> nn.Module:
        module = Module(build)
        trainer = lightning.Trainer(
            strategy="ddp_find_unused_parameters_true",
            accelerator="cpu",
            devices=int(os.environ["WORLD_SIZE"]),
            max_epochs=epochs,
            callbacks=[Finetuning(), ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, loader, ckpt_path=checkpoint)
        assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [2, 2][: min(epochs, 2)]
        return module.net

    for saved_after in (1, 2):
        models = []
        for build in (torch.optim.RAdam, ShardedRAdam):
            folder = f"{build.__name__}{saved_after}"
            train(build, folder, saved_after)
            models.append(train(build, folder, 3, f"{folder}/epoch={saved_after - 1}.ckpt"))
        check_equal(models[1], models[0])
        dist.barrier()


def fabric() -> None:
    code = recipe("Lightning: Fabric")
    options = {"accelerator": "cpu", "devices": int(os.environ["WORLD_SIZE"])}

    def train(code: str, part: list[Tensor], checkpoint: str | None = None) -> nn.Module:
        return run(code, model=network(), batches=part, options=options, checkpoint=checkpoint)["model"]  # type: ignore[no-any-return]

    reference = train(plain(code).replace("fabric.ckpt", "plain.ckpt"), batches())
    train(code, batches()[:HALF])
    dist.barrier()
    model = train(code.replace('"fabric.ckpt"', '"later.ckpt"'), batches()[HALF:], "fabric.ckpt")
    check_equal(model, reference)
    dist.barrier()
    check_file(torch.load("later.ckpt", weights_only=True)["optimizer"], model, STEPS)


def checkpoint_loop() -> None:
    dist.init_process_group("gloo")
    code = recipe("torch.distributed.checkpoint")

    def train(code: str, part: list[Tensor], checkpoint: str | None = None) -> dict[str, Any]:
        return run(code, model=network(), batches=part, checkpoint=checkpoint)

    reference = train(plain(code).replace('f"step', 'f"plain'), batches())["model"]
    train(code, batches()[:HALF])
    trained = train(code, batches()[HALF:], f"step_{HALF}")
    check_equal(trained["model"], reference)
    assert Path(f"step_{STEPS}", ".metadata").exists()
    check_process(trained["training"])


def check_process(training: Any) -> None:
    """A process of its own writes the checkpoint, of the state when it was asked to."""
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save

    wanted = training.optimizer.consolidate_state_dict(to=0)
    saving = async_save(
        {"training": training}, checkpoint_id="process", async_checkpointer_type=AsyncCheckpointerType.PROCESS
    )
    training.model(batches()[0]).square().mean().backward()
    training.optimizer.step()
    (saving.upload_completion if isinstance(saving, AsyncSaveResponse) else saving).result(timeout=100)
    load({"training": training}, checkpoint_id="process")
    found = training.optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        for index, state in wanted["state"].items():
            assert all(torch.equal(value, found["state"][index][key]) for key, value in state.items())
        assert found["state"][0]["step"] == STEPS


PROGRAMS: dict[str, Callable[[], None]] = {
    "trainer": trainer,
    "trainer-shards": lambda: trainer(shards=True),
    "accelerate": accelerate,
    "lightning": lightning_trainer,
    "lightning-finetuning": lightning_finetuning,
    "fabric": fabric,
    "checkpoint": checkpoint_loop,
}

if __name__ == "__main__":
    os.chdir(sys.argv[2])
    PROGRAMS[sys.argv[1]]()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
