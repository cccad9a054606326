"""Stand-ins with which a training loop builds, saves and loads a DualPipe model through Megatron's own signatures.

They replace functions of Megatron-LM's ``megatron.training`` (main and core_v0.16.1) while ``install()`` is in effect.
Each checks on every call whether DualPipe is on, and calls the original if it is not.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dualpipe.errors import RuleError
from dualpipe.megatron.arguments import validate_dualpipe_args
from dualpipe.megatron.placement import Schedules, schedule_of, stages_of

Function = Callable[..., Any]
Switch = Callable[[], Any]
"""Returns the arguments of a run that uses DualPipe or DualPipeV, or ``None``."""
StandIn = Callable[[Function, Switch], Function]
"""Makes the stand-in of a function."""

_ARGUMENT_OF = {
    "average_in_collective": "ddp_average_in_collective",
    "bucket_size": "ddp_bucket_size",
    "check_for_nan_in_grad": "check_for_nan_in_loss_and_grad",
    "grad_reduce_in_fp32": "accumulate_allreduce_grads_in_fp32",
    "pad_buckets_for_high_nccl_busbw": "ddp_pad_buckets_for_high_nccl_busbw",
    "reduce_scatter_with_fp32_accumulation": "ddp_reduce_scatter_with_fp32_accumulation",
}
"""Fields of ``DistributedDataParallelConfig`` whose argument has another name."""


def stand_in(replacement: Callable[[Any, Function, inspect.BoundArguments], Any]) -> StandIn:
    """Make stand-ins that call ``replacement(args, original, call)`` while DualPipe is on.

    ``args`` are the arguments of the run, ``call`` those that the original was called with.
    """

    def make(original: Function, switch: Switch) -> Function:
        @functools.wraps(original)
        def switched(*positional: Any, **named: Any) -> Any:
            args = switch()
            if args is None:
                return original(*positional, **named)
            return replacement(args, original, inspect.signature(original).bind(*positional, **named))

        return switched

    return make


@stand_in
def get_model(args: Any, original: Function, call: inspect.BoundArguments) -> Any:
    """``megatron.training.training.get_model``: two chunks, in order of stage."""
    call.apply_defaults()
    given = call.arguments
    provider = functools.partial(given["model_provider_func"], config=given["config"])
    return _build_of_loop(args, provider, given)


@stand_in
def get_flagscale_model(args: Any, original: Function, call: inspect.BoundArguments) -> Any:
    """``flagscale.train.train.get_model``, which takes no config, under ``--use-dualpipe``.

    FlagScale's own ``--use-dualpipev`` has changed its layers and its iterators, so that no other DualPipeV can run.
    """
    if schedule_of(args) is not Schedules.DUALPIPE:
        raise RuleError(
            "in FlagScale, --use-dualpipev selects FlagScale's own schedule, layers and iterators, which "
            "dualpipe.megatron cannot run",
            f"got {schedule_of(args)} in flagscale.train.train",
            "use --use-dualpipe, or run FlagScale without dualpipe.megatron",
        )
    if getattr(args, "peft_type", None) is not None:
        raise RuleError(
            "FlagScale's PEFT changes the model inside its own get_model, which dualpipe.megatron replaces",
            f"got peft_type {args.peft_type}",
            "train all weights, or run FlagScale without --use-dualpipe",
        )
    call.apply_defaults()
    return _build_of_loop(args, call.arguments["model_provider_func"], call.arguments)


def _build_of_loop(args: Any, provider: Function, given: Mapping[str, Any]) -> Any:
    args.model_type = given["model_type"]
    random_init = bool(getattr(args, "data_parallel_random_init", False))
    return _build(args, provider, _ddp_config(args), given, data_parallel_random_init=random_init)


@stand_in
def build_distributed_models(args: Any, original: Function, call: inspect.BoundArguments) -> Any:
    """``megatron.training.models.dist_utils.unimodal_build_distributed_models``, in which later model builders end."""
    call.apply_defaults()
    given = call.arguments
    hook = given.get("pre_wrap_hook")

    def provider(**options: Any) -> Any:
        module = given["build_model_func"](**options)
        hooked = None if hook is None else hook([module])
        return module if hooked is None else hooked[0]

    random_init = given["data_parallel_random_init"]
    return _build(args, provider, given["ddp_config"], given, data_parallel_random_init=random_init)


@stand_in
def get_megatron_optimizer(args: Any, original: Function, call: inspect.BoundArguments) -> Any:
    """``megatron.core.optimizer.get_megatron_optimizer``: over two chunks, each parameter counted once."""
    from dualpipe.megatron.optimizer import build_dualpipe_optimizer

    given = dict(call.arguments)
    for replaced in ("use_gloo_process_groups", "pg_collection"):
        given.pop(replaced, None)
    return build_dualpipe_optimizer(given.pop("config"), given.pop("model_chunks"), **given)


@stand_in
def load_checkpoint(args: Any, original: Function, call: inspect.BoundArguments) -> Any:
    """``megatron.training.checkpointing.load_checkpoint``: also restores the random numbers of the second stage."""
    from dualpipe.megatron.checkpoint import resume_random_stream

    loaded = original(*call.args, **call.kwargs)
    resume_random_stream(call.arguments["ddp_model"])
    return loaded


@stand_in
def save_checkpoint(args: Any, original: Function, call: inspect.BoundArguments) -> Any:
    """``megatron.training.checkpointing.save_checkpoint``: saves only if both replicas of each stage are equal.

    Under DualPipeV the random numbers of a rank's second stage are saved in addition to those of the first.
    """
    from dualpipe.megatron.checkpoint import random_stream_saved, require_equal_replicas

    require_equal_replicas(call.arguments["model"])
    with random_stream_saved(call.arguments["model"]):
        return original(*call.args, **call.kwargs)


@stand_in
def sharded_state_dict_metadata(args: Any, original: Function, call: inspect.BoundArguments) -> Any:
    """``megatron.training.checkpointing._build_sharded_state_dict_metadata``: the format of an optimizer's state.

    Most formats of the distributed optimizer's state need its single data-parallel group.  Under DualPipe each chunk
    has its own group, so the format is the one with whole parameters, gathered on every rank of a stage
    (``--dist-ckpt-optim-fully-reshardable``).  The checkpoint records the format, and loads anywhere.
    """
    from dualpipe.megatron.optimizer_state import SHARDING

    metadata = original(*call.args, **call.kwargs)
    if "distrib_optim_sharding_type" in metadata:
        metadata["distrib_optim_sharding_type"] = SHARDING
        metadata.pop("distrib_optim_fully_reshardable_mem_efficient", None)  # gathers over the single group
    return metadata


def _build(
    args: Any, provider: Function, ddp_config: Any, given: Mapping[str, Any], *, data_parallel_random_init: bool
) -> list[Any]:
    """Build the chunks; ``given`` has the arguments of the function that is replaced."""
    from dualpipe.megatron.model import build_dualpipe_model

    validate_dualpipe_args(args)

    @functools.wraps(provider)  # its parameters are checked
    def typed_provider(**options: Any) -> Any:
        with _describing_stages(args, given.get("config", given.get("transformer_config"))):
            module = provider(**options)
        module.model_type = given["model_type"]
        return module

    schedule = schedule_of(args)
    assert schedule is not None, "a stand-in is called only with a flag"
    model = build_dualpipe_model(
        typed_provider,
        ddp_config,
        schedule=schedule,
        wrap_with_ddp=given["wrap_with_ddp"],
        data_parallel_random_init=data_parallel_random_init,
    )
    for chunk in model:
        _show_groups_of_rank(chunk)
    return model


@contextmanager
def _describing_stages(args: Any, config: Any) -> Iterator[None]:
    """Inside the block, the arguments have the number of stages as the pipeline size, as the model's config needs it.

    A config that exists already gets it for good, since its model asks for it again when it is saved.
    """
    stages = stages_of(args)
    if schedule_of(args) is not Schedules.DUALPIPEV:
        yield
        return
    # Megatron's parser divides the parts of a layout by the number of ranks, and takes the rest as a virtual pipeline
    of_model: dict[str, Any] = {
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": None,
    }
    if config is not None:
        from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

        vars(config).update(of_model)
        if config.pipeline_model_parallel_layout is not None:
            layout = config.pipeline_model_parallel_layout.input_data
            config.pipeline_model_parallel_layout = PipelineParallelLayerLayout(layout, stages)
    before = {name: getattr(args, name, None) for name in of_model}
    vars(args).update(of_model)
    try:
        yield
    finally:
        vars(args).update(before)


def _show_groups_of_rank(chunk: Any) -> None:
    """Let a training loop read the rank's own groups from a chunk; its layers keep those of their stage.

    The loop assumes that the groups of its first chunk are those of the rank: they determine which rank reports losses,
    over which ranks they are summed, and whose random state a checkpoint holds.  It reads them from the outermost
    module that has them, or from the unwrapped model.  Megatron's ``Float16Module``, between the two, keeps the groups
    of its stage: it casts inputs on the first stage and outputs on the last.
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
