"""Collectives of a group with one member, computed without a connection.

Megatron calls them wherever a size is 1, such as an ``all_reduce`` over one tensor-parallel rank in every loss.  A fork
of a rank cannot use the rank's connections, and needs none for these: what the member puts in is the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_MOVES: Mapping[str, tuple[str, str]] = {
    "all_gather": ("tensor_list", "tensor"),
    "all_gather_coalesced": ("output_tensor_lists", "input_tensor_list"),
    "all_gather_into_tensor": ("output_tensor", "input_tensor"),
    "all_gather_object": ("object_list", "obj"),
    "all_gather_single": ("output_tensor", "input_tensor"),
    "_all_gather_base": ("output_tensor", "input_tensor"),
    "all_to_all": ("output_tensor_list", "input_tensor_list"),
    "all_to_all_single": ("output", "input"),
    "gather": ("gather_list", "tensor"),
    "gather_object": ("object_gather_list", "obj"),
    "reduce_scatter": ("output", "input_list"),
    "reduce_scatter_single": ("output", "input"),
    "reduce_scatter_tensor": ("output", "input"),
    "_reduce_scatter_base": ("output", "input"),
    "scatter": ("tensor", "scatter_list"),
    "scatter_object_list": ("scatter_object_output_list", "scatter_object_input_list"),
}
"""The arguments for the output and the input of each collective; the others leave their only argument as it is."""


class Done(dist.Work):
    """The work of an asynchronous collective that has ended."""

    def wait(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def compute(name: str, given: Mapping[str, Any]) -> Done | None:
    """Write what one of ``torch.distributed``'s collectives gives in a group of one member.

    ``given`` are its arguments by name.  Returns a work if the collective is asynchronous.
    """
    output, source = _MOVES.get(name, ("", ""))
    if given.get(output) is None:
        pass
    elif "object" in name:
        given[output][0] = given[source][0] if name == "scatter_object_list" else given[source]
    else:
        _put(given[output], given[source])
    return Done() if given.get("async_op") else None


def _put(output: Any, source: Any) -> None:
    """Copy a tensor, or the only one of a list, to a tensor, or to the only one of a list."""
    source = source if isinstance(source, list) else [source]
    for one, other in zip(output if isinstance(output, list) else [output], source, strict=True):
        if isinstance(one, Tensor):
            with torch.no_grad():
                one.copy_(other.reshape(one.shape))
        else:
            _put(one, other)
