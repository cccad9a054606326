"""Builds the two chunks of a rank, so that everything around them sees two replicas of a pipeline.

Megatron's training loop calls its model provider once for each pipeline rank.  Here it is called twice, for stage r
(lane >) and for stage P-1-r (lane <).  What the loop then holds is a list of two wrapped chunks in order of stage.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import nn

from dualpipe.errors import RuleError
from dualpipe.megatron.arguments import validate_dualpipe_config
from dualpipe.megatron.data_parallel import StageDDP
from dualpipe.megatron.groups import Groups, Place, create_groups
from dualpipe.megatron.layers import Split, split_layers
from dualpipe.megatron.position import at_stage
from dualpipe.megatron.random_streams import RandomStream, capture, exchange, restore
from dualpipe.megatron.replicas import Copies, copies_of
from dualpipe.runtime.process_group import ProcessGroupTransport
from dualpipe.runtime.weightgrad import DeferredGradients
from dualpipe.schedule import UP

logger = logging.getLogger(__name__)

Provider = Callable[..., nn.Module]


@dataclass
class Pipeline:
    """What the two chunks of a rank share.  Reached from either of them; there is no global state.

    ``optimizer`` gives what ``build_dualpipe_optimizer`` built over them, as long as the program keeps it; ``copies``
    compares them with the other copies of their stages.
    """

    groups: Groups
    transport: ProcessGroupTransport
    stream: RandomStream
    store: DeferredGradients = field(default_factory=DeferredGradients)
    agreed: set[str] = field(default_factory=set)
    optimizer: Callable[[], Any] = lambda: None
    copies: Copies = field(init=False)


@dataclass(frozen=True)
class Chunk:
    """What one chunk of the model is: where it stands, and what of it is split into B and W."""

    place: Place
    pipeline: Pipeline
    split: Split

    def drawing(self) -> AbstractContextManager[object]:
        """Around a forward: random numbers come from this chunk's stream."""
        return nullcontext() if self.place.lane is UP else self.pipeline.stream.drawing()


def chunk_of(module: nn.Module) -> Chunk:
    """The ``Chunk`` behind a model chunk, however it is wrapped.  Raises ``RuleError`` where there is none."""
    try:
        chunk: Chunk = get_attr_wrapped_model(module, "dualpipe_chunk")
    except RuntimeError:
        raise RuleError(
            "DualPipe runs the model that build_dualpipe_model made", f"got a {type(module).__name__}", "build it there"
        ) from None
    return chunk


def require_chunks(model: Sequence[nn.Module]) -> list[Chunk]:
    """The chunks of a rank's model.  Raises ``RuleError`` unless they are both, of one pipeline, in order of stage."""
    chunks = [chunk_of(module) for module in model]
    pipelines = {id(chunk.pipeline) for chunk in chunks}
    stages = [chunk.place.stage for chunk in chunks]
    if len(pipelines) != 1 or stages != [place.stage for place in chunks[0].pipeline.groups.places]:
        got = f"stages {stages}" + f" of {len(pipelines)} models" * (len(pipelines) > 1)
        raise RuleError(
            "the model is the list that build_dualpipe_model returned: both chunks of the rank, in order of stage, "
            "in which collectives go through them",
            f"got {got}",
            "hand on that list as it is",
        )
    return chunks


