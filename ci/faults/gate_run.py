"""A run of the gate on a planted fault, in a scratch clone, and whether it found what it should."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ci import GateError
from ci.faults.clone import clone, update_records
from ci.faults.fault import SourceFault
from ci.process import python, run

LIMIT_S = 1800.0
"""Longer than the gate's own time limits in total, so that the gate reports a check that ran out of time."""


@dataclass(frozen=True)
class GateRun:
    """What the gate did with a fault.

    ``refused_by`` is the check with its rule, ``first_line`` that of its finding, ``wrong`` what is not as expected.
    """

    fault: SourceFault
    verdict: str
    refused_by: str
    first_line: str
    seconds: float
    wrong: str

    @property
    def right(self) -> bool:
        return not self.wrong

    def as_json(self) -> dict[str, Any]:
        fault = self.fault
        return {
            "number": fault.number,
            "title": fault.title,
            "path": fault.path,
            "expected": "passed" if fault.harmless else fault.checks[0],
            "verdict": self.verdict,
            "refused_by": self.refused_by,
            "first_line": self.first_line,
            "seconds": round(self.seconds, 1),
            "right": self.right,
            "wrong": self.wrong,
        }


def run_gate(fault: SourceFault, template: Path, folder: Path) -> GateRun:
    """Plant a fault in a clone and run the gate there."""
    with clone(template, folder) as root:
        try:
            fault.plant(root)
        except GateError as error:
            return GateRun(fault, "not planted", "", "", 0.0, str(error))
        update_records(root)
        done = run(python("-m", "ci.gate", "--base", "HEAD", "--first", "--json"), root, LIMIT_S)
    if done.code is None:
        return GateRun(fault, "timed out", "", "", done.seconds, f"the gate did not end within {LIMIT_S:g} s")
    try:
        report = json.loads(done.out)
    except json.JSONDecodeError:
        return GateRun(fault, "crashed", "", done.last_line, done.seconds, f"the gate crashed: {done.last_line}")
    return compare(fault, report, done.seconds)


def compare(fault: SourceFault, report: Mapping[str, Any], seconds: float) -> GateRun:
    """Compare the gate's report with what the fault expects."""
    refusing = [check for check in report["checks"] if check["verdict"] == "refused"]
    unknown = [check for check in report["checks"] if check["verdict"] == "unknown"]
    if not refusing:
        if fault.harmless and report["verdict"] == "passed":
            return GateRun(fault, "passed", "", "", seconds, "")
        first = unknown[0]["told"] if unknown else ""
        wrong = f"it was not refused: {report['verdict']} {first}"
        return GateRun(fault, report["verdict"], "", first, seconds, wrong.strip())
    check = refusing[0]
    found = [(f"{check['check']}/{finding['rule']}", finding["message"]) for finding in check["findings"]]
    expected = [(by, message) for by, message in found if by in fault.checks and fault.matches(message)]
    by, message = (expected or found)[0]
    if fault.harmless:
        wrong = "a harmless change was refused"
    elif not expected:
        wrong = f"expected a refusal by {fault.checks[0]} that matches {fault.says!r}"
    else:
        wrong = f"{unknown[0]['check']} has no verdict: {unknown[0]['told']}" if unknown else ""
    return GateRun(fault, report["verdict"], by, message.splitlines()[0], seconds, wrong)
