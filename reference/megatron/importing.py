"""Imports megatron-core without its known warnings, each of which is listed with its reason."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_MODULES = (
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.moe.moe_layer",
    "torch.utils.serialization.config",
)
"""The modules for training a GPT; a process that forks ranks imports them once for all ranks."""

_EXPECTED = (
    (r"Transformer Engine and Apex are not installed\.", UserWarning),  # true: both need a GPU
    (r"Apex is not installed\.", UserWarning),
    (r"`torch\.jit\.script_method` is deprecated", DeprecationWarning),  # megatron scripts activations at import
    (r"The following imports from `dynamic_context\.py`", DeprecationWarning),  # megatron on its own inference code
    (r"The 'megatron\.core\.transformer\.custom_layers\.transformer_engine'", DeprecationWarning),  # likewise
    (r"Warning: tp_group is None, using default tp group", DeprecationWarning),  # within finalize_model_grads
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),  # the distributed optimizer on its shards
    (r"When using .* set the environment variable CUDA_DEVICE_MAX_CONNECTIONS", UserWarning),  # the speed of a GPU
    (
        r"`torch\.distributed\.(reduce_scatter|all_gather_into)_tensor` is deprecated",
        FutureWarning,
    ),  # torch 2.13's names
    (
        r"`load_state_dict` is deprecated and will be removed in future versions",
        FutureWarning,
    ),  # in loading checkpoints
    (r"Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning),  # likewise
    (r"MLP requires ffn_hidden_size, but it was not provided", DeprecationWarning),  # megatron's layer on its own use
)


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Inside the block, megatron-core's known warnings at import and in training are ignored, and no others."""
    with warnings.catch_warnings():
        for text, category in _EXPECTED:
            warnings.filterwarnings("ignore", rf"\s*{text}", category)
        yield


def import_megatron() -> None:
    """Import the parts of megatron-core for training a GPT."""
    with expected_warnings():
        for name in _MODULES:
            importlib.import_module(name)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)  # every rank would log its bucket layout
