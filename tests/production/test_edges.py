"""A communicator for each directed edge, marks that show what has arrived, and what messages in flight hold.

shared      all messages over one group
per-edge    rank 0 > 1, 1 > 0, 1 > 2, ... each over a group of two ranks; the replicas' sums over the shared one
"""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from dualpipe.errors import RuleError
from dualpipe.pipeline import Feed, Pipeline
from dualpipe.runtime import peers as peers_module
from dualpipe.runtime.executor import StepError
from dualpipe.runtime.process_group import ProcessGroupTransport
from dualpipe.runtime.transport import DisagreementError, Message, SpoiledError, TensorSpec
from dualpipe.runtime.wire import Marks, watched
from dualpipe.schedule.generate import generate
from dualpipe.testing.launch import launch

RANKS, WIDTH, BATCH = 4, 8, 4
ORDER = [2, 0, 1, 3]
"""Group rank of each pipeline rank."""


def pipeline_of(transport: ProcessGroupTransport, microbatches: int = 8) -> Pipeline:
    schedule = generate("dualpipe", RANKS, microbatches)
    stages = {}
    for lane, route in schedule.routes.items():
        stage = route.index(transport.rank)
        torch.manual_seed(stage)
        stages[lane, stage] = nn.Linear(WIDTH, WIDTH)
    boundary = [TensorSpec((BATCH, WIDTH), torch.float32)]
    return Pipeline(schedule, stages, lambda y: y.square().mean(), boundary, transport)


def step(pipeline: Pipeline) -> list[torch.Tensor]:
    """The gradients of a step, in order of stage."""
    torch.manual_seed(7)
    counts = pipeline.schedule.microbatches
    inputs = {lane: [torch.randn(BATCH, WIDTH) for _ in range(count)] for lane, count in counts.items()}
    for module in pipeline.stages.values():
        module.zero_grad()
    pipeline.step(Feed(inputs, {lane: [()] * len(given) for lane, given in inputs.items()}))
    return [p.grad for _, module in sorted(pipeline.stages.items()) for p in module.parameters()]


def fail(module, inputs):
    raise OSError("the disk is full")


@pytest.fixture(scope="module")
def found():
    """What each of six processes finds; the pipeline is on ranks 1 to 4, in an order of its own."""

    def body(context):
        group = dist.new_group([1, 2, 3, 4])
        if context.rank not in (1, 2, 3, 4):
            return None
        results = {}
        made = []
        new_group = peers_module._new_group

        def noted(name, parent, members, *rest):
            made.append((name.split("-", 2)[-1], list(members)))
            return new_group(name, parent, members, *rest)

        peers_module._new_group = noted

        def transport(edges, timeout=10.0):
            return ProcessGroupTransport(group, ORDER, timeout=timeout, edges=edges)

        with pipeline_of(transport("shared")) as pipeline:
            shared = step(pipeline)
        made.clear()
        gc.collect()
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        with pipeline_of(transport("per-edge")) as pipeline:
            results["equal"] = all(torch.equal(a, b) for a, b in zip(shared, step(pipeline), strict=True))
            wire = pipeline.transport._wire
            results["made"], results["rank"] = list(made), pipeline.transport.rank
            results["groups"] = len({id(c.group) for c in (*wire.sending, *wire.receiving)})
        del wire, pipeline
        gc.collect()
        results["closed"] = before == (threading.active_count(), len(os.listdir("/proc/self/fd")))
        dist.barrier(group)  # the user's group still works

        different = transport("per-edge" if context.rank == 2 else "shared", timeout=5.0)
        with pytest.raises(DisagreementError) as error:
            different.agree({})
        results["different"] = str(error.value)

        pipeline, started = pipeline_of(transport("per-edge", timeout=20.0)), time.monotonic()
        step(pipeline)
        if pipeline.transport.rank == 2:
            next(iter(pipeline.stages.values())).register_forward_pre_hook(fail)
        with pytest.raises((StepError, SpoiledError, OSError)) as error:
            step(pipeline)
        results["failed"], results["seconds"] = f"{error.value}", time.monotonic() - started
        pipeline.close()
        return results

    return [results for results in launch(6, body, timeout=100).values() if results is not None]


