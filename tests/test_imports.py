"""Layers: what each module of the package may import of the others."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sharded_radam

pytestmark = pytest.mark.quick

PACKAGE = Path(sharded_radam.__file__).parent

FLOORS = [
    {"compat", "version", "callers", "dtypes", "plan", "streams"},
    {"store", "radam"},
    {"transport", "compiled"},
    {"buckets"},
    {"state", "arrivals", "step_differentiable", "replicas", "preflight", "arguments"},
    {"gradients", "checkpoint.format"},
    {"build", "update"},
    {"step", "state.consolidate", "state.load", "uneven_inputs", "checkpoint"},
    {"stats"},
    {"optimizer"},
    {"checkpoint.convert", "grad_scaler", "clipping"},
    {"", "integrations", "tools"},
    {"__main__"},
]
"""From the ground up: who is on a floor imports from lower ones, and from its own package."""


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


def room(name: str) -> str:
    """The longest entry of FLOORS that a module is, or is in."""
    rooms = [room for floor in FLOORS for room in floor if room == name or name.startswith(f"{room}.")]
    assert rooms, f"{name} is on no floor"
    return max(rooms, key=len)


def test_every_module_imports_from_lower_floors_only() -> None:
    level = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    modules = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    assert level.keys() == {room(name) for name in modules}
    for name, path in modules.items():
        own = room(name)
        for full in imports(path):
            target = full.removeprefix("sharded_radam").removeprefix(".")
            if full.split(".")[0] == "sharded_radam" and target in modules and target:
                assert room(target) == own or level[room(target)] < level[own], f"{name} imports {target}"


def test_the_floors_are_drawn() -> None:
    """From top to bottom, in CONTRIBUTING.md."""
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    (drawing,) = re.findall(r"## Floors.*?```\n(.*?)```", page, re.DOTALL)
    drawn = [line.split() for line in drawing.splitlines() if line[0].isdigit()]
    rooms = [{room.replace(".", "/") for room in floor} for floor in FLOORS]
    unnamed = {"", "__main__", "version"}
    for number, (floor, words) in enumerate(zip(rooms[: len(drawn)], reversed(drawn), strict=True)):
        assert words[0] == str(number)
        assert floor - unnamed <= {word.rstrip("/") for word in words}, words


def test_only_the_transports_call_collectives() -> None:
    calls = ("all_gather", "all_reduce", "broadcast", "isend", "irecv", "send", "recv", "reduce_scatter", "barrier")
    for path in PACKAGE.rglob("*.py"):
        if "transport" not in path.parts and path.name != "compat.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dist":
                    assert not node.attr.startswith(calls), (path, node.attr)


def test_plan_and_radam_do_not_know_of_ranks() -> None:
    for name in ("plan", "radam", "buckets/flat", "buckets/counters"):
        assert not any("distributed" in found for found in imports(PACKAGE / f"{name}.py"))


def test_what_lies_on_the_disk_does_not_know_of_ranks() -> None:
    for path in (PACKAGE / "checkpoint" / "format").glob("*.py"):
        assert not any("distributed" in found for found in imports(path)), path


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
