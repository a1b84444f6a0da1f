"""Train a byte-level GPT on text, with a choice of optimizers, and with DistributedDataParallel or sharded gradients.

    torchrun --standalone --nproc-per-node=2 launch/train.py --steps 200 --save runs/first
    torchrun --standalone --nproc-per-node=3 launch/train.py --steps 300 --resume runs/first
    torchrun --standalone --nproc-per-node=2 launch/train.py --steps 200 --optimizer sharded-gradients

Started by torchrun (or alone, as one rank). CUDA and NCCL where there are GPUs, CPU and Gloo otherwise. The text is by
default the source of Python's standard library; ``--data`` takes files and folders instead. Ranks read different
sequences: ``--batch`` is that of all ranks together, so that a run can resume at another number of ranks.

Checkpoints are directories below ``--save``, written in the background, each rank its own part. ``--consolidated`` has
one file instead, which every optimizer here, and plain torch.optim.RAdam, can load.

On SIGTERM or SIGUSR1 to any rank, all ranks finish the step, save together, and end with status 75: there is more to
do. With ``--auto-resume`` the next start goes on from there, or from whatever was saved last, at any number of ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import resource
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from sharded_radam import CheckpointError, CheckpointManager, ShardedRAdam

STOPPED = 75
"""Exit status of a run that was asked to stop before its last step; EX_TEMPFAIL of sysexits.h."""

TEXT_SUFFIXES = {".py", ".txt", ".md", ".rst", ".c", ".h", ".cpp", ".json", ".html", ".tex"}


# The model


@dataclass(frozen=True)
class Sizes:
    """What ``--layers`` and its like choose."""

    layers: int
    heads: int
    width: int
    context: int


class Block(nn.Module):
    """Attention and a feed-forward layer, normalised before."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.width)
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.attended = nn.Linear(sizes.width, sizes.width)
        self.up = nn.Linear(sizes.width, 4 * sizes.width)
        self.down = nn.Linear(4 * sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attended(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Next-byte prediction: 256 tokens; the weights of embedding and head are tied."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for name, param in self.named_parameters():
            if name.endswith(("down.weight", "attended.weight")):
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * sizes.layers))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.bytes.weight)
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# The text


def text_files(folder: Path, without: Sequence[str]) -> Iterator[Path]:
    """Those below a folder, but for folders of some names."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in without]
        yield from (Path(root, name) for name in names if os.path.splitext(name)[1] in TEXT_SUFFIXES)


def read_text(paths: list[Path], limit: int) -> bytes:
    """The bytes of all text files given or below the folders given, in the order of their paths, ``limit`` at most."""
    files: list[Path] = []
    for path in paths or [Path(sysconfig.get_paths()["stdlib"])]:
        files += [path] if path.is_file() else text_files(path, () if paths else ("site-packages",))
    parts, size = [], 0
    for file in sorted(files):
        parts.append(file.read_bytes()[: limit - size])
        size += len(parts[-1])
        if size >= limit:
            break
    if size < 10_000:
        raise SystemExit(f"found {size} bytes of text in {len(files)} files of {paths}: give files or folders of more")
    return b"".join(parts)


class Text:
    """Sequences of a text. The last twentieth is for validation, the rest for training."""

    def __init__(self, content: bytes, context: int, device: torch.device) -> None:
        tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        cut = len(tokens) * 19 // 20
        self.training, self.validation = tokens[:cut], tokens[cut:]
        self.context = context
        self.device = device

    def batch(self, step: int, part: int, size: int, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
        """This rank's share of a batch that depends on the step and part alone, so that runs can resume."""
        generator = torch.Generator().manual_seed(step * 1009 + part)
        starts = torch.randint(len(self.training) - self.context - 1, (size,), generator=generator)
        return self._take(self.training, starts.tensor_split(world_size)[rank])

    def validation_batches(self, size: int, rank: int, world_size: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Up to ``limit`` batches of this rank, each with sequences that do not overlap."""
        starts = torch.arange(0, len(self.validation) - self.context - 1, self.context)
        for chunk in torch.split(starts[: size * world_size * limit][rank::world_size], size):
            yield self._take(self.validation, chunk)

    def _take(self, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = tokens[starts[:, None] + torch.arange(self.context + 1)].long().to(self.device)
        return rows[:, :-1], rows[:, 1:]


# Ranks, optimizers and files


def start() -> tuple[torch.device, int, int]:
    """Join torchrun's process group, or be its only rank; returns device, rank and world size."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if (
        os.environ["RANK"] == "0"
        and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    ):
        print(
            "warning: when torchrun restarts workers, they may read in its store what those before them wrote "
            "(https://github.com/pytorch/pytorch/issues/135712): start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
            file=sys.stderr,
        )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


