"""``module:function``: what it may return, how it gets its sizes, and the error for each fault."""

import json
import os
import sys

import pytest

from dualpipe.cli import entrypoint
from dualpipe.schedule.entrypoint import MOST
from dualpipe.schedule.generate import generate
from dualpipe.schedule.text import loads

MODULE = '''
import dualpipe as d

def one():
    return d.zb1p(2, 4)

def text():
    return d.dumps(one())

def sized(ranks, microbatches=8):
    return d.dualpipe(ranks, microbatches)

def any_size(**sizes):
    return d.one_f_one_b(**sizes)

def several():
    print("on its way")
    yield one()
    yield d.dumps(d.dualpipe(2, 4))

def stuck():
    """Rank 0 waits for the gradient before it sends the activation."""
    return """lane > 0 1
rank 0: 0F0> 0RB0> 0B0>+0W0> 0SF0>
rank 1: 1RF0> 1F0> 1B0>+1W0> 1SB0>
"""

def odd():
    return d.dualpipe(3, 6)

def crash():
    return 1 / 0

def leaves():
    raise SystemExit(0)

def needs(stages):
    return one()

def number():
    return 7

async def later():
    return one()

async def one_by_one():
    yield one()

def mapping():
    return {"zb1p": one()}

def mixed():
    return [one(), None]

def nothing():
    return []

def for_ever():
    while True:
        yield one()

def no_text():
    return "lane > 0\\nrank 0: 0F0> 0X0>"

class Unreadable(Exception):
    def __str__(self):
        raise ValueError("no text")

def unreadable():
    raise Unreadable

def two_lines():
    raise ValueError("one\\ntwo")

def shell():
    import os
    os.system("echo from a child")
    return one()

TUPLE, INSTANCE = (1, 2), Unreadable()

class Family:
    @staticmethod
    def member():
        return one()

VALUE = one()
'''


@pytest.fixture
def run(run, tmp_path, monkeypatch):
    """The command line in a folder with the module ``mine``."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import json\nraise LookupError('not today')\n")
    (tmp_path / "needy.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.parametrize("name", ["mine:one", "mine:text", "mine:Family.member"])
def test_a_function_may_return_a_schedule_or_its_text(run, name):
    assert loads(run("show", name).out) == generate("zb1p", 2, 4)
    assert loads(run("show", "--schedule", name).out) == generate("zb1p", 2, 4)


def test_sizes_are_passed_by_name_where_the_function_takes_them(run):
    assert loads(run("show", "mine:sized", "-P", 2).out) == generate("dualpipe", 2, 8)
    assert loads(run("show", "mine:sized", "-P", 2, "-M", 6).out) == generate("dualpipe", 2, 6)
    assert loads(run("show", "mine:any_size", "-P", 3, "-M", 5).out) == generate("1f1b", 3, 5)


def test_a_function_without_sizes_must_have_those_that_are_asked_for(run):
    assert run("show", "mine:one", "-P", 2, "-M", 4).code == 0
    result = run("show", "mine:one", "-P", 4)
    assert result.code == 2
    assert "mine:one has 2, -P asks for 4" in result.err


def test_every_command_takes_one(run):
    assert json.loads(run("simulate", "mine:one", "--json").out)["makespan"] == 13
    assert json.loads(run("prove", "mine:one", "--json").out)["verdict"] == "proved"
    assert json.loads(run("verify", "mine:one", "--steps", 1, "--json").out)["verdict"] == "equal"


def test_a_wrong_schedule_is_refuted(run):
    result = run("prove", "mine:stuck")
    assert result.code == 1
    assert "mine:stuck on 2 ranks: refuted" in result.out


def test_several_schedules_are_proved_one_by_one_and_the_functions_output_stays_out_of_the_report(run):
    result = run("prove", "mine:several", "mine:one", "--json")
    assert result.code == 0
    printed = [json.loads(line) for line in result.out.splitlines()]
    assert [(one["source"], one["schedule"]) for one in printed] == [
        ("mine:several[0]", "zb1p"),
        ("mine:several[1]", "dualpipe"),
        ("mine:one", "zb1p"),
    ]
    assert result.err == "on its way\n"


@pytest.mark.parametrize("name", ["mine:TUPLE.foo", "mine:INSTANCE.foo", "mine:Family.foo"])
def test_a_missing_member_is_bad_input(run, name):
    result = run("show", name)
    assert result.code == 2
    assert f"{name.removesuffix('.foo').replace(':', '.')} has no foo" in result.err


def test_an_error_of_the_function_is_reported_on_one_line(run):
    for name, message in (
        ("mine:unreadable", "Unreadable: (its text raised an error)"),
        ("mine:two_lines", "ValueError: one ("),
    ):
        result = run("show", name)
        assert result.code == 2
        assert message in result.err
        assert len(result.err.splitlines()) == 1


def test_the_output_of_a_child_of_the_function_stays_out_of_the_report(run):
    result = run("prove", "mine:shell", "--json", "--model", "blocking")
    assert json.loads(result.out)["verdict"] == "proved"
    assert result.err == "from a child\n"


HOSTILE = """
import asyncio, atexit, json, os, signal, sys, threading, time
import dualpipe, dualpipe.schedule.entrypoint, dualpipe.schedule

