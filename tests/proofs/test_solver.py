"""Z3 in its own process: however that process fails, the result is an ``Unknown`` with the reason, never a verdict."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from dualpipe.schedule.generate import dualpipe
from proofs import solver
from proofs.prove import prove
from proofs.solver import MEMORY_BYTES, Solver
from proofs.verdict import Unknown

CYCLE = [(0, 1, 1), (1, 2, 0), (2, 0, 0), (3, 4, 1)]


@pytest.fixture
def instead(tmp_path):
    """A function that makes a solver whose process runs the given text; the solvers are closed at the end."""
    started = []

    def make(text: str, memory_bytes: int = MEMORY_BYTES) -> Solver:
        child = tmp_path / "child.py"
        child.write_text(textwrap.dedent(text))
        started.append(Solver(memory_bytes, child))
        return started[-1]

    yield make
    for each in started:
        each.close()


def test_it_names_only_the_facts_that_contradict_each_other():
    assert sorted(solver.SHARED.ask(CYCLE)) == [0, 1, 2]
    assert solver.SHARED.ask(CYCLE[1:]) is None
    assert solver.SHARED.ask([]) is None


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("import sys; sys.exit(101)", "it needs more than"),
        ("raise MemoryError", "it needs more than"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "its process was killed by SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "its process was killed by SIGKILL"),
        ("raise ImportError('no z3 here')", "ended with exit code 1 (ImportError: no z3 here)"),
        ("import sys; sys.exit(0)", "its process ended with exit code 0"),
    ],
)
@pytest.mark.parametrize("ready", ["", "print('ready', flush=True); "])
def test_a_process_that_ends_is_unknown_with_the_reason(instead, ready, does, reason):
    answer = instead(ready + does).ask(CYCLE)
    assert isinstance(answer, Unknown)
    assert answer.reason.startswith("Z3 gave up: ")
    assert reason in answer.reason


def test_a_silent_process_is_killed_at_its_timeout(instead, monkeypatch):
    monkeypatch.setattr(solver, "GRACE_SECONDS", 0.0)
    silent = instead("import time; print('ready', flush=True); time.sleep(600)")
    silent.start()
    process = silent._process
    assert silent.ask(CYCLE * 100_000, timeout_s=0.2) == Unknown("Z3 gave up: no answer within 0.2 s")
    assert process.returncode == -signal.SIGKILL


def test_a_question_over_the_memory_limit_is_unknown_and_the_next_one_is_answered():
    small = Solver(memory_bytes=300 << 20)
    try:
        answer = small.ask((n, n + 1, 1) for n in range(80_000))
        assert isinstance(answer, Unknown)
        assert answer.reason == "Z3 gave up: it needs more than 0.3 GiB of memory"
        assert sorted(small.ask(CYCLE)) == [0, 1, 2]
    finally:
        small.close()


def test_a_check_without_an_answer_makes_the_report_unknown(instead):
    report = prove(dualpipe(2, 4), solver=instead("import sys; sys.exit(101)"))
    assert (report.verdict, report.exit_code) == ("unknown", 3)
    assert "it needs more than" in report.text()


def test_z3_checks_a_refutation_only_of_a_small_schedule(monkeypatch):
    wrong = dualpipe(4, 8)
    assert set(prove(wrong, max_activations=1).checks["memory"].seconds) == {"graph", "z3"}
    monkeypatch.setattr("proofs.prove.SECOND_OPINION", 10)
    report = prove(wrong, max_activations=1)
    assert set(report.checks["memory"].seconds) == {"graph"}
    assert set(report.checks["order"].seconds) == {"graph", "z3"}


def test_a_schedule_too_large_for_z3_is_unknown_unless_a_time_limit_is_given(monkeypatch):
    monkeypatch.setattr("proofs.prove.MOST_FOR_Z3", 10)
    report = prove(dualpipe(2, 4))
    assert report.exit_code == 3
    assert "Z3 skips schedules of more than 10 ops and stages, and this one has 44: give a timeout" in report.text()
    refuted = prove(dualpipe(2, 4), max_activations=1)
    assert refuted.exit_code == 1
    assert prove(dualpipe(2, 4), timeout_s=60.0).exit_code == 0


def test_the_process_ends_with_the_asking_process_even_if_that_is_killed():
    code = """
import time
from proofs.solver import SHARED
SHARED.ask([])
print(SHARED._process.pid, flush=True)
time.sleep(600)
"""
    asker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(asker.stdout.readline())
    asker.kill()
    asker.wait()
    asker.stdout.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
        except (ProcessLookupError, FileNotFoundError):
            return
        if Path(f"/proc/{child}/stat").read_text().split(")")[1].split()[0] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the solver's process outlived the asking process")


def test_an_interrupt_ends_the_process_so_that_the_next_question_starts_a_new_one(instead):
    asking = instead("import time; print('ready', flush=True); time.sleep(600)")
    timer = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        asking.ask(CYCLE)
    assert asking._process is None
