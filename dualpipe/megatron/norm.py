"""The gradient norm of a rank with two stages, added up stage by stage as under 1F1B, so that it has the same bits.

Under 1F1B a rank computes the sum of squares of its one stage, and an all-reduce adds these numbers.  Here a rank has
two such numbers.  If it added them first, the total would differ in its last bits, and with clipping all weights would
differ too.  So each rank computes one number for each chunk, all ranks exchange their numbers, and each rank adds them
in the order of gloo's all-reduce under 1F1B: from the last rank to the first.  (NCCL chooses its own order.)  Each rank
of 1F1B has one replica of a stage: first the replicas of lane >, then those of lane <, in each lane by
data-parallel rank.  Every instance of the distributed optimizer has all gradients, in shards of its own, so only those
of the first instance count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from dualpipe.megatron.groups import Groups
from dualpipe.megatron.iterators import LANES
from dualpipe.schedule import Chunk


def add_norms_by_stage(optimizer: Any, model: Mapping[Chunk, nn.Module], groups: Groups) -> None:
    """Let Megatron's chained optimizer over the two chunks of a rank compute its norm stage by stage."""
    parts = [part for part in optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False)]
    chunk_of = {parameter: chunk for chunk, module in model.items() for parameter in module.parameters()}
    owners = [_owners(part, chunk_of) for part in parts]
    chunks = {chunk: groups.instance(chunk) == 0 for chunk in model}

    def get_grad_norm() -> float:
        if optimizer.grads_states_parallel_group_is_shared():
            return _norm(parts, owners, chunks, optimizer.get_grad_stats_parallel_group())
        norms = [
            _norm([part], [owner], chunks, part.get_grad_stats_parallel_group())
            for part, owner in zip(parts, owners, strict=True)
        ]
        return norms[0] if len(norms) == 1 else math.sqrt(sum(norm**2 for norm in norms))

    optimizer.get_grad_norm = get_grad_norm


def count_zeros_once(optimizer: Any, instances: int) -> None:
    """Let Megatron's optimizer count the zeros in its gradients once, as every instance has all of them."""
    count = optimizer.count_zeros
    optimizer.count_zeros = lambda: count() / instances


def _owners(part: Any, chunk_of: Mapping[Any, Chunk]) -> dict[int, Chunk]:
    """By the id of each parameter that an optimizer updates, the chunk of the model's parameter."""
    if isinstance(part, DistributedOptimizer):
        return {
            id(part.optimizer.param_groups[group]["params"][order]): chunk_of[parameter]
            for parameter, (group, order) in part.model_param_group_index_map.items()
        }
    return {id(getattr(parameter, "main_param", parameter)): chunk for parameter, chunk in chunk_of.items()}


def _norm(
    parts: Sequence[Any],
    owners: Sequence[Mapping[int, Chunk]],
    chunks: Mapping[Chunk, bool],
    group: dist.ProcessGroup,
) -> float:
    """The norm over the ranks of ``group`` of the gradients of some optimizers.

    ``chunks`` maps each chunk of this rank to whether its gradients count.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    mine = torch.zeros((len(chunks), 4), dtype=torch.float64, device=device)  # represents float32 exactly
    for row, (chunk, counts) in zip(mine, chunks.items(), strict=True):
        gradients = [
            gradient for part, owner in zip(parts, owners, strict=True) for gradient in _gradients(part, owner, chunk)
        ]
        row[0], row[1], row[2] = chunk.stage, LANES.index(chunk.lane), counts
        if gradients:
            row[3] = _square(gradients)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    order = sorted(
        (stage, lane, rank, square)
        for rank, rows in enumerate(everyone)
        for stage, lane, counts, square in rows.tolist()
        if counts
    )
    total = torch.zeros((), dtype=torch.float32)
    for *_, square in reversed(order):
        total = total + torch.tensor(square, dtype=torch.float32)
    norm: float = total.item() ** 0.5
    return norm


def _gradients(part: Any, owner: Mapping[int, Chunk], chunk: Chunk) -> list[Tensor]:
    """The gradients of a chunk that count, as Megatron selects them."""
    with _only(part, [parameter for parameter in part.get_parameters() if owner[id(parameter)] == chunk]):
        later = getattr(part, "get_grads_for_grad_norm", None)  # its name after 0.16.1
        gradients: list[Tensor] = (later or part.get_main_grads_for_grad_norm)()
    return gradients


@contextmanager
def _only(part: Any, parameters: list[Any]) -> Iterator[None]:
    """Inside the block, the optimizer has only these parameters."""
    part.get_parameters = lambda: parameters
    try:
        yield
    finally:
        del part.get_parameters  # uncovers the class's own


def _square(gradients: list[Tensor]) -> Tensor:
    """The sum of squares as ``megatron.core.optimizer.clip_grads.get_grad_norm_fp32`` computes it."""
    overflow = torch.zeros(1, dtype=torch.int, device=gradients[0].device)
    norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [gradients], False)
    square: Tensor = norm.reshape(()) ** 2.0
    return square
