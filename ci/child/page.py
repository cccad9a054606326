"""Prints an HTML page with the timelines of the schedules that a change affects, before and after the change.

    python -m ci.child.page < DATA > FILE

The data is one JSON object::

    title, verdict, lead    the head of the page
    schedules               a list; each has ``name``, ``what`` (what has changed), and the texts ``before`` and
                            ``after``, ``null`` for a schedule that was added or removed
    first                   the name of the schedule to show first
    checks, findings        the rows of two tables
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any


def page(data: Mapping[str, Any]) -> str:
    """The page as HTML."""
    from dualpipe.page.model import Page, Table
    from dualpipe.page.render import render

    checks = Table("Checks", ("check", "verdict", "seconds", "what it did", "run for"), data["checks"])
    findings = Table("Findings", ("rule", "where", "story"), data["findings"])
    schedules = [(schedule["name"] == data["first"], _section(schedule)) for schedule in data["schedules"]]
    sections = [
        *(section for is_first, section in schedules if is_first),
        *([findings] if data["findings"] else []),
        checks,
        *(section for is_first, section in schedules if not is_first),
    ]
    return render(Page(data["title"], data["verdict"], sections, data["lead"]))


def _section(change: Mapping[str, Any]) -> Any:
    """The section of one schedule: its timelines before and after, and the verdicts and stories of plain search."""
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
    output, sys.stdout = sys.stdout, sys.stderr  # whatever the imported code prints must not get into the page
    output.write(page(json.load(sys.stdin)))
