"""Recorded processes end by themselves or by a signal, and never outlive the recorder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch import nn

from dualpipe.record import Launch, assemble, read_folder, run
from dualpipe.record.processes import MARK
from dualpipe.testing import record_ranks
from tests.record.run import PROGRAMS, ROOT, command, python
from tests.record.two_ranks import assert_plain, train

ESCAPE = """
import subprocess, sys, time
worker = "import time; print('here', flush=True); time.sleep(60)"
processes = [subprocess.Popen([sys.executable, "-S", "-c", worker], start_new_session=True) for _ in range(2)]
if len(sys.argv) == 1:
    time.sleep(60)
"""
"""Starts workers in new sessions, as torchrun does; with an argument it ends and leaves them running."""


def marked() -> list[psutil.Process]:
    """The running processes that a recorder started from this test."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("THE_TEST") == str(os.getpid()) and MARK in process.environ():
                found.append(process)
        except psutil.Error:
            pass
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setenv("THE_TEST", str(os.getpid()))


@pytest.mark.parametrize("arguments", [(), ("and leave",)])
def test_workers_in_new_sessions_are_killed(tmp_path, known, arguments):
    with (tmp_path / "output").open("w+") as output:
        launch = Launch((sys.executable, "-S", "-c", ESCAPE, *arguments), timeout=0.7)
        end = run(launch, _empty(tmp_path / "events"), output.fileno())
        output.seek(0)
        assert end.succeeded == bool(arguments)
    assert marked() == []


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _until(condition, seconds: float = 30.0) -> bool:
    last = time.monotonic() + seconds
    while time.monotonic() < last:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_recorder_ends_all_processes_and_leaves_no_folder(tmp_path, known, sent, code):
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start += "from dualpipe.cli import main; main()"
    words = [sys.executable, "-c", start, "record", "--", sys.executable, "-S", "-c", ESCAPE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL) as process:
        assert _until(lambda: len(marked()) == 3)
        process.send_signal(sent)
        assert process.wait(20) == code
    assert marked() == []
    assert list(tmp_path.iterdir()) == []


STUCK = """
import ctypes, os, pathlib, signal, sys, time
def sleeps():
    time.sleep(60)
def keeps_the_lock_of_python():
    while True:
        ctypes.PyDLL(None).sleep(60)
def blocks_signals():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    time.sleep(60)
def fails():
    while len(list(pathlib.Path().glob("ready*"))) < 3:
        time.sleep(0.02)
    sys.exit(7)
rank = int(os.environ["RANK"])
pathlib.Path(f"ready{rank}").touch()
(sleeps, keeps_the_lock_of_python, blocks_signals, fails)[rank]()
"""


def test_a_rank_that_is_stopped_says_where_it_was_even_in_c_code(tmp_path, known, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stuck.py").write_text(STUCK)
    launch = Launch(("env", sys.executable, "stuck.py"), ranks=4, timeout=60, grace=0.3)
    end = run(launch, _empty(tmp_path / "events"), subprocess.DEVNULL)
    assert (end.codes, end.reason) == ((None, None, None, 7), "another rank had failed")
    assert marked() == []
    logs, _ = read_folder(tmp_path / "events", 4, 1, succeeded=False)
    failures = {failure.rank: failure.what for failure in assemble(logs, codes=end.codes).schedule.failures}
    stopped = "did not finish; it was stopped before its first op"
    file = tmp_path / "stuck.py"
    assert failures == {
        0: f"{stopped}, at {file}:4 (called at {file}:17)",
        1: f"{stopped}, at {file}:7 (called at {file}:17)",
        2: stopped,
        3: "ended with exit code 7 before its first op",
    }


SLOW_TO_JOIN = """
import os, pathlib, sys, time, torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
rank, connect = int(os.environ["RANK"]), c10d._new_process_group_helper
def slowly(*args, **kwargs):
    group = connect(*args, **kwargs)
    time.sleep(0.5 * rank)
    pathlib.Path(f"joined{rank}").write_text(str(time.monotonic()))
    return group
c10d._new_process_group_helper = slowly
dist.init_process_group(sys.argv[1])
pathlib.Path(f"past{rank}").write_text(str(time.monotonic()))
"""
"""Rank 1 joins the process group half a second later than rank 0, which does nothing and ends."""


@pytest.mark.parametrize("backend", [pytest.param("nccl", marks=pytest.mark.long), "cpu:gloo"])
def test_no_rank_continues_before_every_rank_has_joined_the_group(tmp_path, monkeypatch, backend):
    """gloo connects at once, NCCL at the first message: with gloo a rank that ends early would make the others fail."""
    monkeypatch.chdir(tmp_path)
    result = command("-P", 2, "--", sys.executable, "-c", SLOW_TO_JOIN, backend)
    assert "no message has the output of a module call" in result.stderr
    assert float(Path("joined1").read_text()) <= float(Path("past0").read_text())


def test_a_rank_that_dies_of_a_signal_is_an_error():
    def body(rank):
        train(rank, nn.Linear(4, 4))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="rank 1: ended with exit code -9"):
        record_ranks(2, body)
    assert record_ranks(2, body, check=False).ended == (True, False)


def test_exit_code_0_of_a_rank_is_success_and_any_other_a_failure():
    def body(rank, code):
        train(rank, nn.Linear(4, 4))
        sys.exit(code)

    recording = record_ranks(2, lambda rank: body(rank, 0))
    assert_plain(recording)
    assert recording.ended == (True, True)
    with pytest.raises(RuntimeError, match="SystemExit: 3"):
        record_ranks(2, lambda rank: body(rank, 3))


def test_ranks_that_multiprocessing_forks_and_that_fork_loaders():
    result = command("--json", "--prove", *python("forks.py"))
    assert result.returncode == 0, result.stderr
    recorded = json.loads(result.stdout)
    assert recorded["ended"] == [True, True]
    assert "rank 1: 1RF0>@0 1F0> 1B0>+1W0> 1SB0>@0 1RF1>@0 1F1> 1B1>+1W1> 1SB1>@0" in recorded["schedule"]
    assert (recorded["proof"]["verdict"], recorded["caveats"]) == ("proved", [])


@pytest.mark.long
def test_a_program_that_failed_is_refuted_whatever_its_schedule():
    result = command("--prove", *python("forks.py", "error"))
    assert result.returncode == 1, result.stderr
    assert "raised LookupError at " in (first := result.stdout.splitlines()[0])
    lines = (PROGRAMS / "forks.py").read_text().splitlines()
    number = 1 + lines.index('        raise LookupError("at the end")')
    assert f"forks.py:{number} after " in first
    assert first.endswith(("after 0AR>@0: at the end", "after 1AR>@0: at the end"))  # a barrier
    assert "\nrecorded on 2 ranks: refuted\n  complete      proved" in result.stdout
