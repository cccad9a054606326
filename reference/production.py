"""One production rank of a verification, which runs in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from dualpipe.pipeline import Feed, Pipeline
from dualpipe.runtime.process_group import ProcessGroupTransport
from dualpipe.runtime.transport import TensorSpec, Transport
from dualpipe.schedule import Chunk
from reference.case import Case, make_deterministic
from reference.oracle import gradients_of, snapshot, weights_of
from reference.overlapping import Overlapping
from reference.stopwatch import Stopwatch, Timed
from reference.trace import StepTrace


def transport_of(case: Case) -> ProcessGroupTransport:
    """The case's transport, on the default process group."""
    return ProcessGroupTransport(device=case.device, timeout=case.timeout, staged=case.staged)


def run_rank(
    case: Case,
    progress: Callable[[Any], None] = lambda value: None,
    make_transport: Callable[[Case], Transport] = transport_of,
    make_pipeline: Callable[..., Pipeline] = Pipeline,
) -> list[StepTrace]:
    """Train this rank's stages for the case's steps; returns every step.  A test may pass faulty parts."""
    make_deterministic(case.device)
    transport = make_transport(case)
    schedule, model = case.schedule, case.model
    stages = {
        Chunk(lane, stage): Overlapping.of(case.stage(stage)) if case.overlap else case.stage(stage)
        for lane, route in schedule.routes.items()
        for stage, rank in enumerate(route)
        if rank == transport.rank
    }
    boundary = [TensorSpec((model.batch, model.sequence, model.hidden), model.dtype)]
    watch = Stopwatch(transport.rank) if case.timed else None
    observed = {} if watch is None else {"observe": watch.observe}
    timed = transport if watch is None else Timed(transport, watch)
    pipeline = make_pipeline(schedule, stages, case.criterion, boundary, timed, case.blocking, **observed)
    pipeline.copy_weights()
    optimizers = [case.optimizer(module.parameters()) for module in stages.values()]
    traces = []
    for number, step in enumerate(case.data()):
        lanes = dict(zip(case.lanes, step, strict=True))
        feed = Feed(
            {lane: [(batch.tokens,) for batch in batches] for lane, batches in lanes.items()},
            {lane: [(batch.targets,) for batch in batches] for lane, batches in lanes.items()},
        )
        for optimizer in optimizers:
            optimizer.zero_grad()
        if watch is not None:
            dist.barrier()
            watch.start()
        result = pipeline.step(feed, reduce_gradients=False)
        trace = StepTrace(
            losses={lane: {mb: snapshot(x) for mb, x in losses.items()} for lane, losses in result.losses.items()},
            lane_gradients={chunk: gradients_of(module) for chunk, module in stages.items()},
            times={} if watch is None else {watch.rank: watch.read()},
        )
        pipeline.reduce_gradients()
        trace.gradients |= {chunk: gradients_of(module) for chunk, module in stages.items()}
        for optimizer in optimizers:
            optimizer.step()
        trace.weights |= {chunk: weights_of(module) for chunk, module in stages.items()}
        traces.append(trace)
        progress(number + 1)
    return traces
