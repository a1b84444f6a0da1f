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


FIRST = (
    *("store/test_apart.py", "test_any_story.py", "launch/test_slurm.py", "gradients/test_random_training.py"),
    *("store/test_agreement.py", "scripts/test_scripts.py", "launch/test_launch.py", "test_readme.py"),
)
"""Files that take long. Those that mostly wait for time-outs stand between those that compute, so that scripts/test.sh,
which runs two files at a time, keeps the cores busy; and none of them is alone in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {path: number for number, path in enumerate(FIRST)}
    folder = Path(__file__).parent
    items.sort(key=lambda item: place.get(item.path.relative_to(folder).as_posix(), len(place)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # modules: to look at them again and again is a tenth of the time
