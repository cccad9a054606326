"""The oracle: all stages and replicas in one process, with plain autograd, no schedule and no data-parallel wrapper.

It is independent of the other implementations: it reads none of their numbers, and uses only the layers of Megatron.
Each replica runs its microbatches one after the other through all stages; then gradients are scaled, summed over the
replicas and clipped as Megatron documents it, and torch's AdamW makes the step.  Tensor parallelism is not possible
here, since such layers need several processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from torch import Tensor, nn

from dualpipe.megatron.on_cpu import install_cpu_standins
from dualpipe.testing.launch import Context
from reference.megatron import data
from reference.megatron.case import Case
from reference.megatron.importing import expected_warnings
from reference.megatron.model import bucket_limit, build_gpt, seed, transformer_config
from reference.megatron.reduction import buckets, ring_sum
from reference.megatron.trace import Microbatch, Shard, StepTrace, Tensors

Gradients = list[dict[str, Tensor]]
"""By stage and parameter name, float32."""
_EPSILON = 1e-6
"""What Megatron adds to a norm before it divides by it."""


@dataclass(frozen=True)
class _Position:
    """A pipeline position, in place of the process group that Megatron's layers read it from."""

    stage: int
    stages: int

    def rank(self) -> int:
        return self.stage

    def size(self) -> int:
        return self.stages


@expected_warnings()
def run(case: Case, context: Context) -> list[StepTrace]:
    """Train for the case's steps, in a process with a process group of one."""
    install_cpu_standins()
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    scale = torch.ones(1) if case.per_token_loss else torch.ones(1) / case.per_lane
    MoEAuxLossAutoScaler.set_loss_scale(scale)
    MTPLossAutoScaler.set_loss_scale(scale)
    stages, generators = _build(case)
    copies = _embeddings(case, stages)
    masters = [_masters(case, stage) for stage in stages]
    optimizer = _optimizer(case, masters)
    traces = []
    for step in range(case.steps):
        trace = StepTrace()
        replicas = [
            _replica(case, step, replica, stages, generators[replica], trace) for replica in range(case.replicas)
        ]
        gradients = _reduce(case, replicas, copies)
        if copies:
            (first, one), (last, other) = copies
            gradients[first][one] = gradients[last][other] = gradients[first][one] + gradients[last][other]
        if case.per_token_loss:
            tokens = torch.stack([losses[0][1] for losses in trace.losses.values()]).sum().int()
            for stage in gradients:
                for name, gradient in stage.items():
                    stage[name] = gradient * (1.0 / tokens)
        norm = _norm(gradients, copies[1:])
        if case.balances_by_bias:
            _balance(stages)
        _record(case, trace, "gradients", gradients)
        factor = case.clip_norm / (norm + _EPSILON) if case.clip_norm else 1.0
        for master, stage in zip(masters, gradients, strict=True):
            for name, weight in master.items():
                weight.grad = stage[name] * factor if factor < 1.0 else stage[name].clone()
        optimizer.step()
        optimizer.zero_grad()
        for master, module in zip(masters, stages, strict=True):
            for name, parameter in module.named_parameters():
                parameter.data.copy_(master[name].data)
        if case.qk_clip:
            _clip_queries_and_keys(stages, masters)
        _record(case, trace, "weights", [{**dict(module.named_parameters()), **_biases(module)} for module in stages])
        if case.has_main_weights and not case.distributed_optimizer:
            _record(case, trace, "main_weights", masters)
        trace.norms = {Shard(0, stage, 0): norm for stage in range(case.stages)}
        traces.append(trace)
        context.progress(step + 1)
    return traces


def _build(case: Case) -> tuple[list[nn.Module], list[list[_Generators]]]:
    """The stages, and by replica and stage the random generators of dropout."""
    config, stages, generators = transformer_config(case), [], []
    for stage in range(case.stages):
        seed(case, stage)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        groups.pp, groups.embd = _Position(stage, case.stages), None
        with _at_stage(case, stage):
            module = build_gpt(case, config, stage == 0, stage == case.stages - 1, groups)
        stages.append(module.bfloat16() if config.bf16 else module)
        generators.append(_Generators.now())
    return stages, [[_Generators(each.default, dict(each.named)) for each in generators] for _ in range(case.replicas)]


