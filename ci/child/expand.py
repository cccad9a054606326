"""Expands every named schedule of a source tree at the golden sizes and prints them as one JSON object.

Run as a script, with the tree first on the path, so that it can expand the tree of another revision::

    PYTHONPATH=TREE python -P ci/child/expand.py TREE

The object has four maps, each by names such as ``dualpipe-P4-M8``.  ``shown`` has the text of the schedule.
``digested`` has it for the sizes of which tests/golden keeps only a digest.  ``failed`` has the error of a schedule
that the tree's code cannot generate.  ``rows`` has the phase table row of each op, except for the large schedules
and for those without a table:
``rows[name]["rows"]`` lists ``[table, row]``, and ``rows[name]["ranks"][rank][slot]`` has one index into it per op.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHOWN = [(2, 4), (4, 8), (6, 14), (8, 20)]
"""Ranks and microbatches of the schedules that are kept as text."""

DIGESTED = [(1, 1), (1, 4), (2, 2), (2, 10), (3, 7), (4, 20), (5, 13), (8, 16), (10, 24), (12, 40), (16, 64), (24, 50)]
"""Further sizes, of which only a digest is kept.  A named schedule is left out at a size that it does not support."""

LARGEST_TRACED = 150
"""The largest product of ranks and microbatches at which ``rows`` has a digested schedule."""

LOWERED = [(2, 4), (4, 8)]
"""Sizes at which ``lower`` adds the messages to the computes of each named schedule."""


def expand(tree: Path) -> dict[str, Any]:
    """All schedules of ``tree``.  Raises ``ImportError`` if another ``dualpipe`` is imported."""
    import dualpipe

    if not Path(dualpipe.__file__).resolve().is_relative_to(tree.resolve()):
        raise ImportError(f"{tree} has no dualpipe")
    from dualpipe.schedule import COMPUTE
    from dualpipe.schedule import generate as generator
    from dualpipe.schedule.generate import PLANS, SizeError, generate
    from dualpipe.schedule.lower import lower
    from dualpipe.schedule.text import dumps
    from dualpipe.schedule.torch_table import load_csv

    shown: dict[str, str] = {}
    digested: dict[str, str] = {}
    rows: dict[str, Any] = {}
    failed: dict[str, str] = {}

    def put(into: dict[str, Any], name: str, make: Callable[[], Any]) -> None:
        try:
            made = make()
        except SizeError:
            return
        except Exception as error:  # any error of the tree's code: the gate reports it
            failed[name] = f"{type(error).__name__}: {error}"
        else:
            into[name] = made

    for name in getattr(generator, "NAMES", PLANS):  # an older tree has no others
        for into, sizes in ((shown, SHOWN), (digested, DIGESTED)):
            for size in sizes:
                put(into, named(name, *size), lambda: dumps(generate(name, *size)))  # noqa: B023 - called at once
    for name in PLANS:
        for size in (*SHOWN, *(size for size in DIGESTED if size[0] * size[1] <= LARGEST_TRACED)):
            put(rows, named(name, *size), lambda: rows_of(PLANS[name], *size))  # noqa: B023
        for size in LOWERED:
            lowered = named(f"{name}-lowered", *size)
            put(digested, lowered, lambda: dumps(lower(generate(name, *size).only(COMPUTE))))  # noqa: B023
    for table in sorted((tree / "tests" / "golden").glob("*.csv")):
        put(shown, table.stem, lambda: dumps(load_csv(table)))  # noqa: B023
    rows = {name: made for name, made in rows.items() if made}
    return {"shown": shown, "digested": digested, "rows": rows, "failed": failed}


def named(name: str, ranks: int, microbatches: int) -> str:
    return f"{name}-P{ranks}-M{microbatches}"


def rows_of(planner: Any, ranks: int, microbatches: int) -> dict[str, Any] | None:
    """The row that each op of a schedule was expanded from; ``None`` in a tree without ``phase_table.trace``."""
    from dualpipe.schedule import generate, phase_table

    if not hasattr(phase_table, "trace"):
        return None
    variables = {id(value): variable for variable, value in vars(generate).items() if isinstance(value, tuple)}
    numbers: dict[tuple[str, str], int] = {}
    programs = []
    for rank in range(ranks):
        plan = planner(ranks, microbatches, rank)
        variable = variables.get(id(plan.table), "")
        slots = phase_table.trace(plan.table, plan.sizes, plan.chunks, plan.routes)
        programs.append([[numbers.setdefault((variable, row.name), len(numbers)) for _, row in slot] for slot in slots])
    return {"rows": list(numbers), "ranks": programs}


if __name__ == "__main__":
    output, sys.stdout = sys.stdout, sys.stderr  # whatever the imported code prints must not get into the JSON
    json.dump(expand(Path(sys.argv[1])), output)
