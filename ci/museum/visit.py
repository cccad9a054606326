"""One exhibit tried: planted in a scratch clone, judged by the gate there, and the gate judged by what it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ci.errors import GateError
from ci.museum.clone import bring_up_to_date, clone
from ci.museum.exhibit import Exhibit
from ci.process import python, run

LIMIT_S = 1800.0
"""More than the gate's own checks take together until their time is up: it has to say so itself."""


@dataclass(frozen=True)
class Visit:
    """What the gate did.  ``refused_by`` is the check, and the rule where it has one; ``wrong`` what it should not."""

    exhibit: Exhibit
    verdict: str
    refused_by: str
    first_line: str
    seconds: float
    wrong: str

    @property
    def right(self) -> bool:
        return not self.wrong

    def as_json(self) -> dict[str, Any]:
        exhibit = self.exhibit
        return {
            "number": exhibit.number,
            "title": exhibit.title,
            "path": exhibit.path,
            "expected": f"{exhibit.check}/{exhibit.rule}" if exhibit.check else "passed",
            "verdict": self.verdict,
            "refused_by": self.refused_by,
            "first_line": self.first_line,
            "seconds": round(self.seconds, 1),
            "right": self.right,
            "wrong": self.wrong,
        }


def visit(exhibit: Exhibit, template: Path, folder: Path) -> Visit:
    """Plant one exhibit and run the gate on it."""
    with clone(template, folder) as root:
        try:
            exhibit.plant(root)
        except GateError as error:
            return Visit(exhibit, "not planted", "", "", 0.0, str(error))
        bring_up_to_date(root)
        done = run(python("-m", "ci.gate", "--base", "HEAD", "--first", "--json"), root, LIMIT_S)
    if done.code is None:
        return Visit(exhibit, "timed out", "", "", done.seconds, f"the gate gave no answer in {LIMIT_S:g} s")
    try:
        told = json.loads(done.out)
    except json.JSONDecodeError:
        return Visit(exhibit, "crashed", "", done.last_words, done.seconds, f"the gate crashed: {done.last_words}")
    return assess(exhibit, told, done.seconds)


def assess(exhibit: Exhibit, told: Mapping[str, Any], seconds: float) -> Visit:
    """Hold what the gate says against what it should say."""
    refusing = [check for check in told["checks"] if check["verdict"] == "refused"]
    unknown = [check for check in told["checks"] if check["verdict"] == "unknown"]
    if not refusing:
        if exhibit.harmless and told["verdict"] == "passed":
            return Visit(exhibit, "passed", "", "", seconds, "")
        first = unknown[0]["told"] if unknown else ""
        wrong = f"it was not refused: {told['verdict']} {first}"
        return Visit(exhibit, told["verdict"], "", first, seconds, wrong.strip())
    check = refusing[0]
    fitting = [f for f in check["findings"] if f["rule"] == exhibit.rule and exhibit.fits(f["message"])]
    shown = (fitting or check["findings"])[0]
    by, first = f"{check['check']}/{shown['rule']}", shown["message"].splitlines()[0]
    if exhibit.harmless:
        wrong = "a harmless change was refused"
    elif check["check"] != exhibit.check or not fitting:
        wrong = f"it should be refused by {exhibit.check}/{exhibit.rule}, saying {exhibit.says!r}"
    else:
        wrong = f"{unknown[0]['check']} gave no answer: {unknown[0]['told']}" if unknown else ""
    return Visit(exhibit, told["verdict"], by, first, seconds, wrong)
