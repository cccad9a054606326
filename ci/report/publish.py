"""Writes the reports.  No other module of this package has side effects."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ci import GateError
from ci.evaluation import Evaluation
from ci.process import python, run
from ci.report.junit import junit
from ci.report.markdown import bad_input_in_markdown, markdown
from ci.report.page import page
from ci.report.sarif import sarif
from ci.report.terminal import bad_input, terminal

PAGE_LIMIT_S = 120.0
NAMES = ("gate.md", "gate.xml", "gate.sarif", "gate.json", "gate.html")
SUMMARY = "GITHUB_STEP_SUMMARY"
"""The environment variable that names the file of a job's summary."""


def prepare(output: Path | None, html: Path | None) -> None:
    """Remove the reports of an earlier run, so that nobody mistakes them for those of this run.

    It is called before the checks run.  Raises ``GateError`` for a report that could not be written.
    """
    if output is not None:
        with _as_bad_input("--output must be a folder for the reports"):
            output.mkdir(parents=True, exist_ok=True)
            for name in NAMES:
                _clear(output / name)
    if html is not None:
        with _as_bad_input("--html is a file that can be written"):
            _clear(html)
    if summary := os.environ.get(SUMMARY):
        with _as_bad_input(f"{SUMMARY} names a file that can be written"), Path(summary).open("a"):
            pass


@contextmanager
def _as_bad_input(rule: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GateError(rule, str(error), "make it writable, or name another") from error


def _clear(file: Path) -> None:
    """Remove a file, or empty it if its folder forbids removal.  Raises ``OSError`` if it cannot be written."""
    file.open("w").close()
    if file.is_file():
        with suppress(OSError):
            file.unlink()


def publish(evaluation: Evaluation, root: Path, output: Path | None, html: Path | None) -> list[str]:
    """Write all reports into ``output``, and add the Markdown page to the job's summary if the job has one.

    Returns a line with the reason for each report that could not be written, since a refused tree may be too broken to
    draw its timelines.
    """
    problems = _write_page_and_data(markdown(evaluation), terminal(evaluation, as_json=True), output)
    pages = [html] if html is not None else []
    if output is not None:
        problems += _write(output / "gate.xml", junit(evaluation)) + _write(output / "gate.sarif", sarif(evaluation))
        pages.append(output / "gate.html")
    return problems + _draw(evaluation, root, pages)


def publish_bad_input(error: Exception, output: Path | None) -> None:
    """Write an error into the Markdown page, the JSON file and the job's summary, in place of the evaluation.

    A file that cannot be written is skipped.
    """
    _write_page_and_data(bad_input_in_markdown(error), json.dumps(bad_input(error)) + "\n", output)


def _write_page_and_data(page: str, data: str, output: Path | None) -> list[str]:
    """Write the Markdown page and the JSON file, and add the page to the job's summary if the job has one."""
    problems = []
    if output is not None:
        problems += _write(output / "gate.md", page) + _write(output / "gate.json", data)
    if summary := os.environ.get(SUMMARY):
        problems += _write(Path(summary), page, "a")
    return problems


def _write(file: Path, text: str, mode: str = "w") -> list[str]:
    """Write a file.  Returns a line with the reason if it cannot be written, else nothing."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open(mode, encoding="utf-8", errors="backslashreplace") as opened:
            opened.write(text)
    except OSError as error:
        return [f"{file.name}: {error}"]
    return []


def _draw(evaluation: Evaluation, root: Path, files: Sequence[Path]) -> list[str]:
    """Write the page with the timelines to each of the files.  Returns a line for each that could not be written."""
    if not files:
        return []
    done = run(python("-m", "ci.child.page"), root, PAGE_LIMIT_S, stdin=json.dumps(page(evaluation)))
    if done.code == 0:
        return [problem for file in files for problem in _write(file, done.out)]
    why = f"no answer within {PAGE_LIMIT_S:g} s" if done.code is None else done.last_line
    return [f"{file.name}: {why}" for file in files]
