"""Megatron's optimizer over the two chunks of a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from dualpipe.errors import RuleError
from dualpipe.megatron.model import chunk_of
from dualpipe.schedule import UP

SHARDING = "fully_reshardable"
"""Megatron's name of the format of a checkpoint that holds an optimizer's state parameter by parameter."""


def build_dualpipe_optimizer(config: OptimizerConfig, model: list[nn.Module], **options: Any) -> Any:
    """What ``get_megatron_optimizer(config, model, **options)`` returns, with each parameter counted once.

    The gradient norm of the plain optimizer is summed over the model-parallel group, in which every stage has one
    replica that counts (see ``build_dualpipe_model``).  The distributed optimizer shards a stage over all of its
    replicas, so there the sum over the world counts each once.
    """
    own = ProcessGroupCollection.use_mpu_process_groups()
    (stage,) = (chunk.place.collection for chunk in map(chunk_of, model) if chunk.place.lane is UP)
    collection = ProcessGroupCollection(**{**vars(stage), "pp": own.pp, "intra_dist_opt": dist.group.WORLD})
    built = get_megatron_optimizer(config, model, pg_collection=collection, use_gloo_process_groups=False, **options)
    for part in getattr(built, "chained_optimizers", [built]):
        if isinstance(part, DistributedOptimizer):
            part.get_parameter_state_dp_zero = _by_buffer(part)
            part.sharded_state_dict = _parameter_by_parameter(part.sharded_state_dict)
            part.load_parameter_state_from_dp_zero = _refuse
    return built


def _by_buffer(part: Any) -> Callable[..., Any]:
    """Megatron's gathering of the state, for one buffer after the other, each over its own group.

    The distributed optimizer keeps one data-parallel group, and the two chunks of a rank have two.  The chunks are in
    order of stage, so both ranks of a pair go through the groups in the same order.
    """
    stock = part.get_parameter_state_dp_zero

    def get_parameter_state_dp_zero(
        use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
    ) -> dict[Any, Any]:
        if use_gloo_comm or not return_on_all_ranks:
            _refuse("a state gathered on one rank")
        state: dict[Any, Any] = {"buckets_coalesced": True}
        kept = {name: getattr(part, name) for name in ("gbuf_ranges", "buffers", "data_parallel_group")}
        try:
            for index, (ranges, buffer) in enumerate(zip(kept["gbuf_ranges"], kept["buffers"], strict=True)):
                part.gbuf_ranges, part.buffers = [ranges], [buffer]
                part.data_parallel_group = buffer.data_parallel_group
                state[index] = stock(use_gloo_comm=False, empty_data=empty_data, return_on_all_ranks=True)[0]
        finally:
            for name, value in kept.items():
                setattr(part, name, value)
        return state

    return get_parameter_state_dp_zero


def _parameter_by_parameter(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The one format of the distributed optimizer's state that does not depend on its single data-parallel group."""

    def sharded_state_dict(*args: Any, metadata: dict[str, Any] | None = None, **options: Any) -> Any:
        metadata = {"distrib_optim_sharding_type": SHARDING, **(metadata or {})}
        kind = options.pop("sharding_type", None) or metadata["distrib_optim_sharding_type"]
        if kind != SHARDING or metadata.get("distrib_optim_fully_reshardable_mem_efficient"):
            _refuse(kind if kind != SHARDING else "distrib_optim_fully_reshardable_mem_efficient")
        return stock(*args, metadata=metadata, **options)

    return sharded_state_dict


def _refuse(kind: object = "a state gathered on one rank", *args: Any, **options: Any) -> Any:
    raise RuleError(
        "under DualPipe the distributed optimizer is saved parameter by parameter, gathered on all ranks of a stage",
        f"got {kind}",
        f"set metadata['distrib_optim_sharding_type'] to {SHARDING!r}; "
        "in Megatron-LM, --dist-ckpt-optim-fully-reshardable",
    )
