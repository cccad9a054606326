"""The lines of the program that an error names, and its text."""

import sys

import pytest

from dualpipe.record import assemble
from dualpipe.record.child.errors import describe
from dualpipe.record.events import read
from dualpipe.schedule import UP
from dualpipe.schedule.text import loads
from tests.record.logs import Rank
from tests.record.run import command


def test_an_error_outside_of_modules_names_the_lines_that_called_the_package_in_which_it_was_raised():
    names = {"__name__": "other"}
    for file, source in (
        ("/env/site-packages/a.py", "def inner(): raise ValueError\ndef outer(): inner()"),
        ("/home/schedules.py", "def backward(): outer()"),
        ("/home/train.py", "def train(): backward()"),
    ):
        exec(compile(source, file, "exec"), names)
    try:
        names["train"]()
    except ValueError as error:
        place = describe(error)["place"]
    assert place.startswith("/env/site-packages/a.py:1 (called at /home/schedules.py:1, /home/train.py:1, ")


def test_only_the_text_of_a_long_error_is_cut():
    one, place = Rank(0), f"{'a' * 600}.py:1"
    raised = {
        "error": "ValueError",
        "text": "shapes " + "b" * 600,
        "during": None,
        "time": 5.0,
        "place": place,
        "at": place,
    }
    one.events.append({"event": "raised", "at": place, **raised})
    (failure,) = assemble([read(0, one.events)], codes=(1,)).schedule.failures
    cut = f"shapes {'b' * 492}…"
    assert str(failure) == f"rank 0 raised ValueError at {place} before its first op: {cut}"


@pytest.mark.parametrize("codes", [(), (1,)])
def test_the_message_of_sys_exit_is_no_exit_code(codes):
    one = Rank(0)
    raised = {"error": "SystemExit", "text": "no such mode", "during": None, "time": 5.0, "place": "a.py:1"}
    one.events.append({"event": "raised", "at": "a.py:1", **raised})
    (failure,) = assemble([read(0, one.events)], codes=codes).schedule.failures
    assert str(failure) == "rank 0 ended with exit code 1 before its first op: no such mode"


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise LookupError


def test_an_error_whose_text_raises_another_one_is_described():
    assert describe(UnspeakableError())["text"] == "its __str__ raises LookupError"


EARLY = """
import os, torch, torch.distributed as dist
if os.environ["RANK"] == "1":
    raise KeyError("option")
dist.init_process_group("gloo")
"""


@pytest.mark.long
def test_the_command_records_an_error_before_a_rank_joined_the_process_group(tmp_path):
    (tmp_path / "early.py").write_text(EARLY)
    words = ["-P", 2, "--timeout", 30, "--prove", "-o", tmp_path / "recorded.txt", "--lanes", "1 0"]
    result = command(*words, "--", sys.executable, tmp_path / "early.py")
    assert result.returncode == 1, result.stderr
    assert (result.stdout + result.stderr).count("rank 1 raised KeyError at ") == 1
    written = (tmp_path / "recorded.txt").read_text()
    recorded = loads(written)
    assert str(recorded.failures[0]) == f"rank 1 raised KeyError at {tmp_path}/early.py:4 before its first op: 'option'"
    assert str(recorded.failures[1]).endswith(f"it was stopped before its first op, at {tmp_path}/early.py:5")
    assert recorded.routes == {UP: (1, 0)}
    assert "# a proof of this file does not cover everything: ranks 0 1 did not finish" in written
