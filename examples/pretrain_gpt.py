"""Pretrains a GPT on the bytes of a text with megatron-core, with DualPipe or with Megatron's own 1F1B.

    torchrun --nproc-per-node 4 examples/pretrain_gpt.py --use-dualpipe --pipeline-model-parallel-size 4
    torchrun --nproc-per-node 8 examples/pretrain_gpt.py                --pipeline-model-parallel-size 4

Both print the same losses and the same digest of all weights: each lane of DualPipe is one of the data-parallel
replicas of 1F1B.  So do these two, as a rank of DualPipeV holds two of the stages of 1F1B:

    torchrun --nproc-per-node 2 examples/pretrain_gpt.py --use-dualpipev --pipeline-model-parallel-size 2
    torchrun --nproc-per-node 4 examples/pretrain_gpt.py                 --pipeline-model-parallel-size 4

With GPUs, one for each rank, they communicate over NCCL.  Without GPUs they communicate over gloo, and the stand-ins of
``dualpipe.megatron.on_cpu`` let Megatron run on the CPU.

Comments with DualPipe's name mark the six changes of a training script; the first is in ``gpt_arguments.py``.
"""

# ruff: noqa: E402 - without a GPU, the harness must import Megatron first, to silence its warnings

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

GPU = torch.cuda.is_available()
if not GPU:
    from dualpipe.megatron.on_cpu import install_cpu_standins
    from reference.megatron.importing import expected_warnings


from gpt_arguments import parse_arguments
from gpt_data import VOCABULARY, Batch, Text, read_text
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import check_is_distributed_checkpoint
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_attr_wrapped_model

from dualpipe.megatron import (
    build_dualpipe_model,
    build_dualpipe_optimizer,
    get_forward_backward_func,
    load_checkpoint,
    save_checkpoint,
    schedule_of,
    stages_of,
)

# --------------------------------------------------------------------------------------------------------------- model


def transformer_config(args: argparse.Namespace) -> TransformerConfig:
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    options: dict[str, Any] = {"gradient_accumulation_fusion": False}  # its kernel is part of Apex
    if not GPU:
        options |= {"use_cpu_initialization": True, "batch_p2p_comm": False, "deallocate_pipeline_outputs": False}
    if args.num_experts:
        options |= {
            "num_moe_experts": args.num_experts,
            "moe_ffn_hidden_size": 2 * args.hidden_size,
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 1e-2,
            "add_bias_linear": False,
        }
    return TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=4 * args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=stages_of(args),  # DualPipe 2: a V has two stages on each rank
        pipeline_model_parallel_layout=args.pipeline_model_parallel_layout,
        mtp_num_layers=args.mtp_num_layers,
        sequence_parallel=args.sequence_parallel,
        hidden_dropout=args.dropout,
        attention_dropout=args.dropout,
        bf16=args.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        cuda_graph_scope=[],
        **options,
    )


def provide_model(
    args: argparse.Namespace, config: TransformerConfig, pre_process: bool, post_process: bool, pg_collection: Any
) -> GPTModel:
    """Build the stage of the pipeline that ``pg_collection`` selects."""
    layer = get_gpt_layer_local_spec(num_experts=args.num_experts, moe_grouped_gemm=False)
    mtp = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False) if args.mtp_num_layers else None
    return GPTModel(
        config=config,
        transformer_layer_spec=layer,
        vocab_size=VOCABULARY,
        max_sequence_length=args.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=args.tied_embeddings,
        position_embedding_type="rope" if args.mtp_num_layers else "learned_absolute",
        mtp_block_spec=mtp,
        pg_collection=pg_collection,
    )


def build(args: argparse.Namespace, device: torch.device) -> tuple[list[nn.Module], Any]:
    """Build the chunks of this rank, wrapped for data parallelism, and their optimizer."""
    config = transformer_config(args)
    provider = partial(provide_model, args, config)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=args.overlap_grad_reduce,
        use_distributed_optimizer=args.use_distributed_optimizer,
    )
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=args.lr,
        min_lr=args.min_lr,
        weight_decay=args.weight_decay,
        clip_grad=args.clip_grad,
        bf16=args.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=args.use_distributed_optimizer,
    )
    schedule = schedule_of(args)
    if schedule:  # DualPipe 3 and 4: two chunks per rank, and an optimizer that counts each parameter once
        model = build_dualpipe_model(provider, ddp_config, schedule=schedule, timeout=60 * args.timeout_minutes)
        optimizer = build_dualpipe_optimizer(optimizer_config, model)
    else:
        first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        chunk: nn.Module = provider(pre_process=first, post_process=last, pg_collection=groups).to(device)
        model = [DistributedDataParallel(config, ddp_config, Float16Module(config, chunk) if args.bf16 else chunk)]
        optimizer = get_megatron_optimizer(optimizer_config, model, use_gloo_process_groups=False)
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in model] if len(model) > 1 else model[0].no_sync
    return model, optimizer


