"""Colours and a progress bar on a terminal, neither on a pipe; Ctrl-C ends everything at once."""

import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import pytest

from dualpipe.testing.launch import launch
from tests.cli.terminal import COMMAND, cpu_seconds, interrupted, members, on_a_terminal, quiet, terminated

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc; would show that no process outlives Ctrl-C"
)
COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-8]|9[0-7])[0-9;]*m")
ESCAPE = "\x1b"


def paths(folder):
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def piped(*arguments, **environment):
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        env=quiet() | environment,
        timeout=120,
        check=False,
    )


def test_help_is_coloured_on_a_terminal_unless_NO_COLOR_says_no():  # noqa: N802 # the variable's name
    assert COLOUR.search(on_a_terminal("prove", "--help").out)
    assert not COLOUR.search(on_a_terminal("prove", "--help", NO_COLOR="1").out)


def test_piped_output_has_no_escapes():
    for arguments in (["--help"], ["show", "-P", "2"], ["prove", "-P", "2"], ["prove", "--optimal", "-P", "2"]):
        done = piped(*arguments)
        assert done.returncode == 0
        assert done.stdout
        assert ESCAPE not in done.stdout + done.stderr
        assert done.stderr == ""


def test_proving_shows_its_progress_on_a_terminal_and_removes_it_again():
    done = on_a_terminal("prove", "-P", 4, "-M", 8)
    assert done.code == 0
    assert "dualpipe: deadlock, eager" in done.out
    assert "3/8" in done.out
    shown, _, left = done.out.rpartition("\x1b[2K")  # the bar's line is erased
    assert "7/8" in shown
    assert left.startswith("dualpipe on 4 ranks: proved\r\n")


def test_the_report_goes_to_standard_output_although_the_bar_is_on_the_terminal(tmp_path):
    with open(tmp_path / "report.txt", "w") as file:
        done = on_a_terminal("prove", "-P", 2, stdout=file)
    assert (tmp_path / "report.txt").read_text().startswith("dualpipe on 2 ranks: proved\n")
    assert "7/8" in done.out
    assert "proved" not in done.out


@pytest.mark.long
def test_a_verification_shows_a_bar_for_each_party_on_a_terminal():
    shown = on_a_terminal("verify", "-P", "2", "-M", "4", "--steps", "1")
    assert shown.code == 0
    assert "fake ranks" in shown.out
    assert "1/1" in shown.out


def test_ctrl_c_at_a_fork_is_not_lost(capfd):
    """Python drops an exception that is raised in a hook of a fork, and torch and logging have such hooks."""

    def interrupted_at_a_fork():
        os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            launch(2, lambda context: time.sleep(20), backend=None)
        except KeyboardInterrupt:
            print("interrupted")

    process = get_context("fork").Process(target=interrupted_at_a_fork)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert tuple(capfd.readouterr()) == ("interrupted\n", "")


@pytest.mark.parametrize(
    ("processes", "steps", "group"),
    [pytest.param(3, 500, False, marks=pytest.mark.long), (5, 1, True)],
    ids=["oracle and fake ranks, the parent alone", "four ranks, as a terminal does"],
)
def test_ctrl_c_during_a_verification_ends_every_process_with_130_and_without_a_word(processes, steps, group):
    sessions = []

    def all_run(pid):
        sessions[:] = [pid]
        return len(members(pid)) >= processes

    ended = interrupted("verify", "-P", 4, "-M", 8, "--steps", steps, when=all_run, group=group)
    assert (ended.code, ended.out) == (130, "")
    assert ended.seconds < 10
    assert members(sessions[0]) == []


def test_sigterm_ends_every_process_with_143_and_leaves_no_file(tmp_path):
    sessions, folder = [], tmp_path / "temporary"
    folder.mkdir()

    def all_run(pid):
        sessions[:] = [pid]
        return len(members(pid)) >= 5 and any(folder.glob("dualpipe-*"))

    ended = terminated(
        *("verify", "-P", 4, "-M", 8, "--steps", 1), when=all_run, output=tmp_path / "output", TMPDIR=str(folder)
    )
    assert (ended.code, ended.out) == (143, "")
    assert members(sessions[0]) == []
    assert list(folder.iterdir()) == []


def test_sigterm_in_a_users_function_is_not_an_error_of_that_function(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n\n"
        "def build():\n    pathlib.Path(__file__).with_name('here').touch()\n    time.sleep(60)\n"
    )
    begun = tmp_path / "here"
    ended = interrupted(
        "prove", "slow:build", "--json", when=lambda pid: begun.exists(), by=signal.SIGTERM, PYTHONPATH=paths(tmp_path)
    )
    assert (ended.code, ended.out) == (143, "")


@pytest.mark.parametrize(
    "arguments", [("--optimal", "-P", 8, "-M", 16), ("--all-sizes",)], ids=["one long question", "many questions"]
)
def test_ctrl_c_while_a_solver_works_is_130_and_no_verdict(arguments):
    ended = interrupted("prove", *arguments, when=lambda pid: cpu_seconds(pid) > 2.5)
    assert (ended.code, ended.out) == (130, "")
    assert ended.seconds < 10


def test_ctrl_c_just_before_the_wait_for_the_solver_begins_is_not_lost():
    """The signal arrives just before the interpreter blocks; a single wait without a timeout would miss it."""
    code = """
import os, signal, threading, time
from dualpipe.cli.interrupt import interruptible, leave
pending = []
def lost(number, frame):  # Python only notes such a signal, and acts on it once the wait returns
    pending.append(number)
signal.signal(signal.SIGINT, lost)
real = threading.Thread.join
def join(thread, timeout=None):
    os.kill(os.getpid(), signal.SIGINT) if not pending else None
    real(thread, timeout)
    if pending:
        raise KeyboardInterrupt
threading.Thread.join = join
try:
    interruptible(lambda: time.sleep(30))
except KeyboardInterrupt:
    leave(130)
"""
    done = subprocess.run([sys.executable, "-c", code], env=quiet(), timeout=20, check=False)
    assert done.returncode == 130


def test_ctrl_c_on_a_terminal_leaves_no_bar_and_gives_the_cursor_back():
    ended = on_a_terminal("prove", "--optimal", "-P", 8, "-M", 16, interrupt_at="the least makespan")
    assert ended.code == 130
    assert ended.seconds < 10
    assert "Traceback" not in ended.out
    assert ended.out.rindex("\x1b[?25h") > ended.out.rindex("\x1b[?25l")
