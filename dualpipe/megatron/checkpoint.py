"""Checkpoints that don't know of DualPipe: what is saved with it loads with 1F1B at any pipeline size, and back.

Both replicas of a stage hold the same weights, the same optimizer state and, between steps, the same state of the
random generators.  So a checkpoint has one of each, under the keys that Megatron gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.utils import unwrap_model
from torch import nn

from dualpipe.errors import RuleError
from dualpipe.megatron.model import chunk_of, require_chunks
from dualpipe.megatron.optimizer_state import SHARDING, whole_parameters
from dualpipe.megatron.random_streams import States, capture, exchange, restore
from dualpipe.megatron.replicas import gather_weights, raise_together
from dualpipe.megatron.torch_adam import allocate_state, loading

RANDOM = "dualpipe_random_states"


def sharded_state_dict(model: Sequence[nn.Module], optimizer: Any = None, is_loading: bool = False) -> dict[str, Any]:
    """The state of model and optimizer for ``megatron.core.dist_checkpointing``.

    ``model`` is what ``build_dualpipe_model`` returned, or a list of Megatron's own chunks.
    """
    metadata = {"distrib_optim_sharding_type": SHARDING, "chained_optim_avoid_prefix": True}
    single = len(model) == 1
    state: dict[str, Any] = {
        "model" if single else f"model{number}": unwrap_model(chunk).sharded_state_dict(
            metadata=_metadata(metadata, single)
        )
        for number, chunk in enumerate(model)
    }
    if optimizer is not None:
        allocate_state(optimizer)
        with whole_parameters(optimizer):
            state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading, metadata=metadata)
    return state


def _metadata(metadata: Mapping[str, Any], single: bool) -> dict[str, Any]:
    """A chunk of DualPipe names its own group; Megatron's is asked for that of the rank."""
    own = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)} if single else {}
    return {**metadata, **own}


def save_checkpoint(
    folder: Path | str, model: Sequence[nn.Module], optimizer: Any = None, common: Mapping[str, Any] | None = None
) -> None:
    """Save into ``folder`` (made if need be, and empty); every process of the job calls this together.

    ``common`` is small and the same on every rank: the number of the step, the state of a scheduler.  Raises
    ``RuleError``, before it writes, where the two copies of a stage differ.
    """
    path = Path(folder)
    if dist.get_rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    require_equal_copies(model)
    state = {**sharded_state_dict(model, optimizer), "random": _random(capture()), "common": dict(common or {})}
    dist_checkpointing.save(state, str(path))


def load_checkpoint(folder: Path | str, model: Sequence[nn.Module], optimizer: Any = None) -> dict[str, Any]:
    """Load what ``save_checkpoint`` saved, with DualPipe or without, and return its ``common``.

    The random generators go on where they stood if the pipeline and tensor sizes are those of the saving run;
    otherwise they stay as they are.  Raises ``RuleError`` where there is no checkpoint, and where the optimizer's
    state is not that of the weights (see ``dualpipe.megatron.optimizer_state``).
    """
    path = str(folder)
    if not dist_checkpointing.check_is_distributed_checkpoint(path):
        raise RuleError("a checkpoint is a folder that save_checkpoint wrote", f"{path} is none", "correct the path")
    wanted = sharded_state_dict(model, optimizer, is_loading=True)
    saved = _random(capture())
    found = load_sharded_metadata(path)
    same_shape = any(
        isinstance(entry, ShardedObject) and entry.key == RANDOM and entry.global_shape == saved.global_shape
        for entry in found.values()
    )
    if same_shape:
        wanted["random"] = saved
    loaded = dist_checkpointing.load(wanted, path)
    for number, chunk in enumerate(model):
        unwrap_model(chunk).load_state_dict(loaded["model" if len(model) == 1 else f"model{number}"])
    if optimizer is not None:
        _together(lambda: _load_optimizer(optimizer, loaded["optimizer"]))
    if same_shape:
        restore(loaded["random"])
    if len(model) > 1:
        resume_random_stream(model)
    common: dict[str, Any] = loaded["common"]
    return common


def _load_optimizer(optimizer: Any, state: Any) -> None:
    with whole_parameters(optimizer), loading(optimizer):
        optimizer.load_state_dict(state)


def _together(load: Callable[[], None]) -> None:
    """Let every process of the job raise ``RuleError`` if one does, so that none goes on alone."""
    refused: RuleError | None = None
    try:
        load()
    except RuleError as error:
        refused = error
    everyone: list[tuple[str, str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, refused and (refused.rule, refused.got, refused.fix))
    for each in everyone:
        if each is not None:
            raise RuleError(*each) from refused


def require_equal_copies(model: Sequence[nn.Module]) -> None:
    """Before a save: all weights have arrived, and those of the two copies of each stage are equal.

    Every process of the job calls it; all of them raise ``RuleError`` if the copies of one stage differ.
    """
    gather_weights(model)
    if len(model) > 1:
        raise_together(require_chunks(model)[0].pipeline.copies.difference(), None)


def resume_random_stream(model: Sequence[nn.Module]) -> None:
    """After the process's generators were restored, put lane < where the same stage of lane > stands.

    ``load_checkpoint`` does so; a training loop that restores random states itself calls this afterwards, on every
    rank.  Between steps both replicas of a stage have drawn alike, so one state serves both.
    """
    pipeline = chunk_of(model[0]).pipeline
    pipeline.stream.states = exchange(capture(), pipeline.groups.pair)


def _random(states: States) -> ShardedObject:
    """The state of the generators of this pipeline and tensor rank."""
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    place = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject(RANDOM, states, shape, place, replica_id=replica)
