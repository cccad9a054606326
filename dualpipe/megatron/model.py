"""Builds the two chunks of a rank, so that the rest of a training program sees two replicas of a pipeline.

Megatron's training loop calls its model provider once on each pipeline rank.  Here it is called twice, for the two
chunks of the rank (see ``dualpipe.megatron.placement``).  The loop then holds a list of two wrapped chunks, in order of
stage.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import nn

from dualpipe.errors import RuleError
from dualpipe.megatron.arguments import validate_dualpipe_config
from dualpipe.megatron.data_parallel import StageDDP
from dualpipe.megatron.embedding import copy_to_last, embedding_sum, refuse_saving, require_ends
from dualpipe.megatron.groups import Groups, at_stage, building, create_groups
from dualpipe.megatron.layers import Split, split_layers
from dualpipe.megatron.random_streams import RandomStream, States, capture, exchange, restore, seeded_for
from dualpipe.megatron.replicas import ReplicaCheck, replica_check
from dualpipe.runtime.process_group import ProcessGroupTransport
from dualpipe.runtime.weightgrad import DeferredGradients
from dualpipe.schedule import UP, Chunk

logger = logging.getLogger(__name__)

Provider = Callable[..., nn.Module]


@dataclass
class Shared:
    """State that the two chunks of a rank share.  Reached from either of them; there is no global state.

    ``agreed`` holds the set-ups that all ranks have agreed on.  ``optimizer()`` returns what
    ``build_dualpipe_optimizer`` built over the chunks, as long as the program keeps it.
    """

    groups: Groups
    transport: ProcessGroupTransport
    stream: RandomStream
    store: DeferredGradients = field(default_factory=DeferredGradients)
    agreed: set[Hashable] = field(default_factory=set)
    optimizer: Callable[[], Any] = lambda: None
    replicas: ReplicaCheck = field(init=False)


@dataclass(frozen=True)
class ChunkSetup:
    """How one chunk of the model takes part in DualPipe; the module has it as ``dualpipe_setup``."""

    chunk: Chunk
    collection: ProcessGroupCollection
    shared: Shared
    split: Split

    def drawing(self) -> AbstractContextManager[object]:
        """A context in which random numbers come from this chunk's stream; each forward runs in it."""
        return nullcontext() if self.chunk == self.shared.groups.own else self.shared.stream.drawing()


def setup_of(module: nn.Module) -> ChunkSetup:
    """The ``ChunkSetup`` of a model chunk, however it is wrapped.  Raises ``RuleError`` if it has none."""
    try:
        setup: ChunkSetup = get_attr_wrapped_model(module, "dualpipe_setup")
    except RuntimeError:
        raise RuleError(
            "DualPipe runs only a model that build_dualpipe_model built",
            f"got a {type(module).__name__}",
            "build it there",
        ) from None
    return setup


def setups_of(model: Sequence[nn.Module]) -> list[ChunkSetup]:
    """The set-ups of a rank's model.  Raises ``RuleError`` unless it is both chunks of one model, in order of stage."""
    setups = [setup_of(module) for module in model]
    models = {id(setup.shared) for setup in setups}
    stages = [setup.chunk.stage for setup in setups]
    if len(models) != 1 or stages != [chunk.stage for chunk in setups[0].shared.groups.chunks]:
        got = f"stages {stages}" + f" of {len(models)} models" * (len(models) > 1)
        raise RuleError(
            "the model must be the list from build_dualpipe_model: both chunks of the rank, in order of stage, "
            "which is the order of collectives",
            f"got {got}",
            "pass that list on unchanged",
        )
    return setups


