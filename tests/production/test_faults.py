"""Faults planted in production, each with what catches it.

a fault of the schedule      two sends swapped, W skipped, a receive or a send dropped
a fault of the runtime       labels of the lanes swapped, replicas not reduced, the default group
a fault of the world         a rank killed, a rank set up differently
"""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dualpipe.pipeline import Feed, Pipeline
from dualpipe.runtime.process_group import ProcessGroupTransport
from dualpipe.runtime.wire import Wire
from dualpipe.schedule import DOWN, RF, SB, SENDS, SF, UP, Op, W
from dualpipe.schedule.generate import generate
from dualpipe.testing.launch import Failure, launch
from reference.comparison import differences
from reference.production import run_rank
from reference.trace import merge
from reference.verify import run_oracle, verify
from tests.docs.snippets import ROOT, blocks_of, unlike
from tests.production.cases import processes, rewrite, tiny, without


def failures_of(case, rank_body=run_rank) -> dict[int, Failure]:
    """Run the processes alone, where nothing is compared, and return how each rank failed."""
    outcome = launch(case.schedule.ranks, lambda context: rank_body(case, context.progress), 60, case.timeout + 5)
    return {failure.rank: failure for failure in outcome.failures}


def test_two_sends_of_one_slot_swapped_train_silently_on_other_gradients():
    """Both go from rank 1 to rank 2 and have the same shape, so nothing hangs; only the bits differ."""
    case = tiny(ranks=4, microbatches=8)

    def swap(slot):
        sends = [op for op in slot if op.kind in SENDS and case.schedule.peer(op) == 2]
        if len(sends) < 2:
            return [slot]
        other = {sends[0]: sends[1], sends[1]: sends[0]}
        return [tuple(other.get(op, op) for op in slot)]

    swapped = rewrite(case.schedule, 1, swap)
    assert swapped != case.schedule
    comparison = processes(verify(replace(case, schedule=swapped)))
    assert not comparison.failures
    assert "gradient of its lane" in {difference.what for difference in comparison.differences}


def test_a_skipped_w_is_missed_at_the_end_of_the_step():
    case = tiny()
    skipped = Op(W, UP, 0, 1)
    failure = failures_of(replace(case, schedule=without(case.schedule, 0, skipped)))[0]
    assert failure.kind == "StepError"
    assert "never computed: 0W1>" in failure.text


def test_labels_of_the_lanes_swapped_show_in_the_losses():
    class Swapped(Pipeline):
        def step(self, feed, **options):
            return super().step(Feed(feed.inputs, {UP: feed.labels[DOWN], DOWN: feed.labels[UP]}), **options)

    report = verify(tiny(), rank_body=lambda case, progress: run_rank(case, progress, make_pipeline=Swapped))
    first = processes(report).differences[0]
    assert (first.step, first.what) == (0, "loss")


def test_replicas_that_are_not_reduced_differ_from_the_sum_and_drift_apart():
    class Unreduced(Pipeline):
        def reduce_gradients(self):
            pass

    report = verify(tiny(), rank_body=lambda case, progress: run_rank(case, progress, make_pipeline=Unreduced))
    found = {difference.what for difference in processes(report).differences if difference.step == 0}
    assert found == {"gradient", "weight", "weight of one replica compared with the other's"}


class Losing(ProcessGroupTransport):
    """Rank 0 forgets to post one message, as a runtime with a wrong branch would."""

    lost = ""

    def post(self, messages):
        super().post([message for message in messages if self.rank != 0 or message.label != self.lost])


def lose(label: str):
    case = tiny(ranks=4, microbatches=8, timeout=3.0, steps=1)

    def make(case):
        transport = Losing(timeout=case.timeout)
        transport.lost = label
        return transport

    failures = failures_of(case, lambda c, p: run_rank(c, p, make))
    assert set(failures) == {0, 1, 2, 3}
    assert {failure.kind for failure in failures.values()} <= {"StepError", "SpoiledError"}
    return failures


