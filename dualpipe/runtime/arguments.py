"""The arguments of a pipeline: one of another type is refused with the rule, not by an error from within."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index

import torch
from torch import nn

from dualpipe.errors import RuleError, StageError
from dualpipe.runtime.boundary import Boundary
from dualpipe.runtime.modules import Feed, Stages, describe
from dualpipe.runtime.transport import TensorSpec
from dualpipe.schedule import Chunk, Lane, Schedule


def require_modules(stages: Mapping[tuple[Lane, int], nn.Module]) -> Stages:
    """The modules by chunk.  Raises ``RuleError`` for anything but a mapping from (lane, stage) to a module."""
    rule, fix = "stages must be a mapping from (lane, stage) to a module", "write {(UP, 0): module}"
    if not isinstance(stages, Mapping):
        raise RuleError(rule, f"got {describe(stages)}", fix)
    for chunk, module in stages.items():
        if not (isinstance(chunk, tuple) and len(chunk) == 2):
            raise RuleError(rule, f"got the key {chunk!r}", fix)
        if not isinstance(module, nn.Module):
            raise RuleError(rule, f"the stage of {chunk[1]}{chunk[0]} is {describe(module)}", fix)
    return {Chunk(*chunk): module for chunk, module in stages.items()}


def require_callable(criterion: object) -> None:
    """Raise ``RuleError`` unless the criterion can be called, or is ``None``."""
    if criterion is not None and not callable(criterion):
        raise RuleError(
            "a criterion must be a function or a module", f"got {describe(criterion)}", "pass the loss function itself"
        )


def boundary_of(given: Sequence[TensorSpec] | Boundary) -> Boundary:
    """The boundary as a function of the sending stage.  What it returns is checked, and raises ``RuleError``."""
    if callable(given):
        return lambda stage: _specs(given(stage))
    specs = _specs(given)
    return lambda stage: specs


def _specs(given: Sequence[TensorSpec]) -> list[TensorSpec]:
    rule, fix = "a boundary must be a list of TensorSpec(shape, dtype)", "write [TensorSpec((4, 16), torch.float32)]"
    if isinstance(given, TensorSpec) or not isinstance(given, Sequence):
        raise RuleError(rule, f"got {describe(given)}", fix)
    specs = []
    for spec in given:
        try:
            shape, dtype = spec
            sizes = tuple([index(size) for size in shape])
        except (TypeError, ValueError) as error:
            raise RuleError(rule, f"got {spec!r}", fix) from error
        if not isinstance(dtype, torch.dtype) or any(size < 0 for size in sizes):
            raise RuleError(rule, f"got {spec!r}", fix)
        specs.append(TensorSpec(sizes, dtype))
    return specs


def require_feed(feed: Feed, schedule: Schedule, rank: int, labels: bool) -> None:
    """Raise ``StageError`` unless ``feed`` has the data that ``rank`` needs for a step."""
    if not isinstance(feed, Feed):
        raise StageError("a step takes a Feed", f"got {describe(feed)}", "write Feed(inputs, labels)")
    feed.require(schedule, rank, labels)
