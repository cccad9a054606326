"""``forward_backward_dualpipe``: one step of DualPipe with the keywords of Megatron's schedule functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_tensor_shapes
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor, nn

from dualpipe.errors import RuleError
from dualpipe.megatron.computation import Call, MegatronComputation, token_count
from dualpipe.megatron.data_parallel import reduced_once, require_trainable
from dualpipe.megatron.iterators import split_data_iterator
from dualpipe.megatron.losses import bring_losses
from dualpipe.megatron.model import Chunk, Pipeline, chunk_of, require_chunks
from dualpipe.megatron.random_streams import follow_rerun
from dualpipe.runtime.executor import Executor
from dualpipe.runtime.transport import TensorSpec
from dualpipe.schedule import DOWN, RF, SF, UP, F, Lane, Schedule
from dualpipe.schedule import Chunk as ScheduleChunk
from dualpipe.schedule.generate import generate
from dualpipe.schedule.text import digest


def forward_backward_dualpipe(
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: Iterator[Any] | Sequence[Iterator[Any] | None] | None,
    model: list[nn.Module],
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None = None,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
    first_val_step: bool | None = None,
    adjust_tensor_shapes_fn: Callable[..., Any] | None = None,
    p2p_communicator: Any = None,
    pg_collection: ProcessGroupCollection | None = None,
    force_all_reduce: bool = False,
) -> list[Any]:
    """Run the forwards and backwards of a step in DualPipe's order.

    The keywords are those of ``megatron.core.pipeline_parallel.schedules`` (0.16.1 and later); ``model`` is what
    ``build_dualpipe_model`` returned.  ``num_microbatches`` counts both lanes: item 2k of the data is microbatch k of
    lane >, item 2k+1 microbatch k of lane <.  Each lane is a data-parallel replica, so losses are scaled by half of
    ``num_microbatches`` and gradients averaged over twice the data-parallel ranks.

    Returns on the last pipeline rank what the loss function returned for every microbatch of both lanes, in the order
    of the data, and an empty list elsewhere.

    Training needs an even number of microbatches, at least twice the pipeline size; with ``forward_only`` any number
    will do.  Raises ``RuleError`` for what is not supported and where the data ends early,
    ``dualpipe.runtime.executor.StepError`` where a message does not arrive in time, and ``DisagreementError`` where
    ranks were set up differently.  Any exception within a step, that of a forward step or of its data too, ends the
    step on every rank of the pipeline and spoils it: the next call raises ``dualpipe.runtime.transport.SpoiledError``.
    """
    if adjust_tensor_shapes_fn is not None or p2p_communicator is not None:
        raise RuleError(
            "DualPipe's messages have the shape of a hidden state and go their own way",
            "got adjust_tensor_shapes_fn or p2p_communicator",
            "leave them out",
        )
    chunks = list(zip(model, require_chunks(model), strict=True))
    pipeline = chunks[0][1].pipeline
    config = get_model_config(model[0])
    if not forward_only:
        require_trainable(model, config, pipeline.optimizer())
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    shapes = get_tensor_shapes(
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        decoder_seq_length=decoder_seq_length,
        config=config,
        tp_group=groups.tp,
        cp_group=groups.cp,
    )
    boundary = [TensorSpec(tuple(shape), config.pipeline_dtype or config.params_dtype) for shape in shapes]
    schedule = schedule_for(pipeline.groups.size, num_microbatches, forward_only)
    _agree(pipeline, schedule, boundary)
    data = split_data_iterator(data_iterator)
    if not forward_only:
        follow_rerun(pipeline.stream, pipeline.groups.pair)
    computation = MegatronComputation(
        schedule,
        {(chunk.place.lane, chunk.place.stage): (module, chunk) for module, chunk in chunks},
        Call(
            forward_step_func,
            {lane: data[lane] for lane in (UP, DOWN)},
            config,
            forward_only,
            collect_non_loss_data,
            first_val_step,
            groups.cp.size(),
        ),
    )
    if config.timers is not None:
        config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
    transport = pipeline.transport
    splits = {ScheduleChunk(chunk.place.lane, chunk.place.stage): chunk.split.stage for _, chunk in chunks}
    store = pipeline.store
    executor = Executor(
        schedule, computation, lambda stage: boundary, transport, store, splits, forward_only=forward_only
    )
    with transport.phase("evaluation" if forward_only else "step"):
        executor.run()
        data.finish(num_microbatches)
    with transport.phase("collection of losses"):
        collected = bring_losses(computation.collected, transport, transport.device)
    if not forward_only:
        with transport.phase("reduction of gradients"):
            transport.meet()  # a collective cannot be interrupted: it begins when no rank has failed before
            _finalize(model, chunks, config, groups, pipeline, computation, force_all_reduce)
    if config.timers is not None:
        config.timers("forward-backward").stop()
    return collected


@lru_cache(maxsize=8)
def schedule_for(ranks: int, microbatches: int, forward_only: bool = False) -> Schedule:
    """DualPipe's schedule; for an evaluation its forwards, cut to as many microbatches as there are.

    Leaving out the same microbatches on every rank leaves every message its partner and its place in the order.
    """
    if not forward_only:
        return generate("dualpipe", ranks, microbatches)
    if microbatches < 1:
        raise RuleError("an evaluation has at least one microbatch", f"got {microbatches}", "raise the batch size")
    share = {UP: (microbatches + 1) // 2, DOWN: microbatches // 2}
    whole = generate("dualpipe", ranks, max(2 * share[UP], 2 * ranks)).only(frozenset({F, SF, RF}))
    programs = (
        tuple(kept for slot in program if (kept := tuple(op for op in slot if op.mb < share[op.lane])))
        for program in whole.programs
    )
    return replace(whole, programs=tuple(programs))


def _agree(pipeline: Pipeline, schedule: Schedule, boundary: Sequence[TensorSpec]) -> None:
    """Before the first step of a kind, compare what the ranks are about to run."""
    told = {
        "schedule": f"dualpipe of {schedule.ranks} ranks, microbatches "
        f"{'+'.join(str(schedule.microbatches[lane]) for lane in schedule.lanes)}, digest {digest(schedule)[:16]}",
        "boundary between stages": ", ".join(map(str, boundary)),
    }
    key = str(told)
    if key not in pipeline.agreed:
        pipeline.transport.agree(told)
        pipeline.agreed.add(key)


def _finalize(
    model: list[nn.Module],
    chunks: Sequence[tuple[nn.Module, Chunk]],
    config: Any,
    groups: ProcessGroupCollection,
    pipeline: Pipeline,
    computation: MegatronComputation,
    force_all_reduce: bool,
) -> None:
    """Reduce the gradients, once every W is over; chunk by chunk in order of stage, as the other rank of the pair."""
    if not pipeline.copies.moved:
        pipeline.copies.follow(pipeline.groups.pipeline)
    if config.grad_sync_func is not None:
        given = config.grad_sync_func
        functions = [given] * len(model) if callable(given) else given
        for function, module in zip(functions, model, strict=True):
            function(module.parameters())
    tokens: Tensor | None = None
    if config.calculate_per_token_loss:
        tokens = token_count(computation, pipeline.transport.device)
        dist.all_reduce(tokens, group=pipeline.groups.pipeline)  # lane < counted at the first rank, lane > at the last
        if not tokens.item():
            raise RuleError(
                "with calculate_per_token_loss the loss function returns (loss, number of tokens, what to report)",
                "it counted no token in any microbatch of the step",
                "return the number of tokens that the loss sums over, or leave calculate_per_token_loss off",
            )
    if config.moe_router_enable_expert_bias:
        _add_up_expert_tokens(chunks, pipeline)
    with reduced_once(model, [chunk.place.stage for _, chunk in chunks]):
        config.finalize_model_grads_func(model, tokens, pg_collection=groups, force_all_reduce=force_all_reduce)


def _add_up_expert_tokens(chunks: Sequence[tuple[nn.Module, Chunk]], pipeline: Pipeline) -> None:
    """Routers steer by the tokens of all replicas; Megatron adds up those of the data-parallel ranks alone."""
    for module, _ in chunks:
        for router in get_attr_wrapped_model(module, "modules")():
            counts = getattr(router, "local_tokens_per_expert", None)
            if counts is not None:
                dist.all_reduce(counts, group=pipeline.groups.pair)


def lanes_of(model: list[nn.Module]) -> list[tuple[Lane, int]]:
    """The lane and stage of each chunk of the model."""
    return [(chunk.place.lane, chunk.place.stage) for chunk in map(chunk_of, model)]
