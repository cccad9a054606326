"""One training step of a tiny GPT with Megatron-core, by any of its schedules, on a CPU; the order of a recording."""

import torch

from dualpipe.megatron.on_cpu import install_cpu_standins
from dualpipe.schedule import F
from reference.megatron.importing import expected_warnings

with expected_warnings():
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func, p2p_communication
    from megatron.core.pipeline_parallel.schedules import get_schedule_table
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.utils import get_attr_wrapped_model

__all__ = ["flat", "get_schedule_table", "order", "p2p_communication", "train"]
VOCABULARY, LENGTH = 64, 8


def train(
    ranks, chunks=1, microbatches=4, batched=False, overlapped=False, freed=False, reduced_early=False, tensor=1
) -> None:
    """Train one step on ``ranks`` pipeline ranks with ``chunks`` model chunks on each, wrapped in Megatron's DDP.

    ``batched`` and ``overlapped`` say how Megatron posts messages, ``freed`` that it frees outputs it has sent, and
    ``reduced_early`` that gradients are reduced while the engine runs.  With ``tensor`` ranks for each stage, these
    are tensor and sequence parallel.
    """
    install_cpu_standins()
    virtual = chunks if chunks > 1 else None
    parallel_state.initialize_model_parallel(
        tensor, ranks, virtual_pipeline_model_parallel_size=virtual, create_gloo_process_groups=False
    )
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=ranks * chunks,
        hidden_size=16,
        ffn_hidden_size=32,
        num_attention_heads=2,
        pipeline_model_parallel_size=ranks,
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        virtual_pipeline_model_parallel_size=virtual,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        batch_p2p_comm=batched,
        overlap_p2p_comm=overlapped,
        deallocate_pipeline_outputs=freed,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        cuda_graph_scope=[],
    )
    wrapped = DistributedDataParallelConfig(overlap_grad_reduce=reduced_early)
    model = [DistributedDataParallel(config, wrapped, _chunk(config, n, virtual)) for n in range(chunks)]
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3), model, use_gloo_process_groups=False)
    config.grad_scale_func, config.finalize_model_grads_func = optimizer.scale_loss, finalize_model_grads
    if reduced_early:
        config.no_sync_func = [chunk.no_sync for chunk in model] if virtual else model[0].no_sync
    for chunk in model:
        chunk.zero_grad_buffer()
    data = iter([])
    losses = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[data] * chunks if virtual else data,
        model=model,
        num_microbatches=microbatches,
        seq_length=LENGTH,
        micro_batch_size=1,
        forward_only=False,
    )
    optimizer.step()
    assert len([each["loss"].item() for each in losses]) in (0, microbatches)


def _chunk(config, number, virtual):
    stage = {} if virtual is None else {"vp_stage": number}
    place = {} if virtual is None else {"ignore_virtual": False, **stage}
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        share_embeddings_and_output_weights=False,
        **stage,
    )


def _forward_step(iterator, model):
    """As in Megatron-LM: a stage in the middle gets its input by a setter and is called without a tensor."""
    first, last = (get_attr_wrapped_model(model, name) for name in ("pre_process", "post_process"))
    if not (first or last):
        return model(None, None, None), _loss
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH))
    return model(tokens, torch.arange(LENGTH)[None], None, labels=tokens if last else None), _loss


def _loss(output):
    return output.float().sum(), torch.tensor(LENGTH, dtype=torch.int), {"loss": output.sum().detach()}


def order(schedule, kind, rank):
    """The microbatches and chunks of a rank's forwards or backwards, as Megatron's table counts them."""
    chunks = schedule.stages // schedule.ranks
    ops = [op for slot in schedule.only(frozenset({kind})).programs[rank] for op in slot]
    chunk = {op: op.stage // schedule.ranks for op in ops}
    return [(op.mb, chunk[op] if kind is F else chunks - 1 - chunk[op]) for op in ops]


def flat(programs):
    """The ops of each rank in order, without slots and peers."""
    return [[op.bare for slot in program for op in slot] for program in programs]