def build_dualpipe_model(
    model_provider: Provider,
    ddp_config: DistributedDataParallelConfig | None = None,
    *,
    wrap_with_ddp: bool = True,
    data_parallel_random_init: bool = False,
    timeout: float = 600.0,
    **provider_options: Any,
) -> list[nn.Module]:
    """The two chunks of this rank, in order of stage: ``[min(r, P-1-r), max(r, P-1-r)]``.

    Every process of the job calls it together, after ``initialize_model_parallel`` and after the random generators
    were seeded as Megatron does.  The weights of stage s are then those that Megatron's pipeline rank s would have,
    in both copies of the stage.

    Parameters
    ----------
    model_provider:
        ``provider(pre_process=..., post_process=..., pg_collection=...)`` returns the chunk.  It hands
        ``pg_collection`` to the model, which numbers its layers by it.  ``provider_options`` are passed on.
    ddp_config:
        Of Megatron's ``DistributedDataParallel``; its defaults if ``None``.
    wrap_with_ddp:
        Leave the chunks unwrapped if false, for inference.
    data_parallel_random_init:
        The data-parallel ranks were seeded differently: copy the first one's weights to the others.
    timeout:
        Seconds after which a message that does not come ends the job with an error that names it.

    Raises ``RuleError`` for a configuration that would train wrongly, or a provider that does not follow.
    """
    groups = create_groups()
    _require_size(groups)
    built: dict[int, nn.Module] = {}
    places = sorted(groups.places, key=lambda place: place.lane is not UP)
    states = None
    for place in places:  # lane > first: it draws the numbers that Megatron's rank would draw
        with at_stage(place.stage):
            built[place.stage] = _provide(model_provider, place, groups.size, provider_options)
            validate_dualpipe_config(get_model_config(built[place.stage]), ddp_config)
            _require_position(built[place.stage], place)
            _require_untied(built[place.stage], place)
        if states is None:
            states = capture()
    assert states is not None
    restore(states)
    _require_apart(built)
    config = get_model_config(built[places[0].stage])
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    pipeline = Pipeline(groups, _transport(groups, device, timeout), RandomStream(exchange(states, groups.pair)))
    ddp_config = ddp_config or DistributedDataParallelConfig()
    _require_hooks_for_delayed(config, ddp_config)
    wrapped = []
    for place in groups.places:
        module = built[place.stage].to(device)
        _equalise(module, place, groups)
        if not ddp_config.use_distributed_optimizer:
            _mark_shared(module, place)
        module.dualpipe_chunk = Chunk(  # type: ignore[assignment] # a plain attribute, not a module
            place, pipeline, split_layers(module, pipeline.store, f"stage {place.stage} of lane {place.lane}")
        )
        _shard_over_stage(module, place)
        if config.fp16 or config.bf16:
            module = Float16Module(config, module)
        if wrap_with_ddp:
            module = StageDDP(config, ddp_config, module, pg_collection=place.collection)
            if data_parallel_random_init:
                module.broadcast_params()
        wrapped.append(module)
    pipeline.copies = copies_of(wrapped, [place.stage for place in groups.places], groups.pair)
    if not any(split.stage.layers or split.delayed for split in (chunk_of(module).split for module in wrapped)):
        logger.warning("dualpipe: no layer of this rank leaves its weight gradient to W, which then has nothing to do")
    return wrapped


def _require_size(groups: Groups) -> None:
    if groups.size < 2 or groups.size % 2:
        raise RuleError(
            "DualPipe needs an even number of pipeline ranks, 2 or more",
            f"got a pipeline of {groups.size}",
            "set --pipeline-model-parallel-size to an even number",
        )


def _provide(provider: Provider, place: Place, stages: int, options: dict[str, Any]) -> nn.Module:
    parameters = inspect.signature(provider).parameters
    if "pg_collection" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise RuleError(
            "the model provider takes pg_collection and hands it to the model, which numbers its layers by it",
            f"got one that takes {', '.join(parameters)}",
            "add the parameter and pass it to GPTModel(..., pg_collection=pg_collection)",
        )
    module = provider(
        pre_process=place.stage == 0,
        post_process=place.stage == stages - 1,
        pg_collection=place.collection,
        **options,
    )
    for parameter in module.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return module


def _require_position(module: nn.Module, place: Place) -> None:
    """The chunk's layers must be those of its stage: a provider that drops ``pg_collection`` builds those of rank r."""
    decoder = getattr(module, "decoder", None)
    numbers = [layer.layer_number for layer in getattr(decoder, "layers", ())]
    first = get_transformer_layer_offset(get_model_config(module), None, place.stage) + 1
    if numbers and numbers[0] != first:
        raise RuleError(
            f"the chunk of lane {place.lane} on this rank is stage {place.stage}, whose first layer is {first}",
            f"the provider built layers {numbers[0]} to {numbers[-1]}",
            "hand pg_collection to the model",
        )


