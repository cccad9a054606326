"""Tries schedules against an oracle on fake ranks and real processes: one JSON object a line.

    python -m ci.trial [--blocking] [--first] FILE ...      schedule files, on a small model of plain modules
    python -m ci.trial --megatron [--first] NAME ...        DualPipe on Megatron, the cases of ``MEGATRON``

What ``dualpipe verify --json`` prints, for several at the price of one start; with ``--first`` none is tried after
one that differs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STEPS, SEED, TIMEOUT_S, MEGATRON_TIMEOUT_S = 2, 0, 20.0, 10.0

MEGATRON: Mapping[str, Mapping[str, Any]] = {
    "gpt-P2": {"pp": 2, "steps": 2, "clip": 0.0},
    "gpt-P2-dropout-overlapped": {"pp": 2, "steps": 2, "dropout": 0.1, "overlap_grad_reduce": True},
    "gpt-P4-data-parallel-2": {"pp": 4, "dp": 2, "steps": 1},
}
"""What each case differs in from the others: ``reference.megatron.case.Case``.  Without clipping a norm that is
wrong is told as such, and not as the weights that follow from it."""


def try_file(path: Path, blocking: bool) -> dict[str, object]:
    """The report on one schedule file.  Raises ``RuleError``, ``UndecidedError``, ``OSError``."""
    from dualpipe.schedule.text import load
    from reference.case import Case
    from reference.verify import verify

    return verify(Case(load(path), steps=STEPS, seed=SEED, blocking=blocking, timeout=TIMEOUT_S)).as_json()


def try_megatron(name: str) -> dict[str, object]:
    """The report on one case on Megatron.  Raises ``RuleError``, ``UndecidedError``."""
    from reference.megatron.case import Case
    from reference.megatron.verify import verify

    return verify(Case(**MEGATRON[name], timeout=MEGATRON_TIMEOUT_S)).as_json()


def tell(argument: str, options: frozenset[str]) -> dict[str, object]:
    """The report on one argument with its name, or how it could not be tried."""
    from dualpipe.errors import RuleError, UndecidedError

    megatron = "--megatron" in options
    name = argument if megatron else Path(argument).stem
    try:
        report = try_megatron(name) if megatron else try_file(Path(argument), "--blocking" in options)
        return {**report, "name": name}
    except (RuleError, OSError) as error:
        return {"name": name, "verdict": "bad input", "error": str(error)}
    except UndecidedError as error:
        return {"name": name, "verdict": "unknown", "error": str(error)}


if __name__ == "__main__":
    given = frozenset(argument for argument in sys.argv[1:] if argument.startswith("--"))
    for each in (argument for argument in sys.argv[1:] if argument not in given):
        told = tell(each, given)
        print(json.dumps(told), flush=True)
        if "--first" in given and told["verdict"] in ("different", "bad input"):
            break
