"""A ``Page`` as one HTML file: the template, style and script of this package with the data written in.

All text is escaped, and a content security policy lets nothing run but the page's own script, known by its hash, and
nothing be fetched at all.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from dualpipe.page import colours
from dualpipe.page.changes import Change, changed_lanes, changes
from dualpipe.page.drawing import Run, drawing, marked, run
from dualpipe.page.model import VERDICTS, Comparison, Counterexample, Gallery, Page, Table
from dualpipe.page.numbers import numbers
from dualpipe.schedule import Schedule, show_slot
from dualpipe.timeline.chart import tones

_SCRIPTS = ("schedule", "layout", "view", "words", "paint", "arrows", "timeline", "memory", "section", "main")
_MOST_OPEN = 40
"""How many changed lines a section shows before they are folded away."""


def render(page: Page) -> str:
    """The whole page as text, to be written as UTF-8.

    Raises
    ------
    RuleError
        If a mark points at something that its schedule does not have.
    """
    drawn = [section for section in page.sections if not isinstance(section, Table)]
    style, script = _style(drawn), _script()
    numbered = iter(range(1, len(page.sections) + 1))
    sections = [
        _table(section) if isinstance(section, Table) else _section(section, f"s{next(numbered)}")
        for section in page.sections
    ]
    return Template(_read("page.html")).substitute(
        title=escape(page.title),
        verdict=_badge(page.verdict),
        lead=f'<p class="lead">{escape(page.lead)}</p>' if page.lead else "",
        contents=_contents(drawn) if len(drawn) > 1 else "",
        sections="\n".join(sections),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
    )


def _section(section: Comparison | Gallery, anchor: str) -> str:
    return _gallery(section, anchor) if isinstance(section, Gallery) else _comparison(section, anchor)


def _gallery(section: Gallery, anchor: str) -> str:
    most = max((steps.peak for each in section.drawn for steps in each.memory), default=0.0) or 1.0
    drawings = [
        {
            "title": each.name,
            "caption": each.caption,
            "memory": {"levels": [steps.flat for steps in each.memory], "most": most, "unit": section.unit},
            **drawing(Run(each.timeline)),
        }
        for each in section.drawn
    ]
    data = {"name": section.name, "drawings": drawings, "counterexamples": []}
    parts = [
        f'<section class="comparison" id="{anchor}" aria-labelledby="{anchor}-name">',
        f'<header><h2 id="{anchor}-name">{escape(section.name)}</h2>',
        f'<p class="source">{escape(section.source)}</p></header>',
        '<div class="layout"><div class="board"></div></div>',
        f'<script type="application/json" class="data">{_json(data)}</script>',
        "</section>",
    ]
    return "\n".join(parts)


def _comparison(section: Comparison, anchor: str) -> str:
    shown = [(word, value) for word, value in (("before", section.before), ("after", section.after)) if value]
    runs = [run(value, section.costs, section.blocking) for _, value in shown]
    both = section.before is not None and section.after is not None
    found = changes(section.before, section.after) if section.before and section.after else ()
    data = _data(section, shown, runs, found)
    parts = [
        f'<section class="comparison" id="{anchor}" aria-labelledby="{anchor}-name">',
        f'<header><h2 id="{anchor}-name">{escape(section.name)}</h2>{_badge(section.verdict)}',
        f'<p class="source">{escape(_facts(section))}</p></header>',
        f'<div class="layout{" with-stories" if section.counterexamples else ""}">',
        '<div class="board"></div>',
        _stories(section.counterexamples),
        '<div class="tables">',
        *(_table(table) for table in section.tables),
        _table(numbers(runs, both)) if runs else "",
        _difference(section.before, section.after, found) if section.before and section.after else "",
        "</div></div>",
        f'<script type="application/json" class="data">{_json(data)}</script>',
        "</section>",
    ]
    return "\n".join(filter(None, parts))


def _data(
    section: Comparison, shown: Sequence[tuple[str, Schedule]], runs: Sequence[Run], found: Sequence[Change]
) -> dict[str, Any]:
    drawings = []
    for (word, _), ran in zip(shown, runs, strict=True):
        changed = [slot for change in found for slot in _slots(change, word)]
        title = word if len(shown) > 1 else ""
        drawings.append({"title": title, "caption": title.capitalize(), **drawing(ran, changed)})
    last = section.after or section.before
    return {
        "name": section.name,
        "drawings": drawings,
        "counterexamples": [
            {
                "title": example.title,
                "story": example.story,
                "marks": [marked(last, mark) for mark in example.marks] if last else [],
            }
            for example in section.counterexamples
        ],
    }


def _slots(change: Change, word: str) -> Iterator[tuple[int, int]]:
    first, slots = (change.before, change.removed) if word == "before" else (change.after, change.added)
    return ((change.rank, first + offset) for offset in range(len(slots)))


def _facts(section: Comparison) -> str:
    schedule = section.after or section.before
    size = ""
    if schedule is not None:
        counts = ", ".join(f"{count} on lane {lane}" for lane, count in schedule.microbatches.items())
        size = f"{schedule.ranks} ranks, {schedule.stages} stages, microbatches: {counts}"
        size += "; drawn with blocking messages" if section.blocking else ""
    return " · ".join(filter(None, [section.source, size]))


def _contents(sections: Sequence[Comparison | Gallery]) -> str:
    rows = "".join(
        f'<li><a href="#s{number}">{escape(section.name)}</a> '
        f"{_badge(section.verdict) if isinstance(section, Comparison) else ''}"
        f"<small>{escape(section.source)}</small></li>"
        for number, section in enumerate(sections, 1)
    )
    return f'<nav aria-label="Schedules on this page"><ol class="contents">{rows}</ol></nav>'


def _stories(counterexamples: Sequence[Counterexample]) -> str:
    """The stories in words; the script makes them point at the timeline."""
    stories = (f'<h3>{escape(one.title)}</h3><p class="plain">{escape(one.story)}</p>' for one in counterexamples)
    text = "".join(stories)
    return f'<aside class="stories" aria-label="Counterexample">{text}</aside>' if text else ""


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return (
        f'<div class="table"><table><caption>{escape(table.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    if text in VERDICTS:
        return f"<td>{_badge(text)}</td>"
    return f"<td>{escape(text)}</td>"


def _badge(verdict: str) -> str:
    if not verdict:
        return ""
    kind = verdict.replace(" ", "-") if verdict in VERDICTS else "other"
    return f'<span class="badge {kind}">{escape(verdict)}</span>'


def _difference(before: Schedule, after: Schedule, found: Sequence[Change]) -> str:
    lanes = changed_lanes(before, after)
    lines = [_line(sign, "lane", text) for pair in lanes for sign, text in zip("-+", pair, strict=True) if text]
    rank = None
    for change in found:
        if change.rank != rank:
            rank = change.rank
            lines.append(f'<tr class="rank"><th colspan="3" scope="rowgroup">rank {rank}</th></tr>')
        for sign, first, slots in (("-", change.before, change.removed), ("+", change.after, change.added)):
            lines += [_line(sign, str(first + offset), show_slot(slot)) for offset, slot in enumerate(slots)]
    if not lines:
        return '<p class="same">Before and after are the same, slot by slot.</p>'
    ranks = len({change.rank for change in found})
    title = f"Changed slots: {len(lines) - ranks} lines, {ranks} rank{'s' if ranks != 1 else ''}"
    return (
        f'<details class="difference"{" open" if len(lines) <= _MOST_OPEN else ""}><summary>{title}</summary>'
        f"<table><tbody>{''.join(lines)}</tbody></table></details>"
    )


def _line(sign: str, place: str, text: str) -> str:
    kind, word = ("removed", "removed") if sign == "-" else ("added", "added")
    return (
        f'<tr class="{kind}"><td aria-label="{word}">{"−" if sign == "-" else "+"}</td>'
        f"<td>{escape(place)}</td><td><code>{escape(text)}</code></td></tr>"
    )


def _json(data: object) -> str:
    """JSON for the inside of a script element: no ``<`` can end it."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


@cache
def _read(name: str) -> str:
    return (files("dualpipe.page") / name).read_text(encoding="utf-8")


def _style(sections: Sequence[Comparison | Gallery]) -> str:
    """The style of every page, after the colours that the schedules of this one need."""
    schedules = [schedule for section in sections for schedule in _schedules(section)]
    return colours.style(len(tones(schedule)) for schedule in schedules) + _read("page.css")


def _schedules(section: Comparison | Gallery) -> list[Schedule]:
    if isinstance(section, Gallery):
        return [each.timeline.schedule for each in section.drawn]
    return [side for side in (section.before, section.after) if side is not None]


@cache
def _script() -> str:
    """The script files in order, in one scope of their own."""
    body = "\n".join(_read(f"{name}.js") for name in _SCRIPTS)
    return f'(() => {{\n"use strict";\n{body}\n}})();\n'


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
