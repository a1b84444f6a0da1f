"""Layers: what each module of the package may import of the others."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sharded_radam

pytestmark = pytest.mark.quick

PACKAGE = Path(sharded_radam.__file__).parent

ALLOWED = {
    "compat": set(),
    "callers": set(),
    "plan": set(),
    "radam": set(),
    "board": set(),
    "liveness": {"board"},
    "meeting": {"board", "liveness"},
    "meter": set(),
    "transport.reducers": set(),
    "transport.base": {"meeting", "meter", "transport.reducers"},
    "transport.gloo": {"transport.base", "transport.reducers"},
    "transport.native": {"compat", "transport.base", "transport.reducers"},
    "transport.signals": {"meeting"},
    "transport.shared_memory": {"meeting", *(f"transport.{name}" for name in ("base", "gloo", "reducers", "signals"))},
    "transport": {
        "meeting",
        *(f"transport.{name}" for name in ("base", "gloo", "native", "reducers", "shared_memory", "signals")),
    },
    "schedule": {"plan"},
    "grad_shard": {"memory", "plan"},
    "gradients": {"memory", "flat", "grad_shard", "schedule", "state", "transport"},
    "overlap": {"flat", "transport"},
    "overview": {"flat", "gradients", "plan", "transport"},
    "ranges": {"", "callers", "memory"},
    "memory": {"plan"},
    "flat": {"memory", "plan", "radam", "ranges", "steps"},
    "steps": set(),
    "replicas": {"meeting", "memory", "transport"},
    "layout": {"meeting", "plan", "memory", "flat", "transport"},
    "state": {"memory", "flat", "ranges", "transport", "values"},
    "values": set(),
    "differentiable": {"memory", "flat", "radam", "transport"},
    "join": {"memory", "transport"},
    "checkpoint.peers": {"board", "compat", "liveness", "meeting"},
    "checkpoint.calls": {"board", "checkpoint.peers", "liveness"},
    "checkpoint.agreement": {"board", "checkpoint.calls", "checkpoint.peers", "liveness"},
    "checkpoint.directory": set(),
    "checkpoint.errors": set(),
    "checkpoint.pickles": {"checkpoint.errors"},
    "checkpoint.records": {"checkpoint.errors"},
    "checkpoint.decode": {"checkpoint.errors", "checkpoint.pickles", "checkpoint.records"},
    "checkpoint.files": {"checkpoint.decode", "checkpoint.errors", "checkpoint.records", "memory"},
    "checkpoint.metadata": {f"checkpoint.{name}" for name in ("errors", "files", "pickles")},
    "checkpoint.packing": {"checkpoint.files", "checkpoint.metadata"},
    "checkpoint.index": {f"checkpoint.{name}" for name in ("errors", "files", "metadata", "packing")},
    "checkpoint.verification": {f"checkpoint.{name}" for name in ("errors", "files", "index", "metadata")},
    "checkpoint.reading": {f"checkpoint.{name}" for name in ("errors", "files", "index", "metadata", "verification")},
    "checkpoint.nesting": {f"checkpoint.{name}" for name in ("errors", "files", "index", "reading")},
    "checkpoint.contents": {"checkpoint.nesting", "memory", "ranges", "values"},
    "checkpoint.saving": {
        f"checkpoint.{name}"
        for name in ("agreement", "contents", "directory", "files", "index", "metadata", "peers", "verification")
    }
    | {"replicas"},
    "checkpoint.undo": {"checkpoint.agreement"},
    "checkpoint.loading": {
        f"checkpoint.{name}" for name in ("agreement", "files", "index", "peers", "reading", "undo")
    },
    "checkpoint.saved_optimizer": {*(f"checkpoint.{n}" for n in ("files", "index", "nesting")), "state", "values"},
    "checkpoint.optimizer_part": {
        *(f"checkpoint.{name}" for name in ("contents", "files", "index", "nesting", "reading", "saved_optimizer")),
        *("flat", "memory", "ranges", "replicas", "state", "values"),
    },
    "checkpoint.single": {
        f"checkpoint.{name}"
        for name in ("files", "index", "loading", "optimizer_part", "peers", "reading", "saving", "undo")
    },
    "optimizer": {
        *(
            "",
            "callers",
            "compat",
            "plan",
            "radam",
            "memory",
            "flat",
            "ranges",
            "steps",
            "replicas",
            "layout",
            "meeting",
            "state",
            "differentiable",
            "join",
            "transport",
        ),
        *("gradients", "overlap", "overview", "values"),
        *(f"checkpoint.{name}" for name in ("optimizer_part", "peers", "saving", "single")),
    },
    "checkpoint.model_part": {
        *(f"checkpoint.{n}" for n in ("contents", "files", "index", "nesting", "optimizer_part", "reading")),
        "state",
    },
    "checkpoint.other_optimizer": {
        *(f"checkpoint.{n}" for n in ("contents", "files", "index", "nesting", "optimizer_part", "reading")),
        *("checkpoint.saved_optimizer", "checkpoint.undo", "state", "values"),
    },
    "checkpoint.training": {
        *(f"checkpoint.{n}" for n in ("contents", "files", "index", "model_part", "optimizer_part")),
        *(f"checkpoint.{n}" for n in ("other_optimizer", "peers", "reading", "undo")),
        *("replicas", "state", "values"),
    },
    "checkpoint.retention": {"checkpoint.directory", "checkpoint.index"},
    "checkpoint.manager": {
        *("checkpoint.agreement", "checkpoint.contents", "checkpoint.directory", "checkpoint.files"),
        *("checkpoint.index", "checkpoint.loading", "checkpoint.reading", "checkpoint.saving"),
        *("checkpoint.peers", "checkpoint.retention", "checkpoint.training", "checkpoint.undo"),
    },
    "checkpoint": {f"checkpoint.{name}" for name in ("agreement", "manager", "optimizer_part", "saving", "training")},
    "checkpoint.exporting": {
        *(f"checkpoint.{n}" for n in ("directory", "files", "index", "model_part", "nesting", "reading")),
        *("checkpoint.saved_optimizer", "checkpoint.verification", "flat"),
    },
    "checkpoint.tools": {
        *("checkpoint.exporting", "checkpoint.files", "checkpoint.index", "checkpoint.nesting", "checkpoint.peers"),
        *("checkpoint.reading", "checkpoint.saved_optimizer", "checkpoint.saving"),
        *("checkpoint.verification", "values"),
    },
    "planning": set(),
    "planning.estimate": {"checkpoint.contents", "flat", "plan", "radam", "ranges", "transport"},
    "planning.models": {"memory", "plan"},
    "planning.simulate": {"compat", "optimizer", "overview", "plan", "planning.estimate", "transport"},
    "integrations": set(),
    "integrations.hf": {"checkpoint", "optimizer"},
    "commands": set(),
    "commands.output": set(),
    "commands.checkpoint": {
        *(f"checkpoint.{name}" for name in ("directory", "exporting", "index", "retention", "tools", "verification")),
        "commands.output",
    },
    "commands.doctor": {"commands.output", "diagnosis", "version"},
    "commands.plan": {"commands.output", "plan", *(f"planning.{n}" for n in ("estimate", "models", "simulate"))},
    "diagnosis": {"layout", "optimizer", "plan", "planning.estimate", "transport"},
    "cli": {"checkpoint.agreement", "commands", *(f"commands.{name}" for name in ("checkpoint", "doctor", "plan"))},
    "__main__": {"cli"},
    "amp": {"optimizer"},
    "clipping": {"optimizer"},
    "version": set(),
    "": {"amp", "clipping", "compat", "optimizer", "checkpoint", "overview", "version"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> set[str]:
    """Full names of what a module imports when it runs, not what it imports for types only."""
    found = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(n)
        for b in ast.walk(tree)
        if isinstance(b, ast.If) and "TYPE_CHECKING" in ast.dump(b.test)
        for n in ast.walk(b)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(str(node.module))
            if node.module == "sharded_radam":
                found |= {f"sharded_radam.{alias.name}" for alias in node.names}
    return found


def test_every_module_imports_what_is_below_it_only() -> None:
    modules = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    assert modules.keys() == ALLOWED.keys()
    for name, path in modules.items():
        prefix = "sharded_radam"
        ours = {found.removeprefix(prefix).removeprefix(".") for found in imports(path) if found.startswith(prefix)}
        assert ours <= ALLOWED[name], name


def test_only_the_transports_call_collectives() -> None:
    calls = ("all_gather", "all_reduce", "broadcast", "isend", "irecv", "send", "recv", "reduce_scatter", "barrier")
    for path in PACKAGE.rglob("*.py"):
        if "transport" not in path.parts and path.name != "compat.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dist":
                    assert not node.attr.startswith(calls), (path, node.attr)


def test_plan_and_radam_do_not_know_of_ranks() -> None:
    for name in ("plan", "radam", "flat", "steps"):
        assert not any("distributed" in found for found in imports(PACKAGE / f"{name}.py"))


def test_import_does_not_load_what_torch_loads_lazily() -> None:
    """torch.distributed.optim and RPC break on some builds; dynamo costs seconds."""
    code = (
        "import sys, sharded_radam; print([m for m in sys.modules if m.startswith(('{}', '{}', '{}', '{}'))])".format(
            "torch.distributed.optim", "torch.distributed.rpc", "torch._dynamo.", "torch._inductor."
        )
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    baseline = subprocess.run(
        [sys.executable, "-c", code.replace("sharded_radam", "torch.optim")], capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() in ("[]", baseline.strip())
