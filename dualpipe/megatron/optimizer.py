"""Megatron's optimizer over the two chunks of a rank."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from dualpipe.megatron.model import require_chunks
from dualpipe.megatron.optimizer_state import SHARDING, distributed_parts, refuse_format, save_parameters
from dualpipe.schedule import UP


def build_dualpipe_optimizer(config: OptimizerConfig, model: list[nn.Module], **options: Any) -> Any:
    """What ``get_megatron_optimizer(config, model, **options)`` returns, with each parameter counted once.

    The gradient norm of the plain optimizer is summed over the model-parallel group, in which every stage has one
    replica that counts (see ``build_dualpipe_model``).  The distributed optimizer shards a stage over all of its
    replicas, so there the sum over the world counts each once.

    Raises ``RuleError`` unless ``model`` is what ``build_dualpipe_model`` returned: both chunks, in order of stage.
    """
    chunks = require_chunks(model)
    own = ProcessGroupCollection.use_mpu_process_groups()
    (stage,) = (chunk.place.collection for chunk in chunks if chunk.place.lane is UP)
    collection = ProcessGroupCollection(**{**vars(stage), "pp": own.pp, "intra_dist_opt": dist.group.WORLD})
    built = get_megatron_optimizer(config, model, pg_collection=collection, use_gloo_process_groups=False, **options)
    for part in distributed_parts(built):
        save_parameters(part)
        part.sharded_state_dict = _parameter_by_parameter(part.sharded_state_dict)
        part.load_parameter_state_from_dp_zero = lambda *_, **__: refuse_format("a state gathered on one rank")
    chunks[0].pipeline.optimizer = weakref.ref(built)
    return built


def _parameter_by_parameter(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The one format of the distributed optimizer's state that does not depend on its single data-parallel group."""

    def sharded_state_dict(*args: Any, metadata: dict[str, Any] | None = None, **options: Any) -> Any:
        metadata = {"distrib_optim_sharding_type": SHARDING, **(metadata or {})}
        kind = options.pop("sharding_type", None) or metadata["distrib_optim_sharding_type"]
        if kind != SHARDING or metadata.get("distrib_optim_fully_reshardable_mem_efficient"):
            refuse_format(kind if kind != SHARDING else "distrib_optim_fully_reshardable_mem_efficient")
        return stock(*args, metadata=metadata, **options)

    return sharded_state_dict
