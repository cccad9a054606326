"""A step that fails on one rank ends on every rank, and no call goes on from there.

training loop of every rank        ``for step: try: pipeline.step() except Exception: continue``
rank r, in one step                raises in F, B, W, its data, the reduction, or is interrupted
every rank                         an error, then ``SpoiledError`` at every later call; right gradients until then
"""

from __future__ import annotations

import functools
import gc
import os
import re
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe.pipeline import Feed, Pipeline
from dualpipe.runtime.executor import StepError
from dualpipe.runtime.process_group import ProcessGroupTransport
from dualpipe.runtime.transport import SpoiledError, TensorSpec
from dualpipe.schedule import B, F, Kind, W
from dualpipe.schedule.generate import generate
from dualpipe.testing.launch import launch

RANKS, WIDTH, BATCH = 4, 4, 3
SCHEDULE = generate("dualpipe", RANKS, 2 * RANKS)
STEPS, FAILING = 3, 1


class OddError(RuntimeError):
    """What a user's criterion raises."""


def pipeline_of(timeout: float = 20.0, **options) -> Pipeline:
    rank = dist.get_rank()
    stages = {}
    for lane, route in SCHEDULE.routes.items():
        for stage, holder in enumerate(route):
            if holder == rank:
                torch.manual_seed(stage)
                stages[lane, stage] = nn.Linear(WIDTH, WIDTH)
    boundary = [TensorSpec((BATCH, WIDTH), torch.float32)]
    transport = ProcessGroupTransport(timeout=timeout)
    return Pipeline(SCHEDULE, stages, lambda y: y.square().mean(), boundary, transport, **options)


def feed_of(step: int) -> Feed:
    torch.manual_seed(1000 + step)
    inputs = {lane: [(torch.randn(BATCH, WIDTH),) for _ in range(n)] for lane, n in SCHEDULE.microbatches.items()}
    return Feed(inputs, {lane: [()] * len(given) for lane, given in inputs.items()})


@functools.cache
def truth(step: int) -> list[list[torch.Tensor]]:
    """The gradients of each stage, by plain PyTorch: a sum over one lane, plus that over the other."""
    feed, totals = feed_of(step), []
    for lane in SCHEDULE.lanes:
        stages = []
        for stage in range(RANKS):
            torch.manual_seed(stage)
            stages.append(nn.Linear(WIDTH, WIDTH))
        for (x,) in feed.inputs[lane]:
            for stage in stages:
                x = stage(x)
            x.square().mean().backward()
        totals.append([[p.grad for p in stage.parameters()] for stage in stages])
    return [[a + b for a, b in zip(up, down, strict=True)] for up, down in zip(*totals, strict=True)]


def train(pipeline: Pipeline, call) -> tuple[list[str], list[str], float]:
    """Train as a loop does that catches every error: outcome by step, wrong gradients, seconds of the longest step."""
    outcomes, wrong, longest = [], [], 0.0
    for step in range(STEPS):
        for module in pipeline.stages.values():
            module.zero_grad()
        started = time.monotonic()
        try:
            call(pipeline, step)
        except BaseException as error:
            outcomes.append(f"{type(error).__name__}: {error}")
        else:
            outcomes.append("ok")
            for (_, stage), module in pipeline.stages.items():
                if not all(
                    torch.equal(p.grad, w) for p, w in zip(module.parameters(), truth(step)[stage], strict=True)
                ):
                    wrong.append(f"step {step}, stage {stage}")
        longest = max(longest, time.monotonic() - started)
    return outcomes, wrong, longest


def raise_at(kind: Kind, rank: int):
    """An observer that raises after the first op of a kind of the failing step."""
    seen = [0]

    def observe(slot, op, began, ended):
        if op.kind is kind:
            seen[0] += 1
            if dist.get_rank() == rank and seen[0] == FAILING * 2 * RANKS + 3:
                raise OddError("the loss is nan")

    return observe


def failing_criterion(rank: int) -> Pipeline:
    pipeline, calls = pipeline_of(), [0]

    def criterion(y):
        calls[0] += 1
        if dist.get_rank() == rank and calls[0] == FAILING * RANKS + 2:
            raise OddError("the loss is nan")
        return y.square().mean()

    pipeline.criterion = criterion
    return pipeline


def without_data(pipeline, step):
    feed = feed_of(step)
    if step == FAILING and dist.get_rank() == 0:
        feed = Feed({lane: given[:2] for lane, given in feed.inputs.items()}, feed.labels)
    pipeline.step(feed)


def without_a_reduction(rank: int):
    def call(pipeline, step):
        pipeline.step(feed_of(step), reduce_gradients=False)
        replicas = pipeline._replicas
        stages = replicas._stages
        if step == FAILING and dist.get_rank() == rank:
            replicas._stages = dict.fromkeys(stages)  # these cannot be packed
        try:
            pipeline.reduce_gradients()
        finally:
            replicas._stages = stages

    return call


def stepping(pipeline, step):
    pipeline.step(feed_of(step))


def interrupted(pipeline, step):
    if step == FAILING and dist.get_rank() == 1:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    if step == FAILING and dist.get_rank() == 2:
        time.sleep(3)  # the others wait for it, rank 1 until it is interrupted
    pipeline.step(feed_of(step))


CASES = {
    "criterion of rank 0": (0, lambda: failing_criterion(0), stepping),
    "criterion of rank 3": (3, lambda: failing_criterion(3), stepping),
    "F of rank 1": (1, lambda: pipeline_of(observe=raise_at(F, 1)), stepping),
    "B of rank 2": (2, lambda: pipeline_of(observe=raise_at(B, 2)), stepping),
    "W of rank 3": (3, lambda: pipeline_of(observe=raise_at(W, 3)), stepping),
    "data of rank 0": (0, pipeline_of, without_data),
    "reduction of rank 1": (1, pipeline_of, without_a_reduction(1)),
    "Ctrl-C on rank 1": (1, pipeline_of, interrupted),
}


