"""DualPipe that can be trusted: a pipeline schedule as a value that is run, proved and compared bit by bit.

This module imports only the standard library.  ``dualpipe.pipeline``, which runs a schedule, needs torch.  So do the
public names of DeepSeek's package (``DualPipe``, ``DualPipeV``, ``WeightGradStore`` and the two setters), which are
loaded on first use.
"""

from __future__ import annotations

from dualpipe import _imports as _imports  # must be the first import: it sorts the import path of the command

# isort: split
import importlib
from typing import Any

from dualpipe.schedule import DOWN, UP, Kind, Lane, Op, Schedule
from dualpipe.schedule.generate import dualpipe, dualpipev, interleaved, one_f_one_b, zb1p, zbv
from dualpipe.schedule.text import dumps, load, loads

_DEEPSEEK = ("DualPipe", "DualPipeV", "WeightGradStore", "set_p2p_tensor_dtype", "set_p2p_tensor_shapes")

__all__ = [
    "DOWN",
    "UP",
    "DualPipe",
    "DualPipeV",
    "Kind",
    "Lane",
    "Op",
    "Schedule",
    "WeightGradStore",
    "dualpipe",
    "dualpipev",
    "dumps",
    "interleaved",
    "load",
    "loads",
    "one_f_one_b",
    "set_p2p_tensor_dtype",
    "set_p2p_tensor_shapes",
    "zb1p",
    "zbv",
]


def __getattr__(name: str) -> Any:
    if name in _DEEPSEEK:
        return getattr(importlib.import_module("dualpipe.runtime.deepseek"), name)
    raise AttributeError(f"module 'dualpipe' has no attribute {name!r}")
