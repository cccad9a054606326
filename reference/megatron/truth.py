"""The ground truth: Megatron's own 1F1B, an independent schedule; a replica for each lane, a rank for each stage."""

from __future__ import annotations

from functools import partial

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from dualpipe.megatron.on_cpu import install_cpu_standins
from dualpipe.testing.launch import Context
from reference.megatron import data
from reference.megatron.case import Case
from reference.megatron.importing import expected_warnings
from reference.megatron.model import build_gpt, ddp_config, optimizer_config, seed, transformer_config
from reference.megatron.trace import Shard, StepTrace
from reference.megatron.training import Checkpoints, rank_in_replica, train


def ranks(case: Case) -> int:
    """The number of processes."""
    return case.replicas * case.stages * case.tp * case.cp


@expected_warnings()
def run_rank(case: Case, context: Context, checkpoints: Checkpoints | None = None) -> list[StepTrace]:
    """Train one rank, in a process with a default process group."""
    install_cpu_standins()
    parallel_state.initialize_model_parallel(
        case.tp,
        case.stages,
        context_parallel_size=case.cp,
        expert_model_parallel_size=case.ep,
        num_distributed_optimizer_instances=case.instances,
        create_gloo_process_groups=False,
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    replica = parallel_state.get_data_parallel_rank()
    seed(case, stage)
    config = transformer_config(case)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    first, last = stage == 0, stage == case.stages - 1
    model = build_gpt(case, config, first, last, groups)
    model = Float16Module(config, model) if config.bf16 else model
    chunk = DistributedDataParallel(config, ddp_config(case), model)
    optimizer = get_megatron_optimizer(optimizer_config(case), [chunk], use_gloo_process_groups=False)
    schedule = partial(
        forward_backward_pipelining_without_interleaving,
        model=[chunk],
        num_microbatches=case.per_lane,
        seq_length=case.sequence,
        micro_batch_size=case.batch,
    )
    shard = Shard(replica, stage, rank_in_replica())
    return train(
        case,
        [(shard, chunk)],
        optimizer,
        lambda forward_step, iterator: schedule(forward_step_func=forward_step, data_iterator=iterator),
        lambda step: data.of_replica(case, step, replica) if first or last else None,
        reports=last and shard.tp == 0,
        progress=context.progress,
        checkpoints=checkpoints,
    )
