"""Checkpoints that do not depend on DualPipe: those saved with it load with 1F1B at any pipeline size, and vice versa.

All replicas of a stage have the same weights, the same optimizer state and, between steps, the same state of the
random generators.  So a checkpoint has one of each for every stage, under Megatron's own keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.utils import unwrap_model
from torch import nn

from dualpipe.errors import RuleError
from dualpipe.megatron.model import setup_of, setups_of
from dualpipe.megatron.optimizer_state import SHARDING, whole_parameters
from dualpipe.megatron.random_streams import States, capture, exchange, kept_in_tracker, restore, taken_from_tracker
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
    """Megatron's own chunk needs the group of the rank; a chunk of DualPipe adds its own."""
    own = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)} if single else {}
    return {**metadata, **own}


def save_checkpoint(
    folder: Path | str, model: Sequence[nn.Module], optimizer: Any = None, common: Mapping[str, Any] | None = None
) -> None:
    """Save into ``folder``, which is created if it is missing; every process of the job calls this together.

    ``common`` is small and the same on every rank: the number of the step, the state of a scheduler.  If the two
    replicas of a stage differ, raises ``RuleError`` before writing anything.
    """
    path = Path(folder)
    if dist.get_rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    require_equal_replicas(model)
    state = {**sharded_state_dict(model, optimizer), "random": _random(model), "common": dict(common or {})}
    dist_checkpointing.save(state, str(path))


def load_checkpoint(folder: Path | str, model: Sequence[nn.Module], optimizer: Any = None) -> dict[str, Any]:
    """Load what ``save_checkpoint`` saved, with DualPipe or without, and return its ``common``.

    The states of the random generators are restored if the numbers of stages and of tensor-parallel ranks are those of
    the run that saved them; otherwise they are left alone.  Raises ``RuleError`` if there is no checkpoint, or if the
    optimizer's state does not belong to the weights (see ``dualpipe.megatron.optimizer_state``).
    """
    path = str(folder)
    if not dist_checkpointing.check_is_distributed_checkpoint(path):
        raise RuleError("a checkpoint must be a folder that save_checkpoint wrote", f"got {path}", "correct the path")
    wanted = sharded_state_dict(model, optimizer, is_loading=True)
    saved = _random(model)
    shape = next(iter(saved.values())).global_shape
    found = load_sharded_metadata(path)
    same_shape = any(
        isinstance(entry, ShardedObject) and entry.key == RANDOM and entry.global_shape == shape
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
        _restore(model, loaded["random"])
    if len(model) > 1:
        resume_random_stream(model)
    common: dict[str, Any] = loaded["common"]
    return common


def _load_optimizer(optimizer: Any, state: Any) -> None:
    with whole_parameters(optimizer), loading(optimizer):
        optimizer.load_state_dict(state)


def _together(load: Callable[[], None]) -> None:
    """Call ``load``, and raise ``RuleError`` on every process of the job if one of them raises it."""
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


def require_equal_replicas(model: Sequence[nn.Module]) -> None:
    """Before a save, finish gathering weights and compare the two replicas of each stage.

    Every process of the job calls it; all of them raise ``RuleError`` if the replicas of one stage differ.
    """
    gather_weights(model)
    if len(model) > 1:
        raise_together(setups_of(model)[0].shared.replicas.difference(), None)


def resume_random_stream(model: Sequence[nn.Module]) -> None:
    """After the process's generators were restored, set lane < to the state of the same stage in lane >.

    ``load_checkpoint`` does this; a training loop that restores random states itself calls it afterwards, on every
    rank.  Between steps both replicas of a stage have drawn the same numbers, so one state serves both.  Under
    DualPipeV, where a stage has no replica, the stream of the second stage is restored if the checkpoint was saved
    inside ``random_stream_saved``, and goes on as it is otherwise.
    """
    shared = setup_of(model[0]).shared
    if shared.groups.pair is not None:
        shared.stream.states = exchange(capture(), shared.groups.pair)
    else:
        shared.stream.states = taken_from_tracker() or shared.stream.states


@contextmanager
def random_stream_saved(model: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block, Megatron's tracker of random states also has those of a second stage under DualPipeV.

    A training loop saves that tracker, and ``resume_random_stream`` finds them in it after loading.
    """
    shared = setup_of(model[0]).shared
    with kept_in_tracker(shared.stream.states) if shared.groups.pair is None else nullcontext():
        yield


def _random(model: Sequence[nn.Module]) -> dict[str, ShardedObject]:
    """The states of the random generators of each stage that this rank saves, sharded by stage and tensor rank."""
    if len(model) == 1:
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        states = {parallel_state.get_pipeline_model_parallel_rank(): capture()}
    else:
        shared = setup_of(model[0]).shared
        groups, stages = shared.groups, shared.groups.stages
        states = {groups.own.stage: capture()}
        if groups.pair is None:
            states[groups.other.stage] = shared.stream.states
    shape = stages, parallel_state.get_tensor_model_parallel_world_size()
    tp, replica = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return {
        str(stage): ShardedObject(RANDOM, state, shape, (stage, tp), replica_id=replica)
        for stage, state in states.items()
    }


def _restore(model: Sequence[nn.Module], loaded: Mapping[str, States]) -> None:
    """Set the generators to what ``_random`` saved: the process's own, and those of a second stage."""
    if len(model) == 1:
        restore(next(iter(loaded.values())))
        return
    shared = setup_of(model[0]).shared
    restore(loaded[str(shared.groups.own.stage)])
    if shared.groups.pair is None:
        shared.stream.states = loaded[str(shared.groups.other.stage)]