def build_dualpipe_model(
    model_provider: Provider,
    ddp_config: DistributedDataParallelConfig | None = None,
    *,
    schedule: str = "dualpipe",
    wrap_with_ddp: bool = True,
    data_parallel_random_init: bool = False,
    timeout: float = 600.0,
    **provider_options: Any,
) -> list[nn.Module]:
    """The two chunks of this rank, in order of stage.

    Under DualPipe the two chunks of rank r of P are stages ``r`` and ``P-1-r`` of P, and every stage has two replicas;
    under DualPipeV they are stages ``r`` and ``2P-1-r`` of 2P.

    Every process of the job calls it together, after ``initialize_model_parallel`` and after seeding the random
    generators as Megatron does.  All replicas of stage s start with the weights that Megatron's pipeline rank s would
    have.

    Parameters
    ----------
    model_provider:
        ``provider(pre_process=..., post_process=..., pg_collection=...)`` returns the chunk.  It passes
        ``pg_collection`` to the model, which numbers its layers by it.  ``provider_options`` are passed on.
    ddp_config:
        The settings of Megatron's ``DistributedDataParallel``; its defaults if ``None``.
    schedule:
        ``"dualpipe"`` or ``"dualpipev"``.  ``pipeline_model_parallel_size`` of the provider's ``TransformerConfig`` is
        the number of stages (see ``stages_of``).
    wrap_with_ddp:
        If false, leave the chunks unwrapped, for inference.
    data_parallel_random_init:
        The data-parallel ranks were seeded differently: copy the first one's weights to the others.
    timeout:
        Seconds to wait for a message before ending the job with an error that names the message.

    Raises ``RuleError`` for a configuration that would train wrongly, and for a provider that builds another stage.
    """
    groups = create_groups(schedule)
    built: dict[int, nn.Module] = {}

    def build(chunk: Chunk) -> States:
        with at_stage(chunk.stage, groups.stages), building(groups.chunks[chunk]):
            module = _provide(model_provider, chunk, groups, provider_options)
            validate_dualpipe_config(get_model_config(module), ddp_config, schedule)
            _require_stages(module, groups.stages)
            _require_layers_of(chunk, module)
            built[chunk.stage] = module
        return capture()

    states = build(groups.own)  # first, since it draws the numbers that Megatron's rank would draw
    with nullcontext() if groups.pair else seeded_for(groups.other.stage - groups.own.stage):
        others = build(groups.other)
    restore(states)
    _require_apart(built)
    require_ends(groups, built)
    copy_to_last(groups, built)
    config = get_model_config(built[groups.own.stage])
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    stream = RandomStream(exchange(states, groups.pair) if groups.pair else others)
    shared = Shared(groups, _transport(groups, device, timeout), stream)
    ddp_config = ddp_config or DistributedDataParallelConfig()
    _require_hooks_for_delayed(config, ddp_config)
    _require_instances(groups, ddp_config)
    wrapped = []
    for chunk, collection in groups.chunks.items():
        module = built[chunk.stage].to(device)
        if groups.pair:
            _equalise(module, chunk, groups)
        if not ddp_config.use_distributed_optimizer:
            _mark_shared(module, chunk)
        split = split_layers(module, shared.store, str(chunk))
        module.dualpipe_setup = ChunkSetup(chunk, collection, shared, split)  # type: ignore[assignment] # no module
        _shard_over_stage(module, collection)
        if config.fp16 or config.bf16:
            module = Float16Module(config, module)
        if wrap_with_ddp:
            module = StageDDP(config, ddp_config, module, pg_collection=collection)
            if data_parallel_random_init:
                module.broadcast_params()
        wrapped.append(module)
    sums = embedding_sum(groups, built)
    if wrap_with_ddp and sums is not None:
        wrapped[-1].finished = sums  # type: ignore[assignment] # a StageDDP; the last to be reduced
    shared.replicas = replica_check(wrapped, [chunk.stage for chunk in groups.chunks], groups.pair)
    if not any(split.stage.layers or split.delayed for split in (setup_of(module).split for module in wrapped)):
        logger.warning("dualpipe: no layer of this rank leaves its weight gradient to W, so W has nothing to do")
    return wrapped


def _require_stages(module: nn.Module, stages: int) -> None:
    size = get_model_config(module).pipeline_model_parallel_size
    if size != stages:
        raise RuleError(
            "pipeline_model_parallel_size of the TransformerConfig must be the number of stages, which under DualPipeV "
            "is twice the number of pipeline ranks",
            f"got {size} for {stages} stages",
            "set it to dualpipe.megatron.stages_of(args)",
        )


def _provide(provider: Provider, chunk: Chunk, groups: Groups, options: dict[str, Any]) -> nn.Module:
    parameters = inspect.signature(provider).parameters
    if "pg_collection" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise RuleError(
            "the model provider must take pg_collection and pass it to the model, which numbers its layers by it",
            f"got one that takes {', '.join(parameters)}",
            "add the parameter and pass it to GPTModel(..., pg_collection=pg_collection)",
        )
    module = provider(
        pre_process=chunk.stage == 0,
        post_process=chunk.stage == groups.stages - 1,
        pg_collection=groups.chunks[chunk],
        **options,
    )
    for parameter in module.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return module