@pytest.fixture(scope="module")
def found():
    """Every case in one launch, each with a new pipeline on the same process group."""

    def body(context):
        results = {}
        for name, (_, make, call) in CASES.items():
            pipeline = make()
            results[name] = train(pipeline, call)
            pipeline.close()
            total = torch.ones(1)
            dist.all_reduce(total)  # the user's own group still works
            assert total.item() == RANKS
        return results

    return launch(RANKS, body, timeout=100).values()


@pytest.mark.parametrize("case", CASES)
def test_an_error_of_one_rank_ends_every_rank_and_no_gradient_after_it_is_wrong(case, found):
    origin = CASES[case][0]
    for rank, results in enumerate(found):
        outcomes, wrong, seconds = results[case]
        assert wrong == []
        assert outcomes[:FAILING] == ["ok"] * FAILING
        assert outcomes[FAILING] != "ok" or rank != origin
        assert "SpoiledError" in outcomes[-1]
        assert re.search(rf"rank {origin} failed in (step|reduction of gradients) {FAILING + 1}: ", outcomes[-1])
        assert "build a new transport and pipeline" in outcomes[-1]
        assert seconds < 15  # a wait would last 20


def test_the_error_of_a_rank_that_waits_names_the_rank_that_failed_and_why(found):
    outcomes = found[2]["criterion of rank 3"][0]
    assert "StepError: rank 2 stopped in slot" in outcomes[FAILING]
    assert "failed after" in outcomes[FAILING]
    assert f"rank 3 failed in step {FAILING + 1}: OddError: the loss is nan" in outcomes[FAILING]


def test_a_rank_that_waits_can_be_interrupted(found):
    assert found[1]["Ctrl-C on rank 1"][0][FAILING].startswith("KeyboardInterrupt")


def omit(rank: int, name: str):
    def call(pipeline):
        if dist.get_rank() != rank:
            getattr(pipeline, name)()
        pipeline.step(feed_of(0))

    return call


def twice(pipeline):
    if dist.get_rank() == 2:
        pipeline.copy_weights()
    pipeline.copy_weights()
    pipeline.step(feed_of(0))


def one_step_less(pipeline):
    for step in range(3):
        if not (step == 2 and dist.get_rank() == 1):
            pipeline.step(feed_of(step), reduce_gradients=False)
    pipeline.reduce_gradients()


def evaluation_on_one(pipeline):
    pipeline.step(feed_of(0), forward_only=dist.get_rank() == 3)


CALLS = {
    "copy_weights left out": (omit(0, "copy_weights"), "began copy of weights 1", "began step 1"),
    "reduction left out": (omit(3, "reduce_gradients"), "began reduction of gradients 1", "began step 1"),
    "copy_weights twice": (twice, "began copy of weights 2", "began step 1"),
    "a step left out": (one_step_less, "began step 3", "began reduction of gradients 1"),
    "evaluation on one rank": (evaluation_on_one, "began step 1", "began evaluation 1"),
}


def test_ranks_that_make_different_calls_end_at_once_and_name_them():
    def body(context):
        found = {}
        for name, (call, *_) in CALLS.items():
            with pipeline_of() as pipeline:
                started = time.monotonic()
                try:
                    call(pipeline)
                except (StepError, SpoiledError, RuntimeError) as error:
                    found[name] = f"{type(error).__name__}: {error}", time.monotonic() - started
                dist.barrier()
        return found

    for found in launch(RANKS, body, timeout=100).values():
        assert set(found) == set(CALLS)
        for name, (text, seconds) in found.items():
            assert "all ranks make the same calls in the same order" in text, (name, text)
            assert all(part in text for part in CALLS[name][1:]), (name, text)
            assert seconds < 15  # a wait would last 20


def test_the_messages_of_different_calls_never_meet():
    """gloo ends a process that gets a longer message than it expects, before an announcement can end the call."""

    def body(context):
        tags = []
        for kind in ("step", "copy of weights"):
            with ProcessGroupTransport(timeout=10.0) as transport, transport.phase(kind):
                tags.append(transport._peers.tag)
                dist.barrier()
        return tags

    (first, *others) = launch(2, body).values()
    assert all(tags == first for tags in others)
    assert len(set(first)) == 2


def test_threads_connections_and_children_of_a_process():
    """A pipeline leaves nothing behind; one that was made before a fork is refused in the child."""

    def body(context):
        def counts():
            gc.collect()
            return threading.active_count(), len(os.listdir("/proc/self/fd"))

        pipeline_of().step(feed_of(0))
        gc.collect()
        gc.freeze()  # leave older objects out of later collections
        before = counts()
        for _ in range(5):
            pipeline_of().step(feed_of(0))
        for _ in range(50):
            pipeline_of()
        after = counts()
        pipeline = pipeline_of()
        pipeline.step(feed_of(0))
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                pipeline.step(feed_of(0))
            except BaseException as error:
                os.write(writing, f"{type(error).__name__}: {error}".encode())
            os._exit(0)
        os.waitpid(child, 0)
        error = os.read(reading, 1000).decode()
        pipeline.step(feed_of(1))
        pipeline.close()
        pipeline.close()
        with pytest.raises(SpoiledError, match="it was closed"):
            pipeline.step(feed_of(0))
        return before, after, error

    for before, after, error in launch(RANKS, body, timeout=60).values():
        assert after == before
        assert error.startswith("RuleError: a pipeline must run in the process that made its transport")
