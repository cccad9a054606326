"""What a training loop calls to build model and optimizer, with DualPipe behind the same signatures.

These stand in for functions of Megatron-LM's ``megatron.training`` (main and core_v0.16.1) while ``install()`` is in
force.  Each asks on every call whether DualPipe is on, and is the function it stands in for when it is not.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from dualpipe.megatron.arguments import validate_dualpipe_args

Function = Callable[..., Any]
Switch = Callable[[], Any]
"""Gives the arguments of a run that uses DualPipe, or ``None``."""

_ARGUMENT_OF = {
    "average_in_collective": "ddp_average_in_collective",
    "bucket_size": "ddp_bucket_size",
    "check_for_nan_in_grad": "check_for_nan_in_loss_and_grad",
    "grad_reduce_in_fp32": "accumulate_allreduce_grads_in_fp32",
    "pad_buckets_for_high_nccl_busbw": "ddp_pad_buckets_for_high_nccl_busbw",
    "reduce_scatter_with_fp32_accumulation": "ddp_reduce_scatter_with_fp32_accumulation",
}
"""Fields of ``DistributedDataParallelConfig`` whose argument has another name."""


def get_model(own: Function, switch: Switch) -> Function:
    """``megatron.training.training.get_model``: two chunks, in order of stage."""

    @functools.wraps(own)
    def chosen(*given: Any, **named: Any) -> Any:
        args = switch()
        if args is None:
            return own(*given, **named)
        call = _bound(own, given, named)
        args.model_type = call["model_type"]
        return _build(
            args,
            call["model_provider_func"],
            _ddp_config(args),
            model_type=call["model_type"],
            wrap_with_ddp=call["wrap_with_ddp"],
            data_parallel_random_init=bool(getattr(args, "data_parallel_random_init", False)),
            options={"config": call["config"]},
        )

    return chosen


def build_distributed_models(own: Function, switch: Switch) -> Function:
    """``megatron.training.models.dist_utils.unimodal_build_distributed_models``, where model builders end in main."""

    @functools.wraps(own)
    def chosen(*given: Any, **named: Any) -> Any:
        args = switch()
        if args is None:
            return own(*given, **named)
        call = _bound(own, given, named)
        hook = call.get("pre_wrap_hook")

        def provider(**place: Any) -> Any:
            module = call["build_model_func"](**place)
            hooked = None if hook is None else hook([module])
            return module if hooked is None else hooked[0]

        return _build(
            args,
            provider,
            call["ddp_config"],
            model_type=call["model_type"],
            wrap_with_ddp=call["wrap_with_ddp"],
            data_parallel_random_init=call["data_parallel_random_init"],
        )

    return chosen


def get_megatron_optimizer(own: Function, switch: Switch) -> Function:
    """``megatron.core.optimizer.get_megatron_optimizer``: over two chunks, each parameter counted once."""

    @functools.wraps(own)
    def chosen(*given: Any, **named: Any) -> Any:
        if switch() is None:
            return own(*given, **named)
        from dualpipe.megatron.optimizer import build_dualpipe_optimizer

        call = inspect.signature(own).bind(*given, **named).arguments
        call.pop("use_gloo_process_groups", None)
        call.pop("pg_collection", None)
        return build_dualpipe_optimizer(call.pop("config"), call.pop("model_chunks"), **call)

    return chosen


def load_checkpoint(own: Function, switch: Switch) -> Function:
    """``megatron.training.checkpointing.load_checkpoint``: lane < goes on with the random numbers of its stage, too."""

    @functools.wraps(own)
    def chosen(*given: Any, **named: Any) -> Any:
        loaded = own(*given, **named)
        if switch() is not None:
            from dualpipe.megatron.checkpoint import resume_random_stream

            resume_random_stream(_bound(own, given, named)["ddp_model"])
        return loaded

    return chosen


def save_checkpoint(own: Function, switch: Switch) -> Function:
    """``megatron.training.checkpointing.save_checkpoint``: only if both copies of each stage are equal."""

    @functools.wraps(own)
    def chosen(*given: Any, **named: Any) -> Any:
        if switch() is not None:
            from dualpipe.megatron.checkpoint import require_equal_copies

            require_equal_copies(_bound(own, given, named)["model"])
        return own(*given, **named)

    return chosen


def sharded_state_dict_metadata(own: Function, switch: Switch) -> Function:
    """``megatron.training.checkpointing._build_sharded_state_dict_metadata``: how an optimizer's state is laid out.

    Most layouts of the distributed optimizer's state rest on its one data-parallel group.  Under DualPipe each chunk
    has its own, so the layout is the one that holds whole parameters, gathered on every rank of a stage
    (``--dist-ckpt-optim-fully-reshardable``).  The checkpoint says so, and loads anywhere.
    """

    @functools.wraps(own)
    def chosen(*given: Any, **named: Any) -> Any:
        metadata = own(*given, **named)
        if switch() is not None and "distrib_optim_sharding_type" in metadata:
            from dualpipe.megatron.optimizer_state import SHARDING

            metadata["distrib_optim_sharding_type"] = SHARDING
            metadata.pop("distrib_optim_fully_reshardable_mem_efficient", None)  # gathers over the one group
        return metadata

    return chosen


def _bound(own: Function, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(own).bind(*given, **named)
    bound.apply_defaults()
    return bound.arguments


def _build(
    args: Any,
    provider: Function,
    ddp_config: Any,
    *,
    model_type: Any,
    options: dict[str, Any] | None = None,
    **building: Any,
) -> list[Any]:
    from dualpipe.megatron.model import build_dualpipe_model

    validate_dualpipe_args(args)

    def placed(**place: Any) -> Any:
        module = provider(**place, **(options or {}))
        module.model_type = model_type
        return module

    model = build_dualpipe_model(placed, ddp_config, **building)
    for chunk in model:
        _face_the_loop(chunk)
    return model


def _face_the_loop(chunk: Any) -> None:
    """Let a training loop read the rank's own groups from a chunk; the layers keep those of their stage.

    The loop takes the groups of its first chunk for those of the rank: with them it finds out who reports losses, over
    whom they are summed, and whose random state a checkpoint holds.  It reads them from the outermost module that has
    them, or from the unwrapped model.  Megatron's ``Float16Module``, between the two, asks them for its stage: whether
    to cast what comes in and what goes out.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.module import Float16Module
    from megatron.core.utils import unwrap_model

    own = ProcessGroupCollection.use_mpu_process_groups()
    for module in (chunk, unwrap_model(chunk)):
        if not isinstance(module, Float16Module):
            module.pg_collection = own


def _ddp_config(args: Any) -> Any:
    """The ``DistributedDataParallelConfig`` that Megatron-LM makes of its arguments."""
    from megatron.core.distributed import DistributedDataParallelConfig

    settings = {}
    for field in dataclasses.fields(DistributedDataParallelConfig):
        name = _ARGUMENT_OF.get(field.name, field.name)
        if hasattr(args, name):
            settings[field.name] = getattr(args, name)
    return DistributedDataParallelConfig(**settings)
