"""Writes the page with the timelines of the schedules that changed, before and after, as one HTML file.

    python -m ci.timelines FILE < DATA

The data is one JSON object: ``title``, ``verdict``, ``lead``, ``schedules`` with ``name``, ``before`` and ``after``,
``first`` the name of the one that the page begins with, ``checks`` and ``findings`` as rows of text.  It runs in a
process of its own, as it uses the tree under judgement.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
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
    """One schedule: what is proved of it, its stories over the timeline, beside what it was."""
    from dataclasses import replace

    from dualpipe.cli.page import comparison
    from dualpipe.errors import RuleError
    from dualpipe.page.model import Comparison, Table
    from dualpipe.schedule.text import loads
    from proofs.prove import prove

    try:
        before, after = (loads(text) if text else None for text in (change["before"], change["after"]))
    except RuleError as error:
        told = Table("What is wrong", ("error",), ((str(error),),))
        return Comparison(change["name"], verdict="bad input", tables=(told,))
    if after is None:
        return Comparison(change["name"], before, verdict="removed")
    section = comparison(prove(after, smt=False, label=change["name"]), after, before)
    if section.verdict == "proved":
        return replace(section, verdict="new" if before is None else "unchanged" if before == after else "changed")
    return section


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(json.load(sys.stdin)), encoding="utf-8")
