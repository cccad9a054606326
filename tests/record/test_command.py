"""``dualpipe record`` checks its options before it runs anything."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dualpipe.cli import app
from dualpipe.cli.record import _with_caveats
from dualpipe.errors import RuleError


def record(*words):
    """The result of ``dualpipe record WORDS -- touch ran`` in an empty folder."""
    return CliRunner().invoke(app, ["record", *map(str, words), "--", "touch", "ran"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "my run"], "one printable word without #"),
        (["--output", "nowhere/x.txt"], "--output is a file that can be written: there is no folder nowhere"),
        (["--output", "."], "--output is a file that can be written: . is a folder"),
        (
            ["--timeout", "-1"],
            "--timeout is more than 0 and at most 1000000 seconds: got -1; give a number in this range",
        ),
        (["--timeout", "nan"], "--timeout is more than 0"),
        (["--stall", "0"], "--stall is more than 0"),
        (["--step", "0"], "--step"),
        (["--waive", "memory"], "--waive is for --prove: got --waive memory alone; add --prove"),
        (["--prove", "--waive", "memori"], "did you mean memory?"),
        (["--session", "0"], "--session"),
        (["--model", "eager"], "--model is for --prove: got --model eager alone; add --prove"),
        (["--prove", "--model", "eagre"], "did you mean eager?"),
        (["--optimistic"], "record has no option --optimistic"),
    ],
)
def test_bad_options_are_rejected_before_the_program_runs(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    result = record(*words)
    if isinstance(result.exception, RuleError):
        assert message in str(result.exception)
    else:
        assert result.exit_code == 2
        assert message in result.output
    assert os.listdir(tmp_path) == []


def test_an_existing_empty_file_may_be_the_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.txt").touch()
    result = record("--output", "x.txt")
    assert "no process called it" in str(result.exception)
    assert Path("ran").exists()


def test_caveats_are_printed_with_the_verdict():
    assert _with_caveats("a on 2 ranks: proved\n  order\n", ["4 ends"]).splitlines() == [
        "a on 2 ranks: proved as far as it was recorded: 4 ends",
        "  order",
    ]
    assert _with_caveats("a on 2 ranks: proved but for memory (waived)\n", ["4 ends"]).splitlines() == [
        "a on 2 ranks: proved but for memory (waived) as far as it was recorded: 4 ends",
    ]
    assert _with_caveats("a on 2 ranks: refuted\n", ["4 ends"]) == "a on 2 ranks: refuted\n"
