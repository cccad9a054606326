"""Megatron's optimizer over the two chunks of a rank."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from dualpipe.megatron.model import chunk_of


def build_dualpipe_optimizer(config: OptimizerConfig, model: list[nn.Module], **options: Any) -> Any:
    """What ``get_megatron_optimizer(config, model, **options)`` returns, with each parameter counted once.

    The gradient norm of the plain optimizer is summed over the model-parallel group, in which every stage has one
    replica that counts (see ``build_dualpipe_model``).  The distributed optimizer shards a stage over all of its
    replicas, so there the sum over the world counts each once.
    """
    own = ProcessGroupCollection.use_mpu_process_groups()
    stage = chunk_of(model[0]).place.collection
    collection = ProcessGroupCollection(**{**vars(stage), "pp": own.pp, "intra_dist_opt": dist.group.WORLD})
    return get_megatron_optimizer(config, model, pg_collection=collection, use_gloo_process_groups=False, **options)
