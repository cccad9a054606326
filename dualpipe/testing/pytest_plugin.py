"""The fixture ``record_ranks``.  In a ``conftest.py``: ``pytest_plugins = ["dualpipe.testing.pytest_plugin"]``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dualpipe.record.recording import Recording


@pytest.fixture
def record_ranks() -> Callable[..., Recording]:
    """``dualpipe.testing.record_ranks``: fork ranks that call a function, and record what they do.

    For example::

        def test_our_pipeline_is_one_f_one_b(record_ranks):
            assert record_ranks(4, train).schedule == loads(Path("one_f_one_b.txt").read_text())
    """
    from dualpipe.testing.ranks import record_ranks

    return record_ranks