@contextmanager
def _at_stage(case: Case, stage: int) -> Iterator[None]:
    """Inside the block, Megatron reads this position from ``parallel_state``."""
    parallel_state.set_pipeline_model_parallel_rank(stage)
    parallel_state.set_pipeline_model_parallel_world_size(case.stages)
    try:
        yield
    finally:
        parallel_state.set_pipeline_model_parallel_rank(None)
        parallel_state.set_pipeline_model_parallel_world_size(None)


def _embeddings(case: Case, stages: Sequence[Any]) -> list[tuple[int, str]]:
    """Stage and name of the two copies of the embedding, made equal; none if the model uses it at one end only."""
    if not case.embedding_is_shared:
        return []
    copies = []
    for number in (0, case.stages - 1):
        weight = stages[number].shared_embedding_or_output_weight()
        copies.append((number, next(name for name, each in stages[number].named_parameters() if each is weight)))
        weight.data.copy_(stages[0].shared_embedding_or_output_weight().data)
    return copies


@dataclass
class _Generators:
    """The states of the random generators of one replica of one stage; within the block they are in use."""

    default: Tensor
    named: dict[str, Tensor]

    @classmethod
    def now(cls) -> _Generators:
        return cls(torch.get_rng_state(), dict(get_cuda_rng_tracker().get_states()))

    def __enter__(self) -> None:
        torch.set_rng_state(self.default)
        get_cuda_rng_tracker().set_states(dict(self.named))

    def __exit__(self, *exception: object) -> None:
        now = self.now()
        self.default, self.named = now.default, now.named