def test_a_send_that_the_runtime_forgets_hangs_and_ends_within_the_timeout_with_the_story():
    """Messages carry no tag: rank 1 takes each later one for its predecessor, and the last one never arrives."""
    failures = lose("0SF3>")
    assert "(2B3<): receive 2RB3< from rank 0 failed after 3." in failures[1].text
    assert "(0B3>): receive 0RB3> from rank 1 failed after" in failures[0].text


def test_a_receive_that_the_runtime_forgets_is_reported_where_it_is_missed():
    failures = lose("3RF1<")
    assert "(3F1<): receive 3RF1< from rank 1 failed after 0.0 s: it was never posted" in failures[0].text


class Hasty(ProcessGroupTransport):
    """Waits for all but one of the works of an RF, as a runtime does that mistakes a slot for one work."""

    def post(self, messages):
        super().post(messages)
        for message in messages:
            if "RF" in message.label:
                message.works, message.marks = message.works[1:], None


def test_a_work_that_is_not_waited_for_never_ends_in_an_equal_run():
    """gloo then stops with an op that waits in vain, or reads what has not arrived; which of the two is a race."""
    case = tiny(ranks=4, microbatches=8, steps=1, timeout=3.0)
    comparison = processes(verify(case, rank_body=lambda c, p: run_rank(c, p, lambda c: Hasty(timeout=c.timeout))))
    assert comparison.failures or comparison.differences
    assert {failure.kind for failure in comparison.failures} <= {"StepError"}


def test_a_receive_left_out_of_the_schedule_is_reported_at_once():
    case = tiny(ranks=4, microbatches=8, timeout=4.0)
    broken = without(case.schedule, 1, Op(RF, UP, 1, 2))
    failures = failures_of(replace(case, schedule=broken))
    assert set(failures) == {0, 1, 2, 3}
    assert "(1F2>): it needs 1RF2>, which has not been posted" in failures[1].text


def test_a_send_left_out_hangs_and_every_rank_ends_within_the_timeout():
    case = tiny(ranks=4, microbatches=8, timeout=4.0)
    broken = without(case.schedule, 3, Op(SF, DOWN, 0, 1))
    failures = failures_of(replace(case, schedule=broken))
    assert set(failures) == {0, 1, 2, 3}
    assert all(failure.kind != "TimeUp" for failure in failures.values()), failures
    assert "from rank 3 failed after" in failures[2].text


def test_a_killed_rank_ends_every_other_with_what_it_waited_for():
    class Dying(ProcessGroupTransport):
        batches = 0

        def post(self, messages):
            self.batches += 1
            if self.rank == 2 and self.batches == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            super().post(messages)

    case = tiny(ranks=4, microbatches=8, timeout=6.0)
    failures = failures_of(case, lambda c, p: run_rank(c, p, lambda case: Dying(timeout=case.timeout)))
    assert failures[2].kind == "Killed"
    for rank in (0, 1, 3):
        assert failures[rank].kind == "StepError"
        assert "failed after" in failures[rank].text
    neighbours = failures[1].text + failures[3].text
    assert "from rank 2 failed" in neighbours or "to rank 2 failed" in neighbours


def test_a_rank_with_another_schedule_is_found_before_the_first_message():
    case = tiny(ranks=4, microbatches=8)

    def rank(case, progress):
        other = replace(case, schedule=generate("dualpipe", 4, 10))
        return run_rank(other if dist.get_rank() == 1 else case, progress)

    failures = failures_of(case, rank)
    assert {failure.kind for failure in failures.values()} == {"DisagreementError"}
    assert "rank 1 has dualpipe of 4 ranks, microbatches 5+5" in failures[3].text
    assert "ranks 0, 2, 3 have dualpipe of 4 ranks, microbatches 4+4" in failures[3].text
    page = ROOT / "docs" / "how-to" / "when-a-run-fails.md"
    (shown,) = [block for block in blocks_of(page.read_text(), page.name) if "held by" in block.notes]
    assert not unlike(shown.text, failures[3].text)


def test_ranks_with_different_boundaries_are_found_before_the_first_message():
    def rank(case, progress):
        if dist.get_rank() == 1:
            case = replace(case, model=replace(case.model, batch=3))
        return run_rank(case, progress)

    failures = failures_of(tiny(), rank)
    assert "rank 1 has [3, 8, 16] float32" in failures[0].text


