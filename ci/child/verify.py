"""Trains with schedules, on fake ranks and real processes, against an oracle; prints one JSON object per line.

    python -m ci.child.verify [--blocking] [--first] FILE ...    schedule files, on a small model of plain modules
    python -m ci.child.verify --megatron [--first] NAME ...      DualPipe on Megatron, the cases of ``MEGATRON``

Each object is what ``dualpipe verify --json`` prints, but torch is imported once for all of them.  With ``--first`` it
stops after one that differs.
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
"""The fields of ``reference.megatron.case.Case`` that each case sets.  Without clipping, a wrong norm is reported as
such, and not as the weights that follow from it."""


def verify_file(path: Path, blocking: bool) -> dict[str, object]:
    """The report on one schedule file.  Raises ``RuleError``, ``UndecidedError``, ``OSError``."""
    from dualpipe.schedule.text import load
    from reference.case import Case
    from reference.verify import verify

    return verify(Case(load(path), steps=STEPS, seed=SEED, blocking=blocking, timeout=TIMEOUT_S)).as_json()


def verify_megatron(name: str) -> dict[str, object]:
    """The report on one case on Megatron.  Raises ``RuleError``, ``UndecidedError``."""
    from reference.megatron.case import Case
    from reference.megatron.verify import verify

    return verify(Case(**MEGATRON[name], timeout=MEGATRON_TIMEOUT_S)).as_json()


def report(argument: str, options: frozenset[str]) -> dict[str, object]:
    """The report on one argument with its name, or the error."""
    from dualpipe.errors import RuleError, UndecidedError

    megatron = "--megatron" in options
    name = argument if megatron else Path(argument).stem
    try:
        found = verify_megatron(name) if megatron else verify_file(Path(argument), "--blocking" in options)
        return {**found, "name": name}
    except (RuleError, OSError) as error:
        return {"name": name, "verdict": "bad input", "error": str(error)}
    except UndecidedError as error:
        return {"name": name, "verdict": "unknown", "error": str(error)}


if __name__ == "__main__":
    given = frozenset(argument for argument in sys.argv[1:] if argument.startswith("--"))
    for each in (argument for argument in sys.argv[1:] if argument not in given):
        reported = report(each, given)
        print(json.dumps(reported), flush=True)
        if "--first" in given and reported["verdict"] in ("different", "bad input"):
            break