def _masters(case: Case, stage: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer updates: the model's own, or float32 copies of bf16 parameters."""
    parameters = dict(stage.named_parameters())
    if not case.has_main_weights:
        return parameters
    return {name: nn.Parameter(parameter.detach().float()) for name, parameter in parameters.items()}


def _optimizer(case: Case, masters: Sequence[Mapping[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW without weight decay for biases and other vectors, such as those of norms."""
    decaying, others = list[nn.Parameter](), list[nn.Parameter]()
    for stage in masters:
        for name, parameter in stage.items():
            (others if _is_plain(name, parameter) else decaying).append(parameter)
    groups = [{"params": decaying, "weight_decay": case.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=case.learning_rate, foreach=False)


def _is_plain(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 1 or name.endswith(".bias")


def _replica(
    case: Case,
    step: int,
    replica: int,
    stages: Sequence[nn.Module],
    generators: Sequence[_Generators],
    trace: StepTrace,
) -> Gradients:
    """One replica's gradients, summed over its microbatches in float32."""
    summed: Gradients = [
        {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in stage.named_parameters()}
        for stage in stages
    ]
    for batch in data.of_replica(case, step, replica):
        hidden: Any = None
        for number, (stage, states) in enumerate(zip(stages, generators, strict=True)):
            with states, _at_stage(case, number):
                hidden = _forward(stage, hidden, batch)
        total = (hidden.float() * batch.mask).sum()
        tokens = batch.mask.sum().int()
        trace.losses[Microbatch(replica, batch.number)] = [torch.stack([total.detach().clone(), tokens.float()])]
        loss = total if case.per_token_loss else total / tokens.clamp(min=1) / case.per_lane
        loss.backward()
        for stage, sums in zip(stages, summed, strict=True):
            for name, parameter in stage.named_parameters():
                assert (parameter.grad is None) == (name == case.unused_weight), f"the gradient of {name}"
                if parameter.grad is not None:
                    sums[name] += parameter.grad
                    parameter.grad = None
    return summed


def _forward(stage: Any, hidden: Tensor | None, batch: data.Batch) -> Tensor:
    """The output of a stage for the output of the previous one; for the last stage the loss of each token."""
    positions = torch.arange(batch.tokens.shape[1]).repeat(batch.tokens.shape[0], 1)
    tokens = batch.tokens if stage.pre_process or stage.mtp_process else None
    labels = batch.labels if stage.post_process else None
    stage.set_input_tensor(hidden)
    mask = {"loss_mask": batch.mask} if stage.mtp_process else {}
    output: Tensor = stage(tokens, positions, None, labels=labels, **mask)
    return output


def _reduce(case: Case, replicas: Sequence[Gradients], copies: Sequence[tuple[int, str]]) -> Gradients:
    """The mean over the replicas (their sum if the loss is normalised by tokens), in the order of their numbers."""
    scale = 1.0 if case.per_token_loss else 1.0 / case.replicas
    reduced: Gradients = []
    for stage in range(case.stages):
        shapes = {name: gradient.shape for name, gradient in replicas[0][stage].items()}
        result: dict[str, Tensor] = {}
        layout = buckets(
            [(name, shape.numel()) for name, shape in shapes.items()],
            bucket_limit(case) if stage == 0 else None,  # Megatron splits only the first stage into buckets
            case.replicas if case.distributed_optimizer else None,
            [name for number, name in copies if number == stage],
        )
        for bucket in layout:
            parts = [torch.zeros(bucket.size) for _ in replicas]
            for part, gradients in zip(parts, replicas, strict=True):
                for name, start, size in bucket.spans:
                    part[start : start + size] = gradients[stage][name].flatten()
                part *= scale
            whole = _sum_of_instances(case, parts) if case.instances > 1 else ring_sum(parts)
            for name, start, size in bucket.spans:
                result[name] = whole[start : start + size].view(shapes[name])
        reduced.append({name: result[name] for name in shapes})
    return reduced


def _sum_of_instances(case: Case, parts: Sequence[Tensor]) -> Tensor:
    """The sum over the replicas of each instance of the distributed optimizer, then shard by shard over instances."""
    size = case.replicas // case.instances
    sums = [ring_sum(parts[start : start + size]) for start in range(0, case.replicas, size)]
    return torch.cat([ring_sum(shards) for shards in zip(*(each.chunk(size) for each in sums), strict=True)])


def _norm(gradients: Gradients, duplicates: Sequence[tuple[int, str]]) -> float:
    """The norm over all stages: from the norms of tensors, decaying ones first, with squares summed in ring order.

    ``duplicates``, the copy of the embedding on the last stage, do not count.
    """
    squares = []
    for number, stage in enumerate(gradients):
        counted = [item for item in stage.items() if (number, item[0]) not in duplicates]
        ordered = sorted(counted, key=lambda item: _is_plain(*item))
        norms = torch.tensor([float(torch.norm(gradient)) for _, gradient in ordered])
        squares.append(torch.norm(norms).reshape(1) ** 2.0)
    norm: float = float(ring_sum(squares)) ** 0.5
    return norm


def _clip_queries_and_keys(stages: Sequence[Any], masters: Sequence[Mapping[str, nn.Parameter]]) -> None:
    """Scale the weights of each head by its largest logit over all replicas, which all ran through these layers.

    Multi-token prediction layers are not clipped: Megatron clips those of the decoder alone.
    """
    for stage, master in zip(stages, masters, strict=True):
        for name, parameter in stage.named_parameters():
            parameter.main_param = master[name]
        for layer in stage.decoder.layers:
            layer.self_attention.clip_qk()


def _balance(stages: Sequence[Any]) -> None:
    """Raise each expert's bias if it got fewer tokens than the average, over all replicas, else lower it."""
    for stage in stages:
        for router in stage.modules():
            counts = getattr(router, "local_tokens_per_expert", None)
            if counts is not None:
                fewer = counts.sum(dim=-1, keepdim=True) / counts.shape[-1] - counts
                router.expert_bias += torch.sign(fewer) * stage.config.moe_router_bias_update_rate
                counts.zero_()


def _biases(stage: nn.Module) -> dict[str, Tensor]:
    return {name: bias for name, bias in stage.named_buffers() if name.endswith("expert_bias")}


def _record(case: Case, trace: StepTrace, what: str, found: Sequence[Mapping[str, Tensor]]) -> None:
    """Record these tensors for every replica."""
    for stage, tensors in enumerate(found):
        copies: Tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        getattr(trace, what).update({Shard(replica, stage, 0): copies for replica in range(case.replicas)})
