"""Writes the reports: the one place with effects."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ci.errors import GateError
from ci.judgement import Judgement
from ci.process import python, run
from ci.report.junit import junit
from ci.report.markdown import complaint_in_markdown, markdown
from ci.report.page import page
from ci.report.sarif import sarif
from ci.report.terminal import complaint, terminal

PAGE_LIMIT_S = 120.0
SUMMARY = "GITHUB_STEP_SUMMARY"
"""The environment variable that names the file of a job's summary."""


def require_writable(output: Path | None, html: Path | None) -> None:
    """Make the reports' folder, and raise ``GateError``, before any work is done, for what cannot be written."""
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GateError("--output is a folder for the reports", str(error), "name another") from error
        if not os.access(output, os.W_OK | os.X_OK):
            raise GateError("--output is a folder for the reports", f"{output} is not writable", "name another")
    if html is not None:
        rule, remedy = "--html is a file that can be written", "make its folder, or name another file"
        if html.is_dir():
            raise GateError(rule, f"{html} is a folder", remedy)
        if not os.access(html if html.exists() else html.parent, os.W_OK):
            raise GateError(rule, f"{html} cannot be written", remedy)


def publish(judgement: Judgement, root: Path, output: Path | None, html: Path | None) -> list[str]:
    """Write all reports into ``output``, and add the Markdown page to the job's summary where there is one.

    Returns what could not be written, with the reason: a tree that is refused may be too broken to draw.
    """
    pages = [html.resolve()] if html is not None else []
    texts = {"gate.xml": junit(judgement), "gate.sarif": sarif(judgement)} if output is not None else {}
    _write(markdown(judgement), terminal(judgement, as_json=True), output, texts)
    if output is not None:
        pages.append((output / "gate.html").resolve())
    return [problem for page in pages if (problem := _write_page(judgement, root, page))]


def publish_complaint(error: GateError, output: Path | None) -> None:
    """Say where a job's reports are looked for that nothing was judged; what is there of another run goes."""
    if output is not None and not (output.is_dir() and os.access(output, os.W_OK)):
        output = None
    if output is not None:
        for name in ("gate.xml", "gate.sarif", "gate.html"):
            (output / name).unlink(missing_ok=True)
    _write(complaint_in_markdown(error), json.dumps(complaint(error)) + "\n", output, {})


def _write(page: str, data: str, output: Path | None, more: Mapping[str, str]) -> None:
    """Write the reports that are text, and add the Markdown page to the job's summary where there is one."""
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in {"gate.md": page, "gate.json": data, **more}.items():
            (output / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    summary = os.environ.get(SUMMARY)
    if summary:
        with Path(summary).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(page)


def _write_page(judgement: Judgement, root: Path, file: Path) -> str:
    """Write the page with the timelines; returns why it could not be, or nothing."""
    if file.is_file():
        file.unlink()  # one of another run would be taken for this one's
    done = run(python("-m", "ci.timelines", str(file)), root, PAGE_LIMIT_S, given=json.dumps(page(judgement)))
    if done.code == 0:
        return ""
    return f"{file.name}: {f'{PAGE_LIMIT_S:g} s were not enough' if done.code is None else done.last_words}"
