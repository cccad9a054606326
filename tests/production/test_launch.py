"""No rank outlives its launch."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from dualpipe.testing.launch import TIME_UP, Failure, launch


def gone(pid: int) -> bool:
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":  # ended; its new parent has not reaped it yet
            return True
        time.sleep(0.1)
    return False


def test_results_come_back_by_rank():
    assert launch(3, lambda context: context.rank**2, backend=None).values() == [0, 1, 4]


def test_a_failed_rank_is_reported_with_its_error_and_the_others_keep_their_results():
    def body(context):
        if context.rank == 1:
            raise KeyError("missing")
        return context.rank

    outcome = launch(3, body, backend=None)
    assert outcome.results[::2] == (0, 2)
    assert isinstance(outcome.results[1], Failure)
    assert outcome.results[1].kind == "KeyError"
    assert "in body" in outcome.results[1].trace
    with pytest.raises(RuntimeError, match="rank 1: KeyError"):
        outcome.values()


def test_an_error_without_a_text_is_reported_with_the_line_that_raised_it():
    def body(context):
        raise AssertionError  # as a bare assert of a library does

    (failure,) = launch(1, body, backend=None).failures
    assert failure.text.startswith("test_launch.py:")
    assert failure.text.endswith(": raise AssertionError  # as a bare assert of a library does")


def test_no_body_starts_before_every_rank_has_joined_the_group(monkeypatch):
    """gloo connects every pair of ranks: if one had ended already, a slower one could not connect."""
    join = dist.init_process_group
    seconds = {}

    def slowly(*args, rank, **kwargs):
        join(*args, rank=rank, **kwargs)
        if rank == 1:
            time.sleep(0.5)
            seconds["joined"] = time.monotonic()

    monkeypatch.setattr(dist, "init_process_group", slowly)
    first, joined, third = launch(3, lambda context: seconds.get("joined", time.monotonic()), timeout=40).values()
    assert joined <= min(first, third)


def test_a_process_that_ends_without_a_result_is_a_failure_even_if_a_child_of_its_holds_the_pipe():
    def body(context):
        if context.rank == 1 and os.fork():
            os._exit(3)  # the child sleeps on, with the rank's end of the pipe
        time.sleep(8 * context.rank)

    outcome = launch(2, body, timeout=50.0, backend=None)
    assert [str(failure) for failure in outcome.failures] == ["rank 1: Killed: ended with exit code 3 without a result"]
    assert outcome.seconds < 7


def test_ranks_that_are_stuck_are_ended():
    outcome = launch(2, lambda context: time.sleep(60), timeout=50.0, backend=None, is_stuck=lambda: True)
    assert {failure.kind for failure in outcome.failures} == {TIME_UP}
    assert outcome.seconds < 30


def test_ranks_that_do_not_end_are_ended():
    pids = []
    outcome = launch(
        2,
        lambda context: (context.progress(os.getpid()), time.sleep(60)),
        timeout=1.0,
        backend=None,
        on_progress=lambda rank, pid: pids.append(pid),
    )
    assert {failure.kind for failure in outcome.failures} == {TIME_UP}
    assert outcome.seconds < 30
    assert len(pids) == 2
    assert all(map(gone, pids))


def test_after_a_failure_the_other_ranks_have_the_grace_period():
    def body(context):
        if context.rank == 0:
            raise ValueError("first")
        time.sleep(60)

    outcome = launch(2, body, timeout=50.0, grace=1.0, backend=None)
    assert [failure.kind for failure in outcome.failures] == ["ValueError", TIME_UP]
    assert outcome.seconds < 30


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_ranks_end_with_their_parent_however_it_ends(how):
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        os.close(reading)
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def report(rank, pid):
            os.write(writing, f"{pid} ".encode())

        try:
            launch(2, lambda context: (context.progress(os.getpid()), time.sleep(60)), 50.0, 1.0, None, report)
        finally:
            os._exit(0)
    os.close(writing)
    pids: list[int] = []
    while len(pids) < 2:
        pids += map(int, os.read(reading, 100).split())
    os.kill(parent, how)
    os.waitpid(parent, 0)
    os.close(reading)
    assert all(map(gone, pids))