def test_gradients_over_a_communicator_for_each_edge_are_those_over_one(found):
    assert [results["equal"] for results in found] == [True] * RANKS


def test_the_groups_of_edges_are_made_in_one_order_on_every_rank(found):
    for results in found:
        rank = results["rank"]
        edges = [name for name, _ in results["made"] if "from" in name]
        neighbours = {(rank + 1) % RANKS, (rank - 1) % RANKS}
        ours = {(rank, other) for other in neighbours} | {(other, rank) for other in neighbours}
        assert [name.split("from-")[-1] for name in edges] == [f"{a}-to-{b}" for a, b in sorted(ours)]
        for name, members in results["made"][1:]:
            source, target = map(int, name.split("from-")[-1].split("-to-"))
            assert members == sorted([ORDER[source], ORDER[target]])
        assert results["groups"] == len(ours) + 1


def test_closing_ends_the_threads_and_connections_of_all_edges(found):
    assert [results["closed"] for results in found] == [True] * RANKS


def test_ranks_with_different_communicators_are_named(found):
    assert all("the same communicators" in results["different"] for results in found)


def test_an_error_ends_every_rank_over_a_communicator_for_each_edge(found):
    for results in found:
        assert "the disk is full" in results["failed"]
        assert results["seconds"] < 15  # a wait would last 20


def test_other_words_for_communicators_are_refused():
    def body(context):
        with pytest.raises(RuleError, match='edges must be "shared" or "per-edge"'):
            ProcessGroupTransport(edges="both")

    launch(1, body, timeout=30).values()


class Weighed(ProcessGroupTransport):
    """Notes the most bytes that tensors of messages ever held, sent or received."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def post(self, messages):
        super().post(messages)
        for message in messages:
            for tensor in message.tensors:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: kept for key, kept in self.storages.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))


def test_what_messages_hold_does_not_grow_with_the_number_of_microbatches():
    def body(context):
        peaks = []
        for microbatches in (8, 16, 64):
            with pipeline_of(Weighed(timeout=20.0), microbatches) as pipeline:
                step(pipeline)  # the first microbatch of a stage is watched
                pipeline.transport.peak = 0
                step(pipeline)
                peaks.append(pipeline.transport.peak)
        return peaks

    for peaks in launch(RANKS, body, timeout=100).values():
        assert 0 < peaks[1] == peaks[2], peaks


def test_a_mark_is_gone_once_the_last_byte_has_arrived():
    buffers = [torch.empty(3, 5), torch.empty(7, dtype=torch.bfloat16)]
    marks = Marks(buffers)
    assert not marks.gone()
    buffers[0].fill_(1.0)
    buffers[1][:6] = 1.0
    assert not marks.gone()
    buffers[1][6] = 1.0
    assert marks.gone()


def test_a_tensor_without_bytes_does_not_show_that_it_has_arrived():
    """Or the main thread would wait in gloo, where Ctrl-C cannot interrupt it."""
    buffers = [torch.empty(3), torch.empty(0)]
    marks = Marks(buffers)
    buffers[0].fill_(1.0)
    assert not marks.gone()


def test_a_message_whose_last_byte_equals_the_mark_arrives_nevertheless():
    value = torch.full((3,), 255, dtype=torch.uint8)

    def body(context):
        with ProcessGroupTransport(timeout=10.0) as transport, transport.phase("step"):
            message = Message("0SF0>", 1 - context.rank, context.rank == 0, [value], [TensorSpec((3,), torch.uint8)])
            transport.post([message])
            received = transport.wait(message)
            return context.rank == 0 or torch.equal(received[0], value)

    assert all(launch(2, body, timeout=30).values())


def test_a_program_that_replaces_torchs_functions_sees_the_messages(monkeypatch):
    assert not watched()
    seen, post = [], dist.batch_isend_irecv

    def noted(ops):
        seen.extend(ops)
        return post(ops)

    monkeypatch.setattr(dist, "batch_isend_irecv", noted)
    assert watched()

    def body(context):
        with pipeline_of(ProcessGroupTransport(timeout=20.0)) as pipeline:
            step(pipeline)
        return len(seen)

    assert min(launch(RANKS, body, timeout=60).values()) > 16
