"""Writes the reports: the one place with effects."""

from __future__ import annotations

import os
from pathlib import Path

from ci.judgement import Judgement
from ci.report.junit import junit
from ci.report.markdown import markdown
from ci.report.sarif import sarif
from ci.report.terminal import terminal

SUMMARY = "GITHUB_STEP_SUMMARY"
"""The environment variable that names the file of a job's summary."""


def publish(judgement: Judgement, root: Path, output: Path | None, html: Path | None) -> None:
    """Write all reports into ``output``, and add the Markdown page to the job's summary where there is one."""
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("gate.md", markdown(judgement)),
            ("gate.xml", junit(judgement)),
            ("gate.sarif", sarif(judgement)),
            ("gate.json", terminal(judgement, as_json=True)),
        ):
            (output / name).write_text(text)
    summary = os.environ.get(SUMMARY)
    if summary:
        with Path(summary).open("a") as file:
            file.write(markdown(judgement))
