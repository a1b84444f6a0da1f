"""``pytest --quick``: the tests that are marked ``quick``, at 1, 2 and 3 ranks."""

from __future__ import annotations

import pytest

from tests import ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="what is marked quick, at 1, 2 and 3 ranks")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("quick"):
        config.option.markexpr = config.option.markexpr or "quick"
        ranks.WORLD_SIZES = (1, 2, 3)  # before the tests import it
