"""A small version of Megatron's training loop, which records each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer.qk_clip import clip_qk
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from torch import Tensor, nn

from reference.megatron.case import Case
from reference.megatron.data import Batch
from reference.megatron.trace import Microbatch, Shard, StepTrace, Tensors

Schedule = Callable[[Callable[..., Any], Iterator[Batch] | None], list[dict[str, Tensor]]]
"""Runs one step, given the forward step function and the data iterator; returns what Megatron's schedules return."""


class Checkpoints(Protocol):
    """Loads and saves checkpoints in a run; ``model`` is the list of the rank's wrapped chunks."""

    def first(self, model: list[Any], optimizer: Any) -> int:
        """Before the first step: load a checkpoint, if any; returns the number of the next step, from 0."""

    def after(self, steps: int, model: list[Any], optimizer: Any) -> None:
        """After this many steps since training began: save a checkpoint, or do nothing."""


def train(
    case: Case,
    chunks: Sequence[tuple[Shard, DistributedDataParallel]],
    optimizer: Any,
    schedule: Schedule,
    data: Callable[[int], Iterator[Batch] | None],
    reports: bool,
    progress: Callable[[Any], None] = lambda value: None,
    checkpoints: Checkpoints | None = None,
) -> list[StepTrace]:
    """Train this rank's ``chunks`` for the case's steps and record every step.

    ``data`` returns a step's iterator, ``None`` on a rank without data.  ``reports``: whether this rank's losses are
    read, as the training loop reads those of the last rank of a pipeline.  ``checkpoints`` are for a run that is
    interrupted or resumed.
    """
    config = chunks[0][1].config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if case.overlap_grad_reduce:
        functions = [chunk.no_sync for _, chunk in chunks]
        config.no_sync_func = functions[0] if len(functions) == 1 else functions
    scheduler = _scheduler(case, optimizer)
    model = [chunk for _, chunk in chunks]
    traces = []
    for step in range(checkpoints.first(model, optimizer) if checkpoints else 0, case.steps):
        for _, chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        store = schedule(forward_step, data(step))
        trace = StepTrace(losses=losses_of(store) if reports else {})
        trace.gradients |= {shard: main_gradients(chunk) for shard, chunk in chunks}
        done, norm, _ = optimizer.step()
        own = chunks[0][0]
        if case.qk_clip:
            trace.logits[own] = clip_qk(model)
        scheduler.step(increment=1)
        trace.norms[own], trace.done[own] = float(norm or 0.0), bool(done)
        trace.weights |= {shard: weights(chunk) for shard, chunk in chunks}
        trace.main_weights |= {shard: main_weights(chunk) for shard, chunk in chunks}
        traces.append(trace)
        if checkpoints:
            checkpoints.after(step + 1, model, optimizer)
        progress(step + 1)
    return traces


def _scheduler(case: Case, optimizer: Any) -> OptimizerParamScheduler:
    """Constant rates.  Megatron's scheduler also sets the weight decay of each parameter group, zero for biases."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=case.learning_rate,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=case.steps,
        lr_decay_style="constant",
        start_wd=case.weight_decay,
        end_wd=case.weight_decay,
        wd_incr_steps=case.steps,
        wd_incr_style="constant",
    )


def forward_step(
    iterator: Iterator[Batch] | None, model: nn.Module, return_schedule_plan: bool = False
) -> tuple[Any, Callable[[Tensor], Any]]:
    """The ``forward_step_func``: reads the data where the stage is an end of the pipeline.

    Returns the output, or with ``return_schedule_plan`` Megatron's plan that computes it, and the loss function.
    """
    gpt = gpt_of(model)
    run = gpt.build_schedule_plan if return_schedule_plan else model
    if not (gpt.pre_process or gpt.post_process):
        return run(None, None, None), no_loss
    assert iterator is not None, "the ends of a pipeline have data"
    batch = on_this_context_rank(next(iterator))
    return run(*inputs_of(gpt, batch), **options_of(gpt, batch)), partial(loss, batch)


def on_this_context_rank(batch: Batch) -> Batch:
    """The tokens of a microbatch that this rank has under context parallelism."""
    own = get_batch_on_this_cp_rank({"tokens": batch.tokens, "labels": batch.labels, "mask": batch.mask})
    return batch._replace(**own)


def rank_in_replica() -> int:
    """The number of this rank among those that share its stage of a replica, by tensor or context parallelism."""
    ranks = parallel_state.get_context_parallel_world_size()
    return int(parallel_state.get_tensor_model_parallel_rank() * ranks + parallel_state.get_context_parallel_rank())


def no_loss(output: Tensor) -> NoReturn:
    raise AssertionError("only the last stage calls the loss function")


def inputs_of(gpt: Any, batch: Batch) -> tuple[Tensor | None, Tensor, None]:
    """Tokens, where a stage looks them up, their positions, and no attention mask."""
    return batch.tokens if gpt.pre_process or gpt.mtp_process else None, positions(batch), None


def options_of(gpt: Any, batch: Batch) -> dict[str, Tensor | None]:
    """Labels for the last stage, and the mask of the multi-token prediction losses, which the model computes itself."""
    labels = batch.labels if gpt.post_process else None
    return {"labels": labels, "loss_mask": batch.mask} if gpt.mtp_process else {"labels": labels}


def positions(batch: Batch) -> Tensor:
    """Position ids of a microbatch, int64 ``[batch, sequence]``."""
    return torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens).contiguous()


def loss(batch: Batch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A microbatch's loss: sum over unmasked tokens, their number, and what is reported of them and whose they are."""
    total = (output.float() * batch.mask).sum()
    tokens = batch.mask.sum().to(torch.int)
    reported = torch.stack([total.detach().clone(), tokens.float()])
    return total, tokens, {"lm loss": reported, "microbatch": torch.tensor([batch.replica, batch.number])}


