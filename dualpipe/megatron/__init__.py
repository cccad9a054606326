"""DualPipe as a drop-in for Megatron-core: the functions that a training script imports.

megatron-core is imported only when a name of this package is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualpipe.megatron.arguments import add_dualpipe_args as add_dualpipe_args
    from dualpipe.megatron.arguments import validate_dualpipe_args as validate_dualpipe_args
    from dualpipe.megatron.checkpoint import load_checkpoint as load_checkpoint
    from dualpipe.megatron.checkpoint import save_checkpoint as save_checkpoint
    from dualpipe.megatron.checkpoint import sharded_state_dict as sharded_state_dict
    from dualpipe.megatron.installation import get_forward_backward_func as get_forward_backward_func
    from dualpipe.megatron.installation import install as install
    from dualpipe.megatron.installation import installed as installed
    from dualpipe.megatron.installation import uninstall as uninstall
    from dualpipe.megatron.iterators import split_data_iterator as split_data_iterator
    from dualpipe.megatron.model import build_dualpipe_model as build_dualpipe_model
    from dualpipe.megatron.optimizer import build_dualpipe_optimizer as build_dualpipe_optimizer
    from dualpipe.megatron.placement import schedule_of as schedule_of
    from dualpipe.megatron.placement import stages_of as stages_of
    from dualpipe.megatron.schedule import forward_backward_dualpipe as forward_backward_dualpipe

_HOME = {
    "add_dualpipe_args": "arguments",
    "build_dualpipe_model": "model",
    "build_dualpipe_optimizer": "optimizer",
    "forward_backward_dualpipe": "schedule",
    "get_forward_backward_func": "installation",
    "install": "installation",
    "installed": "installation",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "schedule_of": "placement",
    "sharded_state_dict": "checkpoint",
    "split_data_iterator": "iterators",
    "stages_of": "placement",
    "uninstall": "installation",
    "validate_dualpipe_args": "arguments",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