def _require_layers_of(chunk: Chunk, module: nn.Module) -> None:
    """Refuse layers of another stage: a provider that drops ``pg_collection`` builds those of the rank's own."""
    decoder = getattr(module, "decoder", None)
    numbers = [layer.layer_number for layer in getattr(decoder, "layers", ())]
    first = get_transformer_layer_offset(get_model_config(module), None, chunk.stage) + 1
    if numbers and numbers[0] != first:
        raise RuleError(
            f"the chunk of lane {chunk.lane} on this rank is stage {chunk.stage}, whose first layer is {first}",
            f"the provider built layers {numbers[0]} to {numbers[-1]}",
            "pass pg_collection to the model",
        )


def _require_apart(built: Mapping[int, nn.Module]) -> None:
    """Refuse a parameter in both chunks: it would be reduced in two independent groups."""
    (low, first), (high, second) = built.items()
    theirs = {id(parameter) for parameter in second.parameters()}
    both = [name for name, parameter in first.named_parameters() if id(parameter) in theirs]
    if both:
        raise RuleError(
            "the two chunks of a rank must have no parameter in common",
            f"the provider gave stages {low} and {high} the same {both[0]}" + " and more" * (len(both) > 1),
            "build new parameters at every call",
        )


def _require_hooks_for_delayed(config: Any, ddp_config: DistributedDataParallelConfig) -> None:
    """Layers of Transformer Engine that delay their weight gradient call the data-parallel hooks only if set to."""
    if config.delay_wgrad_compute and not ddp_config.delay_wgrad_compute:
        raise RuleError(
            "Transformer Engine's layers that delay their weight gradients start the reduction themselves",
            "delay_wgrad_compute is set in the TransformerConfig and not in the DistributedDataParallelConfig",
            "set it in both",
        )


def _require_instances(groups: Groups, ddp_config: DistributedDataParallelConfig) -> None:
    wanted = ddp_config.num_distributed_optimizer_instances
    if ddp_config.use_distributed_optimizer and wanted != groups.instances:
        raise RuleError(
            "num_distributed_optimizer_instances must be the number that initialize_model_parallel made groups for",
            f"got {wanted} in the DistributedDataParallelConfig, and groups for {groups.instances}",
            "pass the same number to both",
        )


def _transport(groups: Groups, device: torch.device, timeout: float) -> ProcessGroupTransport:
    staged = device.type == "cuda" and dist.get_backend(groups.pipeline) == "gloo"
    return ProcessGroupTransport(groups.pipeline, device=device, timeout=timeout, staged=staged)


def _equalise(module: nn.Module, chunk: Chunk, groups: Groups) -> None:
    """Give both replicas of a stage the weights and buffers of lane >, whose stage s is on pipeline rank s."""
    source = dist.get_process_group_ranks(groups.pipeline)[chunk.stage]  # which has the stage as its own
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.data, src=source, group=groups.pair)


def _shard_over_stage(module: Any, collection: ProcessGroupCollection) -> None:
    """Number a stage's replicas over both lanes in checkpoints, so that exactly one is the main replica."""
    stock = module.sharded_state_dict
    stage, stages = collection.pp.rank(), collection.pp.size()

    def sharded_state_dict(
        prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        refuse_saving(module)
        metadata = {**(metadata or {}), "dp_cp_group": collection.dp_cp}
        with at_stage(stage, stages):
            return stock(prefix=prefix, sharded_offsets=sharded_offsets, metadata=metadata, **options)

    module.sharded_state_dict = sharded_state_dict


def _mark_shared(module: nn.Module, chunk: Chunk) -> None:
    """Count each stage once in the gradient norm: rank r counts stage r, as Megatron's rank does.

    Megatron has marked the copy of the embedding on the last stage, which is never counted.
    """
    for parameter in module.parameters():
        duplicate = chunk.lane is not UP or getattr(parameter, "shared", False)
        parameter.shared = duplicate  # type: ignore[attr-defined] # Megatron's own mark
