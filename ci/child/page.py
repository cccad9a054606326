"""Prints the page with the timelines of the schedules that changed, before and after, as one HTML file.

    python -m ci.child.page < DATA > FILE

The data is one JSON object: ``title``, ``verdict``, ``lead``, ``schedules`` with ``name``, ``what``, ``before`` and
``after``, ``first`` the name of the one to show first, ``checks`` and ``findings`` as rows of text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any


def page(data: Mapping[str, Any]) -> str:
    """The page as text."""
    from dualpipe.page.model import Page, Table
    from dualpipe.page.render import render

    checks = Table("Checks", ("check", "verdict", "seconds", "what it did", "run for"), data["checks"])
    findings = Table("Findings", ("rule", "where", "story"), data["findings"])
    schedules = [(schedule["name"] == data["first"], _section(schedule)) for schedule in data["schedules"]]
    sections = [
        *(section for first, section in schedules if first),
        *([findings] if data["findings"] else []),
        checks,
        *(section for first, section in schedules if not first),
    ]
    return render(Page(data["title"], data["verdict"], sections, data["lead"]))


def _section(change: Mapping[str, Any]) -> Any:
    """One schedule: its proof, its stories over the timeline, and beside it the schedule before the change."""
    from dataclasses import replace

    from dualpipe.cli.page import comparison
    from dualpipe.errors import RuleError
    from dualpipe.page.model import Comparison, Table
    from dualpipe.schedule.text import loads
    from proofs.prove import prove

    try:
        before, after = (loads(text) if text else None for text in (change["before"], change["after"]))
    except RuleError as error:
        table = Table("What is wrong", ("error",), ((str(error),),))
        return Comparison(change["name"], verdict="bad input", tables=(table,))
    if after is None:
        return Comparison(change["name"], before, verdict="removed")
    section = comparison(prove(after, smt=False, label=change["name"]), after, before)
    return replace(section, verdict=change["what"]) if section.verdict == "proved" else section


if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr  # what the tree prints is not the answer
    answer.write(page(json.load(sys.stdin)))