def one(): return dualpipe.zb1p(2, 4)

def exits_at_once(): os._exit(0)
def exits(): sys.exit(0)
def is_cancelled(): raise asyncio.CancelledError("by whom")
def is_skipped(): raise type("Skipped", (BaseException,), {})("no GPU")
def is_killed(): os.kill(os.getpid(), signal.SIGKILL)
def crashes(): os.kill(os.getpid(), signal.SIGSEGV)
def replaces(): os.rename = None; return one()
def forges(): return Forged("no schedule")
def hangs():
    threading.Event().wait()
def stops(): os.kill(os.getpid(), signal.SIGSTOP)

class Forged(str):
    def __str__(self): raise KeyboardInterrupt

def leaves_a_thread():
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return one()
def leaves_a_child():
    if os.fork() == 0: time.sleep(1000)
    return one()
def returns_twice():
    os.fork()
    return one()
def changes_folder(): os.chdir("/"); return one()
def closes_files(): os.closerange(0, 256); return one()
def exits_afterwards():
    atexit.register(os._exit, 1)
    return one()
def prints_much():
    print("x" * 10**6)
    return one()
"""


@pytest.fixture
def hostile(run, tmp_path):
    (tmp_path / "hostile.py").write_text(HOSTILE)
    return run


def test_an_entry_point_that_returns_nothing_is_bad_input_however_it_ends(hostile, tmp_path):
    messages = {
        "exits_at_once": "ended its process with exit code 0; have it return instead",
        "exits": "raised SystemExit: 0",
        "is_cancelled": "raised CancelledError: by whom",
        "is_skipped": "raised Skipped: no GPU",
        "is_killed": "was killed by SIGKILL",
        "crashes": f"was killed by SIGSEGV ({tmp_path}/hostile.py:12, in crashes)",
        "replaces": "ended its process with exit code 1",
        "forges": "hostile:forges:1:1: found 'no'",
    }
    names = [f"hostile:{name}" for name in messages]
    result = hostile("prove", *names, "--json")
    assert result.code == 2
    answers = [json.loads(line) for line in result.out.splitlines()]
    assert [answer["verdict"] for answer in answers] == ["bad input"] * len(messages)
    for answer, words in zip(answers, messages.values(), strict=True):
        assert words in answer["error"]
    assert os.getcwd() == str(tmp_path)


def test_an_entry_point_that_does_not_end_is_killed_and_bad_input(hostile, tmp_path, monkeypatch):
    at = HOSTILE.splitlines().index("    threading.Event().wait()") + 1
    place = f"hostile:hangs had not returned after 1 s; at that moment it was at {tmp_path}/hostile.py:{at}, in hangs; "
    monkeypatch.setattr(entrypoint, "_LATE", 30.0)  # on a busy machine the process begins late
    hangs = hostile("prove", "hostile:hangs", "--json", "--entry-timeout", 1)
    assert hangs.code == 2
    assert place in hangs.out
    monkeypatch.setattr(entrypoint, "_LATE", 0.1)
    stops = hostile("prove", "hostile:stops", "--json", "--entry-timeout", 1)
    assert stops.code == 2
    assert "hostile:stops had not returned after 1 s" in stops.out


def test_an_entry_point_that_returns_is_proved_whatever_else_it_does(hostile, tmp_path, monkeypatch):
    monkeypatch.setattr(entrypoint, "_AFTERWARDS", 0.1)
    kept = "leaves_a_thread leaves_a_child returns_twice changes_folder closes_files exits_afterwards prints_much"
    names = [f"hostile:{name}" for name in kept.split()]
    result = hostile("prove", *names, "--json", "--model", "blocking", "--html", "page.html")
    assert result.code == 0
    assert [json.loads(line)["verdict"] for line in result.out.splitlines()] == ["proved"] * len(names)
    assert (tmp_path / "page.html").exists()
    assert "hostile" not in sys.modules


def test_a_fault_in_one_does_not_keep_the_others_from_being_proved(run):
    result = run("prove", "mine:crash", "mine:one", "--json")
    assert result.code == 2
    assert [json.loads(line)["verdict"] for line in result.out.splitlines()] == ["bad input", "proved"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mime:one", "there is no module mime; did you mean mine?"),
        ("nowhere.at_all:one", "there is no module nowhere; correct the name"),
        ("mine:on", "mine has no on; did you mean one?"),
        ("mine:Family.membre", "Family has no membre; did you mean member?"),
        ("mine:VALUE", "mine:VALUE is of type Schedule; return it from a function"),
        ("mine:sized", "mine:sized needs ranks; give -P"),
        ("mine:needs", "mine:needs needs stages; give it a default"),
        ("mine:crash", "mine:crash raised ZeroDivisionError: division by zero"),
        ("mine:leaves", "mine:leaves raised SystemExit: 0"),
        ("mine:odd", "raised SizeError: dualpipe needs an even number of ranks, 2 or more: got 3; use 4"),
        ("mine:number", "mine:number is of type int"),
        ("mine:later", "a function that is not async: mine:later is async; name a plain function, which may call"),
        ("mine:one_by_one", "a function that is not async: mine:one_by_one is async"),
        ("mine:mapping", "mine:mapping is of type dict"),
        ("mine:mixed", "mine:mixed[1] is of type NoneType"),
        ("mine:nothing", "mine:nothing returned none"),
        ("mine:for_ever", f"at most {MOST} schedules"),
        ("mine:no_text", "mine:no_text:2:14: found '0X0>'; expected an op"),
        ("mine:several", "this command takes one schedule: mine:several returns 2"),
        ("broken:one", "importing broken raised LookupError: not today"),
        ("needy:one", "importing needy raised ModuleNotFoundError: No module named 'a_module_that_nobody_has'"),
    ],
)
def test_each_fault_is_one_line_with_exit_code_2(run, name, message):
    result = run("show", name)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert "Traceback" not in result.err
    assert "Warning" not in result.err


def test_an_error_says_where_it_was_raised(run, tmp_path):
    line = MODULE.splitlines().index("    return 1 / 0") + 1
    assert f"({tmp_path / 'mine.py'}:{line})" in run("show", "mine:crash").err


def test_a_file_of_that_name_comes_first(run, tmp_path):
    (tmp_path / "mine:one").write_text("lane > 0\nrank 0: 0F0> 0B0>+0W0>\n")
    assert run("show", "mine:one").out == (tmp_path / "mine:one").read_text()
