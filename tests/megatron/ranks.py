"""Calls a function on every rank of a small DualPipe, with the keywords of a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dualpipe.testing.launch import launch
from reference.megatron import production
from reference.megatron.case import Case

CASE = Case(pp=2, steps=1, timeout=10)


def on_each_rank(body: Callable[..., Any], case: Case = CASE) -> list[Any]:
    """Run ``body(**keywords of the schedule)`` once on every rank, in place of a training step."""

    def rank(context):
        found: list[Any] = []

        def instead(**keywords):
            found.append(body(**keywords))
            return []

        production.run_rank(case, context, instead)
        return found[0]

    return launch(production.ranks(case), rank, case.limit).values()