ORDER = [2, 0, 1, 3]
"""Group rank of each pipeline rank, in the tests with a subgroup."""


def in_a_subgroup(case, transport):
    """Run a case on ranks 1 to 4 of a world of 6, the pipeline in an order of its own; outcome of those four."""

    def body(context):
        group = dist.new_group([1, 2, 3, 4])
        if context.rank not in (1, 2, 3, 4):
            return None
        return run_rank(case, make_transport=lambda c: transport(group, ORDER, timeout=c.timeout))

    return launch(6, body, timeout=60, grace=case.timeout + 3)


def test_a_pipeline_in_a_subgroup_with_ranks_in_another_order():
    case = tiny(ranks=4, microbatches=8)
    traces = merge([steps for steps in in_a_subgroup(case, ProcessGroupTransport).values() if steps is not None])
    assert differences(case.schedule, run_oracle(case), traces) == []


def test_a_message_posted_on_the_default_group_is_caught_when_the_pipeline_is_a_subgroup():
    class Default(ProcessGroupTransport):
        def post(self, messages):
            self._wire = Wire(dist.group.WORLD, self.order, self.rank, {}, self.device, batched=False)
            super().post(messages)

    outcome = in_a_subgroup(tiny(ranks=4, microbatches=8, timeout=3.0), Default)
    assert [failure.rank for failure in sorted(outcome.failures, key=lambda f: f.rank)] == [1, 2, 3, 4]
    for failure in outcome.failures:
        assert failure.kind == "StepError"
        assert "between steps: copying the weights of its stages" in failure.text
        assert "failed after" in failure.text


DIFFERENT = {
    "a wider model": (
        lambda case: replace(case, model=replace(case.model, hidden=32)),
        "rank 1 has [1, 8, 32] float32",
    ),
    "another dtype": (lambda case: replace(case, model=replace(case.model, dtype=torch.float64)), "float64"),
    "a deeper stage": (lambda case: replace(case, model=replace(case.model, blocks_per_stage=2)), "weights of stage"),
    "another order of its messages": (
        lambda case: replace(case, schedule=rewrite(case.schedule, 1, lambda slot: [slot[::-1]])),
        "every rank runs with the same program of rank 1: ranks 0, 2 have 28 slots, digest",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_rank_set_up_differently_is_named_before_the_first_message(what):
    change, text = DIFFERENT[what]

    def rank(case, progress):
        return run_rank(change(case) if dist.get_rank() == 1 else case, progress)

    failures = failures_of(tiny(ranks=4, microbatches=8), rank)
    assert set(failures) == {0, 1, 2, 3}
    assert {failure.kind for failure in failures.values()} == {"DisagreementError"}
    assert text in failures[0].text


def test_a_gradient_that_is_never_sent_is_reported_by_the_rank_that_kept_it():
    case = tiny("1f1b", 2, 2)
    failures = failures_of(replace(case, schedule=without(case.schedule, 1, Op(SB, UP, 1, 1))))
    assert "rank 1 stopped after its last slot: the gradient of 1B1> was not used" in failures[1].text


def test_a_failed_rank_exits_at_once_though_a_send_of_its_own_still_waits(tmp_path):
    """As a user's script would: no launcher that ends it, a send that nobody receives, a timeout of ten minutes."""
    script = tmp_path / "train.py"
    script.write_text(
        f"""
import os, sys, torch, torch.distributed as dist
from dualpipe.runtime.process_group import ProcessGroupTransport
from dualpipe.runtime.transport import Message
rank = int(os.fork() == 0)  # torch is imported once
dist.init_process_group("gloo", store=dist.FileStore({str(tmp_path / "store")!r}, 2), rank=rank, world_size=2)
transport = ProcessGroupTransport(timeout=600.0)
transport.agree({{"alike": "yes"}})
if rank == 0:
    transport.post([Message("0SF0>", 1, sends=True, tensors=[torch.ones(1000)])])
    raise ValueError("the user's own")
sys.stdin.read()
"""
    )
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stderr=file, start_new_session=True)
    try:
        assert process.wait(timeout=140) == 1
        assert "the user's own" in errors.read_text()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
