"""Writes the reports: the one place with effects."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ci.judgement import Judgement
from ci.process import python, run
from ci.report.junit import junit
from ci.report.markdown import markdown
from ci.report.page import page
from ci.report.sarif import sarif
from ci.report.terminal import terminal

PAGE_LIMIT_S = 120.0
SUMMARY = "GITHUB_STEP_SUMMARY"
"""The environment variable that names the file of a job's summary."""


def publish(judgement: Judgement, root: Path, output: Path | None, html: Path | None) -> list[str]:
    """Write all reports into ``output``, and add the Markdown page to the job's summary where there is one.

    Returns what could not be written, with the reason: a tree that is refused may be too broken to draw.
    """
    pages = [html.resolve()] if html is not None else []
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("gate.md", markdown(judgement)),
            ("gate.xml", junit(judgement)),
            ("gate.sarif", sarif(judgement)),
            ("gate.json", terminal(judgement, as_json=True)),
        ):
            (output / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        pages.append((output / "gate.html").resolve())
    summary = os.environ.get(SUMMARY)
    if summary:
        with Path(summary).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(markdown(judgement))
    return [problem for page in pages if (problem := _write_page(judgement, root, page))]


def _write_page(judgement: Judgement, root: Path, file: Path) -> str:
    """Write the page with the timelines; returns why it could not be, or nothing."""
    done = run(python("-m", "ci.timelines", str(file)), root, PAGE_LIMIT_S, given=json.dumps(page(judgement)))
    if done.code == 0:
        return ""
    return f"{file.name}: {f'{PAGE_LIMIT_S:g} s were not enough' if done.code is None else done.last_words}"
