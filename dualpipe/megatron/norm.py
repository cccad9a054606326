"""The gradient norm of a rank with two stages, added up stage by stage as under 1F1B, so that it has the same bits.

Under 1F1B a rank computes the sum of squares of its one stage, and an all-reduce adds these numbers.  Here a rank has
two such numbers.  If it added them first, the total would differ in its last bits, and with clipping all weights would
differ too.  So each rank computes one number for each chunk, all ranks exchange their numbers, and each rank adds them
in the order of gloo's all-reduce under 1F1B: from the last rank to the first.  (NCCL chooses its own order.)  Each rank
of 1F1B stands for one replica of a stage: first the replicas of lane >, then those of lane <, in each lane by
data-parallel rank.
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

from dualpipe.megatron.iterators import LANES
from dualpipe.schedule import Chunk


def add_norms_by_stage(optimizer: Any, model: Mapping[Chunk, nn.Module]) -> None:
    """Let Megatron's chained optimizer over the two chunks of a rank compute its norm stage by stage."""
    parts = [part for part in optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False)]
    chunk_of = {parameter: chunk for chunk, module in model.items() for parameter in module.parameters()}
    owners = [_owners(part, chunk_of) for part in parts]

    def get_grad_norm() -> float:
        if optimizer.grads_states_parallel_group_is_shared():
            return _norm(parts, owners, list(model), optimizer.get_grad_stats_parallel_group())
        norms = [
            _norm([part], [owner], list(model), part.get_grad_stats_parallel_group())
            for part, owner in zip(parts, owners, strict=True)
        ]
        return norms[0] if len(norms) == 1 else math.sqrt(sum(norm**2 for norm in norms))

    optimizer.get_grad_norm = get_grad_norm


def _owners(part: Any, chunk_of: Mapping[Any, Chunk]) -> dict[int, Chunk]:
    """By the id of each parameter that an optimizer updates, the chunk of the model's parameter."""
    if isinstance(part, DistributedOptimizer):
        return {
            id(part.optimizer.param_groups[group]["params"][order]): chunk_of[parameter]
            for parameter, (group, order) in part.model_param_group_index_map.items()
        }
    return {id(getattr(parameter, "main_param", parameter)): chunk for parameter, chunk in chunk_of.items()}


def _norm(
    parts: Sequence[Any], owners: Sequence[Mapping[int, Chunk]], chunks: Sequence[Chunk], group: dist.ProcessGroup
) -> float:
    """The norm over the ranks of ``group`` of the gradients of some optimizers."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    mine = torch.zeros((len(chunks), 3), dtype=torch.float64, device=device)  # represents float32 exactly
    for row, chunk in zip(mine, chunks, strict=True):
        gradients = [
            gradient for part, owner in zip(parts, owners, strict=True) for gradient in _gradients(part, owner, chunk)
        ]
        row[0], row[1] = chunk.stage, LANES.index(chunk.lane)
        if gradients:
            row[2] = _square(gradients)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    order = sorted(
        (stage, lane, rank, square) for rank, rows in enumerate(everyone) for stage, lane, square in rows.tolist()
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
