"""``pytest --quick``: the tests that are marked ``quick``, at 1, 2 and 3 ranks."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from tests import ranks

# Programs that tests start have the package too where it is not installed, from any folder.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")])
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="what is marked quick, at 1, 2 and 3 ranks")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("quick"):
        config.option.markexpr = config.option.markexpr or "quick"
        ranks.WORLD_SIZES = (1, 2, 3)  # before the tests import it


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # modules: to look at them again and again is a tenth of the time