def build_scheduler(args: argparse.Namespace, optimizer: Any) -> OptimizerParamScheduler:
    """A linear warm-up, then cosine decay, in iterations."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters,
        lr_decay_steps=args.lr_decay_iters,
        lr_decay_style="cosine",
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=args.lr_decay_iters,
        wd_incr_style="constant",
    )


# ------------------------------------------------------------------------------------------------------------ training


def forward_step(iterator: Iterator[Batch] | None, model: nn.Module) -> tuple[Tensor, Any]:
    """Run a microbatch; only the first and the last stage read it."""
    names = ("pre_process", "post_process", "mtp_process")
    first, last, mtp = (get_attr_wrapped_model(model, name) for name in names)
    if not (first or last):
        return model(None, None, None), None
    batch = next(iterator)
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens).contiguous()
    tokens = batch.tokens if first or mtp else None
    output = model(tokens, positions, None, labels=batch.labels if last else None)
    return output, loss_of


def loss_of(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """From losses ``[micro batch, sequence]``: their sum, the tokens to divide it by, and the values to report."""
    total, tokens = losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}


def mean_loss(reported: list[dict[str, Tensor]], device: torch.device) -> float:
    """The mean loss per token over all microbatches and replicas, in nats; valid on the last rank of each pipeline."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for each in reported:
        total += each["lm loss"]
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return float(total[0] / total[1]) if total[1] else float("nan")


def validation_loss(
    args: argparse.Namespace, model: list[nn.Module], run: Any, text: Text, device: torch.device
) -> float:
    """Run only forwards, on the same samples each time."""
    for chunk in model:
        chunk.eval()
    reported = []
    with torch.no_grad():
        for number in range(args.eval_iters):
            data = text.microbatches(args, number * args.global_batch_size, device)
            reported += run(data_iterator=data, forward_only=True)
    for chunk in model:
        chunk.train()
    return mean_loss(reported, device)


def print_once(text: str) -> None:
    """Print on one rank: the last, which has the losses."""
    if dist.get_rank() == dist.get_world_size() - 1:
        print(text, flush=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; one that a killed job left unfinished has no metadata."""
    complete = (path for path in folder.glob("iter_*") if check_is_distributed_checkpoint(str(path)))
    return max(complete, default=None)


def save(args: argparse.Namespace, model: list[nn.Module], optimizer: Any, common: dict[str, Any]) -> None:
    folder = args.save / f"iter_{common['iteration']:07}"
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # left by a job that was killed or that did not load it
    save_checkpoint(folder, model, optimizer, common)  # DualPipe 6
    print_once(f"saved {folder}")


def digest(model: list[nn.Module]) -> str:
    """The SHA-256 of all weights by their names in the whole model; raises ``RuntimeError`` if two replicas differ."""
    mine = {}
    for chunk in model:
        gpt = get_attr_wrapped_model(chunk, "decoder", return_model_obj=True)
        for name, weight in gpt.named_parameters():
            if name == "output_layer.weight" and gpt.share_embeddings_and_output_weights:
                if gpt.mtp_process:
                    continue  # allocated by Megatron, and not used
                name = "embedding.word_embeddings.weight"
            number = re.match(r"decoder\.layers\.(\d+)\.", name)
            if number:
                layer = gpt.decoder.layers[int(number[1])].layer_number
                name = f"decoder.layers.{layer}.{name[number.end() :]}"
            data = weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            mine[name, parallel_state.get_tensor_model_parallel_rank()] = hashlib.sha256(data).hexdigest()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = {pair for each in everyone for pair in each.items()}
    if len(found) != len(dict(found)):
        raise RuntimeError("the replicas of some weights differ")
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def pretrain(args: argparse.Namespace) -> str:
    """Train and return the digest; every process of the job calls this, with a default process group."""
    device = torch.device("cuda", torch.cuda.current_device()) if GPU else torch.device("cpu")
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size, args.pipeline_model_parallel_size, create_gloo_process_groups=False
    )
    seed = args.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()  # as Megatron's training loop does
    random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)

    model, optimizer = build(args, device)
    scheduler = build_scheduler(args, optimizer)
    training, validation = read_text(args)
    run = partial(
        get_forward_backward_func(args),  # DualPipe 5: Megatron's own function without the flag
        forward_step_func=forward_step,
        model=model,
        num_microbatches=args.num_microbatches,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
    )

    start = consumed = 0
    checkpoint = newest_checkpoint(args.load) if args.load else None
    if checkpoint:
        common = load_checkpoint(checkpoint, model, optimizer)  # DualPipe 6
        start, consumed = common["iteration"], common["consumed_samples"]
        scheduler.load_state_dict(common["scheduler"])
        print_once(f"loaded {checkpoint}")
    for iteration in range(start + 1, args.train_iters + 1):
        started = time.perf_counter()
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reported = run(data_iterator=training.microbatches(args, consumed, device), forward_only=False)
        rate = optimizer.param_groups[0]["lr"]
        _, norm, _ = optimizer.step()
        scheduler.step(1)
        consumed += args.global_batch_size
        loss, ms = mean_loss(reported, device), 1000 * (time.perf_counter() - started)
        print_once(
            f"iteration {iteration:5} | loss {loss:.6f} | grad norm {norm or 0:.4f} | lr {rate:.2e} | {ms:.0f} ms"
        )
        if args.eval_interval and iteration % args.eval_interval == 0:
            loss = validation_loss(args, model, run, validation, device)
            print_once(f"iteration {iteration:5} | validation loss {loss:.6f}")
        if args.save and (iteration % args.save_interval == 0 or iteration == args.train_iters):
            common = {"iteration": iteration, "consumed_samples": consumed, "scheduler": scheduler.state_dict()}
            save(args, model, optimizer, common)
    result = digest(model)
    print_once(f"digest {result}")
    return result


def main() -> None:
    args = parse_arguments()
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read at the first product on a GPU
        torch.use_deterministic_algorithms(True)
    if GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        install_cpu_standins()
    dist.init_process_group("nccl" if GPU else "gloo", timeout=timedelta(minutes=args.timeout_minutes))
    pretrain(args)
    dist.destroy_process_group()


if __name__ == "__main__":
    with nullcontext() if GPU else expected_warnings():
        main()