def losses_of(store: Sequence[dict[str, Tensor]]) -> dict[Microbatch, list[Tensor]]:
    """The losses that a schedule returned, by the microbatch that each of them names."""
    found: dict[Microbatch, list[Tensor]] = {}
    for entry in store:
        replica, number = (int(value) for value in entry["microbatch"])
        found.setdefault(Microbatch(replica, number), []).append(entry["lm loss"].clone())
    return found


def gpt_of(chunk: nn.Module) -> Any:
    """The GPTModel inside its wrappers."""
    return get_attr_wrapped_model(chunk, "pre_process", return_model_obj=True)


def named(chunk: nn.Module) -> Iterator[tuple[str, Any]]:
    """The parameters by name; the names of expert parameters include the expert parallel rank that holds them."""
    ranks = parallel_state.get_expert_model_parallel_world_size()
    for name, parameter in gpt_of(chunk).named_parameters():
        alike = ranks == 1 or getattr(parameter, "allreduce", True)
        yield name if alike else f"{name} of expert rank {parallel_state.get_expert_model_parallel_rank()}", parameter


def weights(chunk: nn.Module) -> Tensors:
    """The parameters, and the routers' expert biases, which are updated outside the optimizer."""
    biases = {name: b for name, b in gpt_of(chunk).named_buffers() if name.endswith("expert_bias") and b is not None}
    return {name: _copy(tensor) for name, tensor in [*named(chunk), *biases.items()]}


def main_weights(chunk: nn.Module) -> Tensors:
    """The optimizer's float32 copies of the parameters, if it keeps any."""
    found = {name: getattr(parameter, "main_param", None) for name, parameter in named(chunk)}
    return {name: _copy(copy) for name, copy in found.items() if copy is not None}


def main_gradients(chunk: DistributedDataParallel) -> Tensors:
    """Every parameter's whole reduced ``main_grad``.

    Under the distributed optimizer, only a replica's own part of each bucket is valid, so the parts of all replicas are
    gathered, bucket by bucket.  All ranks of the chunk's group must call this together.
    """
    names = {parameter: name for name, parameter in named(chunk)}
    if not chunk.ddp_config.use_distributed_optimizer:
        return {name: _copy(parameter.main_grad) for parameter, name in names.items()}
    found: dict[str, Tensor] = {}
    for bucket_group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
        group = bucket_group.intra_distributed_optimizer_instance_group
        for bucket in bucket_group.buckets:
            mine = bucket.grad_data.chunk(group.size())[group.rank()]
            shards = [torch.empty_like(mine) for _ in range(group.size())]
            dist.all_gather(shards, mine.contiguous(), group=group)
            whole = torch.cat(shards)
            for parameter in bucket.params_list:
                start = parameter.main_grad.storage_offset() - bucket.grad_data.storage_offset()
                flat = whole[start : start + parameter.numel()]
                found[names[parameter]] = flat.view(parameter.shape).clone()
    return found


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()
