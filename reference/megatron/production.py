"""Runs the drop-in, with half as many ranks as the ground truth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from dualpipe.megatron import build_dualpipe_model, build_dualpipe_optimizer, forward_backward_dualpipe
from dualpipe.megatron.on_cpu import install_cpu_standins
from dualpipe.megatron.schedule import chunks_of
from dualpipe.schedule import UP
from dualpipe.testing.launch import Context
from reference.megatron import data
from reference.megatron.case import Case
from reference.megatron.importing import expected_warnings
from reference.megatron.model import build_gpt, ddp_config, optimizer_config, seed, transformer_config
from reference.megatron.trace import Shard, StepTrace
from reference.megatron.training import Checkpoints, rank_in_replica, train


def ranks(case: Case) -> int:
    """The number of processes."""
    return case.dp * case.pp * case.tp * case.cp


@expected_warnings()
def run_rank(
    case: Case,
    context: Context,
    step: Callable[..., list[Any]] = forward_backward_dualpipe,
    checkpoints: Checkpoints | None = None,
) -> list[StepTrace]:
    """Train one rank, in a process with a default process group.  A test may pass a faulty ``step``."""
    install_cpu_standins()
    parallel_state.initialize_model_parallel(
        case.tp,
        case.pp,
        context_parallel_size=case.cp,
        expert_model_parallel_size=case.ep,
        num_distributed_optimizer_instances=case.instances,
        create_gloo_process_groups=False,
    )
    rank, pipeline = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    tp = rank_in_replica()
    seed(case, rank)
    config = transformer_config(case)

    def provider(pre_process: bool, post_process: bool, pg_collection: Any) -> GPTModel:
        return build_gpt(case, config, pre_process, post_process, pg_collection)

    model = build_dualpipe_model(provider, ddp_config(case), schedule=case.schedule, timeout=case.timeout)
    optimizer = build_dualpipe_optimizer(optimizer_config(case), model)
    shards = [
        Shard(data.replica_of(case, 0 if lane is UP else 1, pipeline), stage, tp) for lane, stage in chunks_of(model)
    ]
    schedule = partial(
        step,
        model=model,
        num_microbatches=case.count,
        seq_length=case.sequence,
        micro_batch_size=case.batch,
        late_w=case.late_w,
        overlap_moe=case.overlap_moe,
    )
    return train(
        case,
        list(zip(shards, model, strict=True)),
        optimizer,
        lambda forward_step, iterator: schedule(forward_step_func=forward_step, data_iterator=iterator),
        lambda number: data.of_pipeline(case, number, pipeline) if rank in (0, case.pp - 1) else None,
        reports=rank == case.pp - 1 and tp == 0,
        progress=context.progress,
        checkpoints=checkpoints,
    )