def _require_untied(module: nn.Module, place: Place) -> None:
    """Read off the module whether a provider ties embedding and output weights, whatever the arguments say."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, layer in module.named_modules():
        if getattr(layer, "share_embeddings_and_output_weights", False) or getattr(layer, "mtp_process", False):
            tied = "share_embeddings_and_output_weights" if not getattr(layer, "mtp_process", False) else "mtp_process"
            _refuse_tied(place, f"{tied} of its {type(layer).__name__} is set")
        for own, parameter in layer.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append(f"{name}.{own}".lstrip("."))
            if getattr(parameter, "shared_embedding", False):
                _refuse_tied(place, f"{owners[parameter][0]} is marked shared_embedding")
    for names in owners.values():
        if len(names) > 1 and len({"embedding" in name.lower() for name in names}) > 1:
            _refuse_tied(place, f"{names[0]} is {names[1]}")


def _refuse_tied(place: Place, got: str) -> None:
    raise RuleError(
        "embedding and output weights are untied, and no layer predicts further tokens with them",
        f"in stage {place.stage} that the provider built, {got}",
        "pass share_embeddings_and_output_weights=False to the model, and no multi-token prediction",
    )


def _require_apart(built: Mapping[int, nn.Module]) -> None:
    """A parameter in both chunks would be reduced in two groups, which know nothing of each other."""
    (low, first), (high, second) = built.items()
    theirs = {id(parameter) for parameter in second.parameters()}
    both = [name for name, parameter in first.named_parameters() if id(parameter) in theirs]
    if both:
        raise RuleError(
            "the two chunks of a rank have no parameter in common",
            f"the provider gave stages {low} and {high} the same {both[0]}" + " and more" * (len(both) > 1),
            "build the parameters anew at every call",
        )


def _require_hooks_for_delayed(config: Any, ddp_config: DistributedDataParallelConfig) -> None:
    """Layers of Transformer Engine that delay their weight gradient call the data-parallel hooks, if told."""
    if config.delay_wgrad_compute and not ddp_config.delay_wgrad_compute:
        raise RuleError(
            "weight gradients that Transformer Engine's layers delay are reduced from there",
            "delay_wgrad_compute is set in the TransformerConfig and not in the DistributedDataParallelConfig",
            "set it in both",
        )


def _transport(groups: Groups, device: torch.device, timeout: float) -> ProcessGroupTransport:
    staged = device.type == "cuda" and dist.get_backend(groups.pipeline) == "gloo"
    return ProcessGroupTransport(groups.pipeline, device=device, timeout=timeout, staged=staged)


def _equalise(module: nn.Module, place: Place, groups: Groups) -> None:
    """Give both replicas of a stage the weights and buffers of lane >, where pipeline rank s holds stage s."""
    source = dist.get_process_group_ranks(groups.pipeline)[place.stage]
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.data, src=source, group=groups.pair)


def _shard_over_stage(module: Any, place: Place) -> None:
    """Let checkpoints number a stage's replicas over both lanes, so that one of them is the main one."""
    stock = module.sharded_state_dict

    def sharded_state_dict(
        prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        metadata = {**(metadata or {}), "dp_cp_group": place.collection.dp_cp}
        return stock(prefix=prefix, sharded_offsets=sharded_offsets, metadata=metadata, **options)

    module.sharded_state_dict = sharded_state_dict


def _mark_shared(module: nn.Module, place: Place) -> None:
    """Let the gradient norm count each stage once: rank r counts stage r, as Megatron's rank does."""
    for parameter in module.parameters():
        parameter.shared = place.lane is not UP  # type: ignore[attr-defined] # Megatron's own mark
