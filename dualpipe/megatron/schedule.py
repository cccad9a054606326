"""``forward_backward_dualpipe``: one step of DualPipe or DualPipeV, as one of Megatron's schedule functions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_tensor_shapes
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from dualpipe.errors import RuleError
from dualpipe.megatron.arguments import validate_overlap
from dualpipe.megatron.computation import Call, MegatronComputation, token_count
from dualpipe.megatron.data_parallel import reduced_once, require_trainable
from dualpipe.megatron.expert_overlap import PlannedComputation
from dualpipe.megatron.groups import groups_of_finalizing
from dualpipe.megatron.iterators import split_data_iterator
from dualpipe.megatron.losses import collect_losses
from dualpipe.megatron.model import ChunkSetup, Shared, setup_of, setups_of
from dualpipe.megatron.mtp_losses import collect_mtp_losses
from dualpipe.megatron.statistics import combine_over_lanes
from dualpipe.runtime.executor import Executor, require_size
from dualpipe.runtime.transport import TensorSpec
from dualpipe.schedule import RF, SF, UP, Chunk, F, Schedule
from dualpipe.schedule.generate import generate, with_late_w
from dualpipe.schedule.shapes import with_shape_exchange
from dualpipe.schedule.text import fingerprints


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
    late_w: str = "none",
    overlap_moe: bool = False,
) -> list[Any]:
    """Run the forwards and backwards of a step in the order of DualPipe or DualPipeV, for which the model was built.

    It takes the keywords of ``megatron.core.pipeline_parallel.schedules`` (0.16.1 and later) and two more: ``late_w``
    as in ``dualpipe.dualpipe``, and ``overlap_moe``, with which a training step runs each F&B pair as one unit (see
    ``dualpipe.megatron.expert_overlap``).  ``model`` is the list that ``build_dualpipe_model`` returned.

    ``num_microbatches`` counts both lanes of DualPipe: item 2k of the data is microbatch k of lane >, item 2k+1
    microbatch k of lane <.  Each lane is a data-parallel replica, so losses are scaled by half of ``num_microbatches``
    and gradients are averaged over twice the data-parallel ranks.  DualPipeV has one lane, and counts as 1F1B does.

    On the last pipeline rank, returns the results of the loss function for every microbatch, in the order of the data;
    elsewhere an empty list.

    With ``variable_seq_lengths`` of the config, microbatches may have sequences of different lengths: each activation's
    shape is sent before it, and ``seq_length`` is not used.

    Training needs at least twice as many microbatches as pipeline ranks, and under DualPipe an even number; with
    ``forward_only`` any number works.  Raises ``RuleError`` for unsupported arguments and for data that ends early, its
    subclass ``StageError`` for a loss that is not a scalar, ``dualpipe.runtime.executor.StepError`` if a message does
    not arrive in time, and ``DisagreementError`` if ranks were set up differently.  Any exception within a step,
    including one from a forward step or its data, ends the step on every rank of the pipeline and spoils the pipeline:
    the next call raises ``dualpipe.runtime.transport.SpoiledError``.
    """
    if adjust_tensor_shapes_fn is not None or p2p_communicator is not None:
        raise RuleError(
            "DualPipe sends messages itself, each of the shape of a hidden state",
            "got adjust_tensor_shapes_fn or p2p_communicator",
            "leave them out",
        )
    setups = setups_of(model)
    shared = setups[0].shared
    config = get_model_config(model[0])
    if not forward_only:
        require_trainable(model, config, shared.optimizer(), shared.groups.placement.schedule)
        if overlap_moe:
            validate_overlap(config)
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    shapes = get_tensor_shapes(
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        decoder_seq_length=decoder_seq_length,
        config=config,
        tp_group=groups.tp,
        cp_group=groups.cp,
    )
    if config.variable_seq_lengths:
        shapes = [(0,) * len(shape) for shape in shapes]  # of which the numbers of dimensions count alone
    boundary = [TensorSpec(tuple(shape), config.pipeline_dtype or config.params_dtype) for shape in shapes]
    where = shared.groups.placement
    kind = where.schedule, where.ranks, num_microbatches, forward_only, late_w, bool(config.variable_seq_lengths)
    schedule = schedule_for(*kind)
    require_size(schedule, shared.transport)
    _agree(shared, kind, schedule, boundary)
    data = split_data_iterator(data_iterator, where.chunks(shared.groups.rank))
    if not forward_only:
        shared.stream.begin_step()
    planned = overlap_moe and not forward_only
    computation = (PlannedComputation if planned else MegatronComputation)(
        schedule,
        {setup.chunk: (module, setup) for module, setup in zip(model, setups, strict=True)},
        Call(
            forward_step_func,
            {setup.chunk: data[setup.chunk] for setup in setups},
            config,
            forward_only,
            collect_non_loss_data,
            first_val_step,
            groups.cp.size(),
        ),
    )
    if config.timers is not None:
        config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
    transport, store = shared.transport, shared.store
    splits = {setup.chunk: setup.split.stage for setup in setups}
    executor = Executor(
        schedule,
        computation,
        lambda stage: boundary,
        transport,
        store,
        splits,
        forward_only=forward_only,
        overlaps=computation.overlaps(),
    )
    with transport.phase("evaluation" if forward_only else "step"):
        executor.run()
        data.finish(num_microbatches)
    with transport.phase("collection of losses"):
        collected = collect_losses(computation.collected, where.ends(), transport, transport.device)
        if config.mtp_num_layers and not forward_only:
            collect_mtp_losses(where.ends(), transport, transport.device)
    if not forward_only:
        with transport.phase("reduction of gradients"):
            transport.meet()  # a collective cannot be interrupted, so it starts only if no rank has failed
            _finalize(model, setups, config, groups, computation, force_all_reduce)
    if config.timers is not None:
        config.timers("forward-backward").stop()
    return collected


@lru_cache(maxsize=8)
def schedule_for(
    name: str,
    ranks: int,
    microbatches: int,
    forward_only: bool = False,
    late_w: str = "none",
    variable_shapes: bool = False,
) -> Schedule:
    """The named schedule; for an evaluation its forwards, cut to the given number of microbatches.

    The same microbatches are left out on every rank, so sends and receives still match and keep their order.  With
    ``variable_shapes`` shapes are exchanged before activations.
    """
    if variable_shapes:
        return with_shape_exchange(schedule_for(name, ranks, microbatches, forward_only, late_w))
    if not forward_only:
        return generate(with_late_w(name, late_w), ranks, microbatches)
    if microbatches < 1:
        raise RuleError(
            "an evaluation must have at least one microbatch", f"got {microbatches}", "raise the batch size"
        )
    lanes = generate(name, ranks, 2 * ranks).lanes
    share = {lane: len(range(number, microbatches, len(lanes))) for number, lane in enumerate(lanes)}
    enough = max(len(lanes) * share[UP], 2 * ranks)
    whole = generate(name, ranks, enough).only(frozenset({F, SF, RF}))
    programs = (
        tuple(kept for slot in program if (kept := tuple(op for op in slot if op.mb < share[op.lane])))
        for program in whole.programs
    )
    return replace(whole, programs=tuple(programs))


def _agree(shared: Shared, kind: Hashable, schedule: Schedule, boundary: Sequence[TensorSpec]) -> None:
    """Before the first step of a kind, check that all ranks are about to run the same schedule and shapes."""
    key = kind, tuple(boundary)
    if key in shared.agreed:
        return
    setup = {
        **fingerprints(schedule, shared.transport.rank),
        "boundary between stages": ", ".join(map(str, boundary)),
    }
    shared.transport.agree(setup)
    shared.agreed.add(key)


def _finalize(
    model: list[nn.Module],
    setups: Sequence[ChunkSetup],
    config: Any,
    groups: ProcessGroupCollection,
    computation: MegatronComputation,
    force_all_reduce: bool,
) -> None:
    """Reduce the gradients after the last W; chunk by chunk in order of stage, as on the other rank of the pair."""
    shared = setups[0].shared
    if not shared.replicas.update_checked:
        shared.replicas.check_step(shared.groups.pipeline)
    if config.grad_sync_func is not None:
        given = config.grad_sync_func
        functions = [given] * len(model) if callable(given) else given
        for function, module in zip(functions, model, strict=True):
            function(module.parameters())
    tokens: Tensor | None = None
    if config.calculate_per_token_loss:
        tokens = token_count(computation, shared.transport.device)
        dist.all_reduce(tokens, group=shared.groups.pipeline)  # each rank where a lane ends counted its tokens
        if not tokens.item():
            raise RuleError(
                "with calculate_per_token_loss the loss function must return (loss, tokens, values to report)",
                "it counted no token in any microbatch of the step",
                "return the number of tokens that the loss sums over, or leave calculate_per_token_loss off",
            )
    if shared.groups.pair:
        combine_over_lanes(model, config, shared.groups.pair)
    groups = groups_of_finalizing(groups, shared.groups.placement)
    with reduced_once(model, [setup.chunk.stage for setup in setups]):
        config.finalize_model_grads_func(model, tokens, pg_collection=groups, force_all_reduce=force_all_reduce)


def chunks_of(model: list[nn.Module]) -> list[Chunk]:
    """The lane and stage of each chunk of the model."""
    return [setup_of(module).chunk for module in model]
