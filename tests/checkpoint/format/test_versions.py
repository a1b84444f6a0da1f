"""What each Python and torch wrote is read by this one; what is written here is the same bytes everywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from sharded_radam.checkpoint.format.chunks import DataFiles, Extent
from sharded_radam.checkpoint.format.index import read_index
from sharded_radam.checkpoint.format.metadata import SavedBox, SavedTensor, unpack
from sharded_radam.checkpoint.format.packing import pack
from sharded_radam.checkpoint.format.reading import read_value
from sharded_radam.checkpoint.format.verification import verify
from tests.data.write import state_dict, trained
from tests.programs import ROOT

pytestmark = pytest.mark.quick

DATA = ROOT / "tests" / "data"
ARCHIVES = sorted(DATA.glob("*.tar.xz"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.int64, torch.bool)


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What one Python and torch wrote."""
    shutil.unpack_archive(request.param, tmp_path)
    return tmp_path


def test_there_are_files_of_every_version() -> None:
    pythons, torches = zip(*(path.name.removesuffix(".tar.xz").split("-") for path in ARCHIVES), strict=True)
    assert {python.rpartition(".")[0] for python in pythons} == {"3.10", "3.11", "3.12", "3.13", "3.14"}
    assert {f"2.{minor}" for minor in range(6, 16)} == {version.rpartition(".")[0] for version in torches}
    assert "3.11.2" in pythons  # which pickles members of enums by name


def test_checkpoints_of_torch(written: Path) -> None:
    index = read_index(written / "dcp")
    verify(index)
    saved = state_dict()
    moments = saved["optim"]["state"]["a.weight"]
    wanted = {
        "model.a.weight": saved["model"]["a.weight"],
        **{f"optim.state.a.weight.{name}": moment for name, moment in moments.items()},
        "optim.param_groups.0.lr": 0.5,
        "optim.param_groups.0.betas": (0.9, 0.999),
        "optim.param_groups.0.params": ["a.weight"],
    }
    with DataFiles(index.folder) as files:
        # torch 2.6 keeps lists and tuples whole; others may nest them.
        for key in {*index.tensors, *index.objects} & wanted.keys():
            found = read_value(index, key, files)
            value = wanted.pop(key)
            assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, key
            assert not isinstance(value, Tensor) or found.dtype == value.dtype
    assert not [key for key in wanted if isinstance(wanted[key], Tensor)]


def test_checkpoints_of_ours(written: Path) -> None:
    model, wanted = trained()
    index = read_index(written / "ours")
    verify(index)
    content = (written / "ours" / ".metadata").read_bytes()
    tensors, objects, paths = unpack(content)
    assert pack(tensors, objects, paths or {}) == content  # the form is that of this version, too
    other, optimizer = trained()
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
    report = optimizer.load(written / "ours")
    assert (report.loaded, report.step) == (2, 3)
    assert optimizer.param_groups[0]["lr"] == 0.25
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        for name, value in wanted.state[theirs].items():
            assert torch.equal(optimizer.state[ours][name], value), name


def test_every_torch_reads_ours(written: Path) -> None:
    """With its own classes: the moments come back by torch.distributed.checkpoint alone."""
    model, wanted = trained()
    moments = {f"optim.state.{name}.exp_avg": torch.full_like(param, -1) for name, param in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        load(moments, checkpoint_id=written / "ours")
    for name, param in model.named_parameters():
        assert torch.equal(moments[f"optim.state.{name}.exp_avg"], wanted.state[param]["exp_avg"])


def test_every_protocol(written: Path) -> None:
    for protocol in range(2, 6):
        tensors, objects, paths = unpack((written / f"protocol{protocol}.pickle").read_bytes())
        boxes = tuple(SavedBox((at, 0), (1, 300), Extent("__0_0.distcp", at * 70000, 70000, None)) for at in range(2))
        assert tensors == {"w": SavedTensor(torch.float32, (2, 300), boxes)}
        assert objects == {"v": Extent("__1_0.distcp", 0, 2**40, None)}
        assert paths == {"w": ("w",), "v": ("groups", 0, "v")}


def test_what_is_written_is_the_same_everywhere() -> None:
    """The bytes of one index, as they were on the day this was written; ``.metadata`` has no others anywhere."""
    boxes = (
        SavedBox((0, 0), (2, 300), Extent("__0_0.distcp", 0, 70000, 1)),
        SavedBox((2, 0), (1, 300), Extent("a", 9, 9, 2)),
    )
    tensors = {"w": SavedTensor(torch.bfloat16, (3, 300), boxes), "empty": SavedTensor(torch.int64, (0,), ())}
    content = pack(tensors, {"v": Extent("a", 2**40, 7, None)}, {"w": ("w",), "v": ("groups", 0, "v")})
    assert content == (DATA / "packed.pickle").read_bytes()


def test_torch_reads_what_is_packed(tmp_path: Path) -> None:
    """Into equal objects as torch itself would have written: all dtypes, sizes, long names, many chunks."""
    tensors = {}
    for number, dtype in enumerate(DTYPES):
        name = f"layer.{number}." + "x" * number * 60
        sizes = [(), (0,), (300,), (2**31, 70000), (1, 2, 3)][number % 5]
        box = SavedBox((0,) * len(sizes), sizes, Extent("f", 2**33, 2**59, None))
        tensors[name] = SavedTensor(dtype, sizes, (box,))
    rows = tuple(SavedBox((at,), (1,), Extent(f"__{at}_0.distcp", at, 4, None)) for at in range(300))
    tensors["many"] = SavedTensor(torch.float32, (300,), rows)
    objects = {"a value": Extent("f", 0, 2**31, None)}
    paths: dict[str, tuple[str | int, ...]] = {name: ("a", 2**20, name) for name in [*tensors, *objects]}
    content = pack(tensors, objects, paths)
    assert unpack(content) == (tensors, objects, paths)
    (tmp_path / ".metadata").write_bytes(content)
    found = FileSystemReader(tmp_path).read_metadata()
    assert found.planner_data == paths
    for name, tensor in tensors.items():
        entry = found.state_dict_metadata[name]
        assert (entry.properties.dtype, tuple(entry.size)) == (tensor.dtype, tensor.shape)  # type: ignore[union-attr]
        assert entry.properties.layout == torch.strided  # type: ignore[union-attr]
        assert entry.properties.memory_format == torch.contiguous_format  # type: ignore[union-attr]
        assert isinstance(entry.size, torch.Size)  # type: ignore[union-attr]
    assert len(found.storage_data) == 300 + len(DTYPES) + 1
    many = [(key.index, key.offset) for key in found.storage_data if key.fqn == "many"]
    assert many == [(at, torch.Size([at])) for at in range(300)]


def test_an_older_torch_is_refused_on_import() -> None:
    code = "import torch; torch.__version__ = '2.5.1+cu124'; import sharded_radam"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("ImportError: sharded_radam needs torch 2.6 or newer, and torch 2.5.1+cu124 is installed")
