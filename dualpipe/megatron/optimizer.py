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

MODEL_SPACE = "fully_sharded_model_space"
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
            part.sharded_state_dict = _only_in_model_space(part.sharded_state_dict)
            for name in ("get_parameter_state_dp_zero", "load_parameter_state_from_dp_zero"):
                setattr(part, name, _refuse)
    return built


def _only_in_model_space(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The distributed optimizer keeps one data-parallel group, and the two chunks have two.

    Of its formats one asks nothing of that group: each parameter's shard by its place in the whole parameter.
    """

    def sharded_state_dict(*args: Any, metadata: dict[str, Any] | None = None, **options: Any) -> Any:
        kind = options.get("sharding_type") or (metadata or {}).get("distrib_optim_sharding_type", MODEL_SPACE)
        if kind != MODEL_SPACE:
            _refuse(kind)
        return stock(*args, metadata=metadata, **options)

    return sharded_state_dict


def _refuse(kind: object = "a gathered state", *args: Any, **options: Any) -> Any:
    raise RuleError(
        "under DualPipe the distributed optimizer is saved shard by shard, in the space of the model's parameters",
        f"got {kind}",
        f"set metadata['distrib_optim_sharding_type'] to {MODEL_SPACE!r}",
    )
