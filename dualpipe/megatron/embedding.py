"""Embedding weights that a model uses at both of its ends: tied output weights, and multi-token prediction.

Megatron keeps a copy of the embedding on the last stage if the output layer is tied to it, or if there are multi-token
prediction layers.  Both copies start equal, get the sum of their gradients at every step, and so stay equal.  Under
DualPipe each stage has two replicas, so there are four copies::

    rank        0                       P-1
    lane >      stage 0, embedding      stage P-1, its copy
    lane <      stage P-1, its copy     stage 0, embedding

``finalize_model_grads`` sums those of lane > over Megatron's embedding group, the ranks 0 and P-1.  Those of lane < are
summed here, over the same group: after every gradient was reduced over the replicas of its stage, and before gradients
are scaled by tokens.  Then each copy is the sum of two numbers, as under 1F1B, so it has the same bits.  The two copies
on one rank must not be added to each other: under the distributed optimizer the rank owns different shards of them.

Under DualPipeV there are two copies, both on rank 0 and sharded alike, so there they are added to each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from dualpipe.errors import RuleError
from dualpipe.megatron.groups import Groups
from dualpipe.schedule import DOWN, Chunk


def is_shared(module: nn.Module) -> bool:
    """Whether the model keeps a copy of the embedding on its last stage; as ``finalize_model_grads`` decides it."""
    tied = getattr(module, "share_embeddings_and_output_weights", False)
    return bool(tied or getattr(get_model_config(module), "mtp_num_layers", None))


def require_ends(groups: Groups, built: Mapping[int, nn.Module]) -> None:
    """Refuse copies of the embedding anywhere but on the first and the last stage.

    ``built`` has the rank's chunks by stage.
    """
    for stage, module in built.items():
        if getattr(module, "mtp_process", False) and stage != groups.stages - 1:
            raise RuleError(
                "multi-token prediction layers must be on the last stage, with the loss",
                f"the provider built them in stage {stage} of {groups.stages}",
                "put every m of --pipeline-model-parallel-layout into its last part",
            )
    if any(map(is_shared, built.values())):
        _require_group_of_ends(groups)


def _require_group_of_ends(groups: Groups) -> None:
    if groups.embedding is None or not groups.placement.mirrored:
        return
    ranks = dist.get_process_group_ranks(groups.pipeline)
    found = dist.get_process_group_ranks(groups.embedding)
    if found != [ranks[0], ranks[-1]]:
        raise RuleError(
            "the embedding group must be the first and the last rank of the pipeline",
            f"got ranks {found} of the pipeline {ranks}",
            "leave out get_embedding_ranks in initialize_model_parallel",
        )


@dataclass(frozen=True)
class SumOverEnds:
    """Sums the gradients of the two copies of lane <.  ``weight`` is the copy on this rank."""

    weight: nn.Parameter
    group: dist.ProcessGroup

    def __call__(self) -> None:
        """Collective over the embedding group; call it after the gradients of all chunks were reduced."""
        gradient = gradient_of(self.weight)
        if gradient is not None:
            dist.all_reduce(gradient, group=self.group)


@dataclass(frozen=True)
class SumOnRank:
    """Sums the gradients of two copies on this rank."""

    first: nn.Parameter
    last: nn.Parameter

    def __call__(self) -> None:
        """Call it after the gradients of all chunks were reduced."""
        one, other = gradient_of(self.first), gradient_of(self.last)
        if one is not None and other is not None:
            one += other
            other.copy_(one)


def embedding_sum(groups: Groups, built: Mapping[int, nn.Module]) -> SumOverEnds | SumOnRank | None:
    """The sum that this rank must add to Megatron's, if any."""
    ends: dict[int, Any] = {stage: built[stage] for stage in (0, groups.stages - 1) if stage in built}
    weights = {stage: end.shared_embedding_or_output_weight() for stage, end in ends.items() if is_shared(end)}
    if not groups.placement.mirrored:
        return SumOnRank(*weights.values()) if weights else None
    below = [weight for stage, weight in weights.items() if Chunk(DOWN, stage) in groups.chunks]
    return SumOverEnds(below[0], groups.embedding) if below and groups.embedding is not None else None


def copy_to_last(groups: Groups, built: Mapping[int, nn.Module]) -> None:
    """Give the last stage the weights of the embedding, if the first one is on the same rank.

    Elsewhere Megatron does it when it builds the model.
    """
    sums = embedding_sum(groups, built)
    if isinstance(sums, SumOnRank):
        sums.last.data.copy_(sums.first.data)


def gradient_of(weight: Any) -> Tensor | None:
    """The gradient that the optimizer reads; ``None`` for a frozen weight."""
    gradient: Tensor | None = getattr(weight, "main_grad", None)
    return weight.grad if gradient is None else gradient


def refuse_saving(module: nn.Module) -> None:
    """Raise ``RuleError`` for a model that Megatron cannot save."""
    if getattr(module, "share_embeddings_and_output_weights", False) and getattr(
        get_model_config(module), "mtp_num_layers", None
    ):
        raise RuleError(
            "a model with tied embeddings and multi-token prediction cannot be saved (megatron-core 0.16.1 stops with "
            "an AssertionError, under its own schedules too: the last stage has an output layer without weights)",
            "both are set",
            "untie the embeddings to save checkpoints",
        )
