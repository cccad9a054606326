"""Megatron's optimizer over the two chunks of a rank."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from dualpipe.megatron.model import setups_of
from dualpipe.megatron.norm import add_norms_by_stage, count_zeros_once
from dualpipe.megatron.optimizer_state import SHARDING, distributed_parts, refuse_format, save_parameters


def build_dualpipe_optimizer(config: OptimizerConfig, model: list[nn.Module], **options: Any) -> Any:
    """The result of ``get_megatron_optimizer(config, model, **options)``, with each parameter counted once in norms.

    The gradient norm of the plain optimizer is summed over the model-parallel group, where one replica of every stage
    is marked to count (see ``build_dualpipe_model``).  The distributed optimizer shards a stage over all of its
    replicas, so there the sum over all processes counts each parameter once, or with several instances the sum of one
    instance.  Where two stages of a rank count, they are added up as under 1F1B (see ``dualpipe.megatron.norm``).

    Raises ``RuleError`` unless ``model`` is what ``build_dualpipe_model`` returned: both chunks, in order of stage.
    """
    setups = setups_of(model)
    own = ProcessGroupCollection.use_mpu_process_groups()
    groups = setups[0].shared.groups
    stage = groups.chunks[groups.own]
    collection = ProcessGroupCollection(**{**vars(stage), "pp": own.pp, "intra_dist_opt": dist.group.WORLD})
    built = get_megatron_optimizer(config, model, pg_collection=collection, use_gloo_process_groups=False, **options)
    for part in distributed_parts(built):
        save_parameters(part)
        part.sharded_state_dict = _parameter_by_parameter(part.sharded_state_dict)
        part.load_parameter_state_from_dp_zero = lambda *_, **__: refuse_format("a state gathered on one rank")
    if config.use_distributed_optimizer or not groups.placement.mirrored:
        add_norms_by_stage(built, {setup.chunk: module for setup, module in zip(setups, model, strict=True)}, groups)
    if groups.instances > 1:
        count_zeros_once(built, groups.instances)
    setups[0].shared.optimizer = weakref.ref(built)
    return built


def _parameter_by_parameter(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Allow only the format of the distributed optimizer's state that needs no single data-parallel group."""

    def sharded_state_dict(*args: Any, metadata: dict[str, Any] | None = None, **options: Any) -> Any:
        metadata = {"distrib_optim_sharding_type": SHARDING, **(metadata or {})}
        kind = options.pop("sharding_type", None) or metadata["distrib_optim_sharding_type"]
        if kind != SHARDING or metadata.get("distrib_optim_fully_reshardable_mem_efficient"):
            refuse_format(kind if kind != SHARDING else "distrib_optim_fully_reshardable_mem_efficient")
        return stock(*args, metadata=metadata, **options)

    return sharded_state_dict
