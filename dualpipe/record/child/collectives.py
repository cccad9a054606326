"""Watch torch.distributed's collectives: which group calls which, in which order, and on what.

NCCL runs the collectives of one communicator in the order in which each rank launches them.  An asynchronous one has
ended for the program once it waits for it, or for a later one of the same group.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from . import singles
from .flow import Flow
from .log import call_path
from .patches import Patches
from .transport import Transport

_WATCHED = (
    *("all_reduce", "all_reduce_coalesced", "broadcast", "reduce", "gather", "scatter", "barrier"),
    *("all_gather", "all_gather_single", "all_gather_coalesced", "reduce_scatter", "reduce_scatter_single"),
    *("all_gather_into_tensor", "_all_gather_base", "reduce_scatter_tensor", "_reduce_scatter_base"),
    *("all_to_all", "all_to_all_single", "all_gather_object", "gather_object", "broadcast_object_list"),
    "scatter_object_list",
)
_OUTPUT = frozenset({"output_tensor", "tensor_list", "output", "output_tensor_list", "gather_list", "tensor"})
"""The arguments that a collective may write to."""
_UNIFORM = frozenset({"all_reduce", "broadcast", "reduce"})
"""The functions whose tensor has the same type and number of elements on every rank, in any shape."""


def watch(flow: Flow, patches: Patches, transport: Transport) -> None:
    """Watch the collectives until ``patches.undo()``."""
    collectives = Collectives(flow)
    for name in _WATCHED:
        function = getattr(c10d, name, None)
        if function is not None:
            patches.wrap(function, partial(_watched, collectives, transport, name))


def _watched(collectives: Collectives, transport: Transport, name: str, original: Any) -> Any:
    flow = collectives.flow
    signature = inspect.signature(getattr(c10d, name))

    def call(*args: Any, **kwargs: Any) -> Any:
        if transport.inside:
            return original(*args, **kwargs)
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return transport.run(original, *args, **kwargs)
        group = given.get("group") or c10d._get_default_group()
        if c10d._rank_not_in_group(group):
            return original(*args, **kwargs)  # returns at once, with a warning
        if dist.get_world_size(group) < 2:
            return singles.compute(name, given) if transport.alone else transport.run(original, *args, **kwargs)
        number = collectives.begin(name, group, given)
        is_async = bool(given.get("async_op"))
        if not is_async:
            flow.write("collect", collective=number)
        try:
            work = transport.run(original, *args, **kwargs)
        except BaseException as error:
            flow.note_error(error, "C", [number])
            raise
        if not is_async or work is None:
            flow.write("collected", collective=number)
            return work
        return _Work(flow, work, number)

    return call


class _Work(dist.Work):
    """A pending collective that reports when the program waits for it."""

    def __init__(self, flow: Flow, work: Any, number: int) -> None:
        super().__init__()
        self._flow, self._work, self._number = flow, work, number
        self._completed = False

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        if self._completed:
            return self._work.wait(*args, **kwargs)
        self._flow.write("collect", collective=self._number)
        try:
            result = self._work.wait(*args, **kwargs)
        except BaseException as error:
            self._flow.note_error(error, "C", [self._number])
            raise
        self._completed = True
        self._flow.write("collected", collective=self._number)
        return result

    def __getattribute__(self, name: str) -> Any:
        if name in ("wait", "_flow", "_work", "_number", "_completed") or name.startswith("__"):
            return super().__getattribute__(name)
        return getattr(super().__getattribute__("_work"), name)


class Collectives:
    """The collectives of one rank by number, and what each is on."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._count = 0

    def begin(self, name: str, group: Any, given: dict[str, Any]) -> int:
        """A collective is about to be launched; returns its number."""
        flow, number = self.flow, self._count
        self._count += 1
        tensors = [t for key, value in given.items() if key != "group" for t in _tensors(value)]
        parameters = list(dict.fromkeys(p for tensor in tensors for p in flow.parameters.with_gradients_in(tensor)))
        marks = sorted({mark for tensor in tensors for mark in flow.origins.content(tensor)})
        form = [f"{str(t.dtype).removeprefix('torch.')}[{t.numel()}]" for t in tensors] if name in _UNIFORM else []
        flow.write(
            "collective",
            collective=number,
            name=name,
            group=c10d.get_process_group_ranks(group),
            group_name=group.group_name,
            form=form,
            modules=sorted({module for p in parameters for module in flow.parameters.holders(p)}),
            names=[flow.parameters.name(p) for p in parameters],
            values=[flow.parameters.value(p) for p in parameters],
            marks=marks,
            context=sorted(flow.context or ()),
            at=call_path(),
        )
        for key in _OUTPUT & given.keys():
            for tensor in _tensors(given[key]):
                if tensor.is_floating_point() and not flow.origins.content(tensor) and not parameters:
                    flow.origins.put(tensor, frozenset({("U", flow.arrivals.by_collective(number))}))
        return number


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []
