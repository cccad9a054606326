"""A plugin of pytest: leaves out the tests marked ``long`` but those of some files, and writes down how many."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gate")
    group.addoption("--long-of", action="append", default=[], metavar="FILE", help="run the long tests of this file")
    group.addoption("--long-left", metavar="FILE", help="write there how many long tests are not run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = {(config.rootpath / file).resolve() for file in config.getoption("--long-of")}
    left = [item for item in items if item.get_closest_marker("long") and item.path.resolve() not in wanted]
    items[:] = [item for item in items if not item.get_closest_marker("long") or item.path.resolve() in wanted]
    config.hook.pytest_deselected(items=left)
    Path(config.getoption("--long-left")).write_text(str(len(left)))