def make_optimizer(name: str, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Decay for matrices, none for biases and norms."""
    matrices = [param for param in model.parameters() if param.dim() > 1]
    others = [param for param in model.parameters() if param.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    options: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.99), "decoupled_weight_decay": True}
    if name == "sharded":
        return ShardedRAdam(groups, **options)
    if name == "sharded-gradients":
        return ShardedRAdam(groups, shard_gradients=True, module=model, **options)
    if name == "radam":
        return torch.optim.RAdam(groups, foreach=True, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second to import

    return ZeroRedundancyOptimizer(groups, torch.optim.RAdam, parameters_as_bucket_view=True, foreach=True, **options)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of optimizer state on this rank."""
    local = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer has a RAdam of its own parameters
    tensors = (t for state in local.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim())
    return sum(tensor.nbytes for tensor in tensors)


def save_file(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Collective: one file, written by rank 0, that any number of ranks can load; whole or not at all."""
    if hasattr(optimizer, "consolidate_state_dict"):  # ours, or ZeroRedundancyOptimizer
        optimizer.consolidate_state_dict(to=0)
    failure: list[Any] = [None]
    if dist.get_rank() == 0:
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        try:
            write_atomically(path, content)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
            failure = [f"rank 0 could not save {path}: {error}"]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise SystemExit(failure[0])


def write_atomically(path: Path, content: dict[str, Any]) -> None:
    """The file of this name is always a whole one: the old one until the new one is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load_file(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load a file on every rank; returns the step it was saved at."""
    content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    return int(content["step"])


# What a scheduler or a person wants to know, and to say


class StopSignal:
    """Whether this rank was asked to stop. Nothing is done at once: other ranks may be in the middle of a step.

    After an error the signals mean again what they meant before, so that torchrun can end a rank that waits for one
    that is gone.
    """

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> StopSignal:
        self._set(self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._set(signal.SIG_DFL)
            if self.came:
                traceback.print_exception(kind, error, at)
                signal.raise_signal(signal.SIGTERM)

    def ignore(self) -> None:
        """From now on: this rank is about to end by itself, and torchrun tells it to as soon as another one has."""
        self._set(signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True

    def _set(self, action: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, action)


class Metrics:
    """One JSON line a record, and the same for TensorBoard."""

    def __init__(self, file: Path | None, tensorboard: Path | None) -> None:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_file() and not (written := file.read_bytes()).endswith(b"\n"):
                os.truncate(file, written.rfind(b"\n") + 1)  # a killed run had begun a line
        self._file = file.open("a") if file is not None else None
        self._writer: Any = None
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise SystemExit("--tensorboard needs tensorboard: pip install 'sharded_radam[tensorboard]'") from error
            self._writer = SummaryWriter(str(tensorboard))

    def write(self, step: int, **record: Any) -> None:
        """Add a record of a step."""
        if self._file is not None:
            print(json.dumps({"step": step, **record}), file=self._file, flush=True)
        if self._writer is not None:
            for name, value in record.items():
                values = value if isinstance(value, dict) else {"": value}
                for key, scalar in values.items():
                    if isinstance(scalar, (int, float)):
                        self._writer.add_scalar(f"{name}/{key}" if key else name, scalar, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def peak_bytes(device: torch.device) -> int:
    """The most memory that this rank has had: of the GPU, otherwise of its process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Training


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Linear warm-up, then half a cosine down to a tenth at ``--schedule-steps``."""
    if step < options.warmup:
        return float(options.lr * (step + 1) / options.warmup)
    done = min(1.0, (step - options.warmup) / max(1, options.schedule_steps - options.warmup))
    return float(options.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done))))


class Trainer:
    """Model, text and optimizer of one rank."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.stop = StopSignal()
        self.is_stopping = False
        self.device, self.rank, self.world_size = start()
        if options.batch % (self.world_size * options.accumulate):
            raise SystemExit(
                f"--batch {options.batch} must be a multiple of ranks x --accumulate = "
                f"{self.world_size} x {options.accumulate}"
            )
        torch.manual_seed(options.seed)
        sizes = Sizes(options.layers, options.heads, options.width, options.context)
        self.text = Text(read_text(options.data, options.data_bytes), sizes.context, self.device)
        model = GPT(sizes).to(self.device)
        self.net, self.model = model, self.wrap(model)
        self.optimizer = make_optimizer(options.optimizer, model, options.lr, options.weight_decay)
        self.manager: CheckpointManager | None = None
        if self.saves_directories():
            self.manager = CheckpointManager(options.save, keep=options.keep, timeout=options.save_timeout)
        self.phases_before: dict[str, float] = {}
        if isinstance(self.optimizer, ShardedRAdam) and self.writes_metrics():
            self.optimizer.time_phases()
        self.first_step = self.resume(model)

    def wrap(self, model: nn.Module) -> nn.Module:
        """With sharded gradients the optimizer averages them itself."""
        if self.options.optimizer == "sharded-gradients":
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Gradients of all parts of a batch but the last stay with their rank."""
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        assert isinstance(self.optimizer, ShardedRAdam)
        return self.optimizer.no_sync()

    def clip(self) -> Tensor:
        """Returns the norm of the gradients before."""
        if isinstance(self.optimizer, ShardedRAdam):
            return self.optimizer.clip_grad_norm_(self.options.clip)
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)

    def saves_directories(self) -> bool:
        return self.options.save is not None and not self.options.consolidated

    def writes_metrics(self) -> bool:
        return bool(self.options.metrics or self.options.tensorboard)

    def resume(self, model: nn.Module) -> int:
        """Load the latest checkpoint below a folder, or that file; returns the step to go on from."""
        source = self.options.save if self.options.auto_resume else self.options.resume
        if source is None:
            return 0
        if self.options.consolidated:
            exists = [source.exists()]
            dist.broadcast_object_list(exists, src=0)
            missing_is_fine = self.options.auto_resume and not exists[0]
            return 0 if missing_is_fine else load_file(source, model, self.optimizer)
        # By the manager that saves, where both are one folder: it knows then what its saves go on from.
        manager = self.manager if self.manager and source == self.options.save else CheckpointManager(source)
        restored = manager.load_latest(model=model, optimizer=self.optimizer)
        if restored is None:
            if self.options.auto_resume:
                return 0
            raise SystemExit(f"there is no checkpoint in {source}")
        if self.rank == 0:
            print(f"resumed: {restored.optimizer}", flush=True)
        return restored.step

    def save(self, step: int) -> None:
        """Save in the background, or one file by rank 0 while the others wait."""
        if self.manager is None:
            save_file(self.options.save, self.net, self.optimizer, step)
        else:
            # The position in the text is the step.
            self.manager.save(step, model=self.model, optimizer=self.optimizer, data={"step": step}, blocking=False)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def sum(self, *values: float) -> list[float]:
        """Sums over the ranks."""
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        total = torch.tensor(values, dtype=dtype).to(self.device)
        dist.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def memory(self) -> list[float]:
        """The most memory that each rank has had, in bytes."""
        return self.sum(*(peak_bytes(self.device) * (rank == self.rank) for rank in range(self.world_size)))

    def phases(self) -> dict[str, float]:
        """Milliseconds of the optimizer's phases on this rank since the last call, if anybody wants to know."""
        if not (isinstance(self.optimizer, ShardedRAdam) and self.writes_metrics()):
            return {}
        before, self.phases_before = self.phases_before, self.optimizer.stats().milliseconds
        return {name: now - before.get(name, 0.0) for name, now in self.phases_before.items()}

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Nats per byte of validation text."""
        total = torch.zeros(2, device=self.device)
        size = max(1, self.options.batch // self.world_size)
        for tokens, targets in self.text.validation_batches(size, self.rank, self.world_size, 4):
            with self.autocast():
                loss = self.net(tokens, targets)
            total += torch.stack([loss * len(tokens), torch.tensor(float(len(tokens)), device=self.device)])
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def step(self, step: int) -> dict[str, Any]:
        """One optimization step; figures are means over the ranks, phases those of this one."""
        begin = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.options)
        self.optimizer.zero_grad()
        loss_sum = torch.zeros((), device=self.device)
        for part in range(self.options.accumulate):
            size = self.options.batch // self.options.accumulate
            tokens, targets = self.text.batch(step, part, size, self.rank, self.world_size)
            last = part == self.options.accumulate - 1
            with contextlib.nullcontext() if last else self.no_sync():
                with self.autocast():
                    loss = self.model(tokens, targets) / self.options.accumulate
                loss.backward()
            loss_sum += loss.detach()
        norm = self.clip()
        self.synchronize()
        stepping = time.perf_counter()
        self.optimizer.step()
        self.synchronize()
        end = time.perf_counter()
        loss, optimizer_ms, stops = self.sum(loss_sum.item(), (end - stepping) * 1e3, self.stop.came)
        self.is_stopping = stops > 0  # on all ranks at the same step
        return {
            "loss": loss / self.world_size,
            "grad_norm": float(norm),
            "lr": learning_rate(step, self.options),
            "optimizer_ms": optimizer_ms / self.world_size,
            "phases_ms": self.phases(),
            "tokens_per_s": self.options.batch * self.options.context / (end - begin),
        }

    def train(self) -> int:
        """All steps, with metrics, validation and saving; returns the exit status."""
        is_main = self.rank == 0
        metrics = Metrics(self.options.metrics, self.options.tensorboard) if is_main else Metrics(None, None)
        metrics.write(self.first_step, started_ranks=self.world_size)
        if is_main:
            print(self.describe(), flush=True)
        with self.stop:
            last = self.train_steps(metrics)
            metrics.write(
                last,
                ranks=self.world_size,
                optimizer=self.options.optimizer,
                state_bytes=state_bytes(self.optimizer),
                replicated_bytes=sum(2 * param.nbytes for param in self.model.parameters()),
            )
            metrics.close()
            self.finish()
        return STOPPED if self.is_stopping else 0

    def describe(self) -> str:
        numel = sum(param.numel() for param in self.model.parameters())
        return (
            f"{numel / 1e6:.2f}M parameters, {len(self.text.training) / 1e6:.2f}M bytes of text, "
            f"{self.world_size} ranks on {self.device.type}, optimizer {self.options.optimizer}, "
            f"state {state_bytes(self.optimizer) / 1e6:.2f} MB per rank"
        )

    def train_steps(self, metrics: Metrics) -> int:
        """Returns the number of the step after which it ended: the last one, or the one after which all were asked."""
        options, is_main = self.options, self.rank == 0
        last: int = options.steps
        self.validate(self.first_step, metrics)
        bar = tqdm(
            range(self.first_step, last), initial=self.first_step, total=last, disable=not is_main, mininterval=1
        )
        for step in bar:
            figures = self.step(step)
            bar.set_postfix_str(
                f"loss {figures['loss']:.3f}, {figures['tokens_per_s']:.0f} tokens/s, "
                f"optimizer {figures['optimizer_ms']:.1f} ms",
                refresh=False,
            )
            metrics.write(step + 1, **figures)
            is_last = step + 1 == last
            self.is_stopping = self.is_stopping and not is_last
            if (step + 1) % options.validate_every == 0 or is_last:
                self.validate(step + 1, metrics)
            if options.save and ((step + 1) % options.save_every == 0 or is_last or self.is_stopping):
                self.save(step + 1)
            if self.is_stopping:
                if is_main:
                    what = "saving" if options.save else "nothing is saved without --save"
                    tqdm.write(f"asked to stop after step {step + 1}: {what}", file=sys.stderr)
                return int(step) + 1
        return last

    def validate(self, step: int, metrics: Metrics) -> None:
        loss, memory = self.validation_loss(), self.memory()
        metrics.write(step, validation_loss=loss, ranks=self.world_size, memory_bytes=dict(enumerate(memory)))
        if self.rank == 0:
            tqdm.write(f"step {step}: validation loss {loss:.4f} nats per byte", file=sys.stderr)

    def finish(self) -> None:
        """Wait for the last checkpoint, then leave the process group together."""
        if self.manager:
            self.manager.close()
            if self.rank == 0 and self.manager.last_report:
                print(f"saved {self.manager.last_report}", flush=True)
        self.stop.ignore()
        # DDP keeps the group alive: freed by a rank after its peers are gone, Gloo sometimes never returns.
        del self.model, self.net, self.optimizer
        dist.barrier()
        dist.destroy_process_group()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--data", type=Path, nargs="+", default=[], help="files or folders of text (default: Python's standard library)"
    )
    add("--data-bytes", type=int, default=20_000_000, help="read so many bytes at most")
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--width", type=int, default=256)
    add("--context", type=int, default=128)
    add("--steps", type=int, default=200, help="number of the last step, counted from the very first")
    add("--batch", type=int, default=24, help="sequences of all ranks in a step")
    add("--accumulate", type=int, default=1, help="parts of a step's batch")
    add("--optimizer", choices=["sharded", "sharded-gradients", "radam", "zero"], default="sharded")
    add("--lr", type=float, default=2e-3)
    add("--weight-decay", type=float, default=0.1)
    add("--warmup", type=int, default=20)
    add("--schedule-steps", type=int, help="where the cosine ends (default: --steps)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--validate-every", type=int, default=100)
    add("--save", type=Path, help="folder for checkpoints, saved at the end and every --save-every steps")
    add("--save-every", type=int, default=1000)
    add(
        "--save-timeout",
        type=float,
        default=600.0,
        help="seconds to wait for a rank that does not join a save, or is silent",
    )
    add("--keep", type=int, default=3, help="number of checkpoints to keep")
    add("--resume", type=Path, help="folder of whose latest checkpoint to go on, saved at any number of ranks")
    add("--auto-resume", action="store_true", help="go on from the latest checkpoint of --save, if there is one")
    add("--consolidated", action="store_true", help="--save and --resume are single files, for any optimizer")
    add("--metrics", type=Path, help="append one JSON line a step to this file; scripts/report.py draws it")
    add("--tensorboard", type=Path, help="folder for the same in TensorBoard's format")
    add("--verbose", action="store_true", help="log the layout, the transport and saves")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.schedule_steps = options.schedule_steps or options.steps
    if options.auto_resume and (options.save is None or options.resume is not None):
        parser.error("--auto-resume goes on from --save, and excludes --resume")
    if not options.optimizer.startswith("sharded") and (options.save or options.resume) and not options.consolidated:
        parser.error(f"--optimizer {options.optimizer} saves and resumes with --consolidated only")
    return options


if __name__ == "__main__":
    try:
        options = parse()
        logging.basicConfig(level="INFO" if options.verbose else "WARNING")
        sys.exit(Trainer(options).train())
    except CheckpointError as error:  # on every rank the same
        raise SystemExit(str(error)) from error
