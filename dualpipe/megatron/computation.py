"""Megatron's chunks behind the interpreter: F by Megatron's own ``forward_step``, B and W with gradients synchronised
at the last microbatch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import check_first_val_step, forward_step
from torch import Tensor, nn

from dualpipe.errors import StageError
from dualpipe.megatron.losses import detached
from dualpipe.megatron.model import Chunk
from dualpipe.megatron.position import at_stage
from dualpipe.runtime.executor import Tensors
from dualpipe.runtime.modules import describe
from dualpipe.schedule import B, Lane, Op, Schedule, W

NoSync = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Call:
    """What a schedule function of Megatron was called with, as far as forwards need it."""

    forward_step_func: Callable[..., Any]
    iterators: Mapping[Lane, Iterator[Any] | None]
    config: Any
    forward_only: bool
    collect_non_loss_data: bool
    first_val_step: bool | None
    context_parallel_size: int


@dataclass
class MegatronComputation:
    """A step on Megatron's chunks; a ``dualpipe.runtime.executor.Computation``.

    ``collected[lane]`` is what the loss function returned, microbatch by microbatch, where the rank holds the last
    stage of the lane; ``tokens`` is the sum of the numbers of tokens that it returned.
    """

    schedule: Schedule
    model: Mapping[tuple[Lane, int], tuple[nn.Module, Chunk]]
    call: Call
    collected: dict[Lane, list[Any]] = field(default_factory=dict)
    tokens: Tensor | int = 0

    def __post_init__(self) -> None:
        self._no_sync = _no_sync(self.call.config.no_sync_func, list(self.model))

    def forward(self, op: Op, inputs: Tensors) -> Tensors:
        module, chunk = self.model[op.lane, op.stage]
        call, last = self.call, self.schedule.is_last(op)
        collected: list[Any] = self.collected.setdefault(op.lane, []) if last else []
        with chunk.drawing(), at_stage(op.stage):
            output, tokens = forward_step(
                call.forward_step_func,
                call.iterators[op.lane],
                module,
                self.schedule.microbatches[op.lane],  # each lane is a data-parallel replica of its microbatches
                inputs[0] if inputs else None,
                collected,
                call.config,
                cp_group_size=call.context_parallel_size,
                collect_non_loss_data=call.collect_non_loss_data,
                is_first_microbatch=check_first_val_step(call.first_val_step, call.forward_only, op.mb == 0),
                current_microbatch=op.mb,
                is_last_stage=last,
            )
        if not last:
            return (output,)
        collected[-1] = detached(collected[-1])  # a loss function may return tensors that hold the whole graph
        self.tokens = self.tokens + tokens
        if call.forward_only:
            return ()
        if not isinstance(output, Tensor) or output.numel() != 1:
            raise StageError(
                "the loss function returns a scalar tensor",
                f"at {op} it returned {describe(output)}",
                "reduce it to the microbatch's loss",
            )
        return (output if call.config.grad_scale_func is None else call.config.grad_scale_func(output),)

    @contextmanager
    def around(self, op: Op) -> Iterator[None]:
        config = self.call.config
        if config.timers is not None:
            config.timers("backward-compute", log_level=2).start()
        with at_stage(op.stage), self.synchronising(op):  # a layer that is recomputed may ask which stage it is
            yield
            if op.kind is W:
                for backward_dw in self.model[op.lane, op.stage][1].split.delayed:
                    backward_dw()
        if config.timers is not None:
            config.timers("backward-compute").stop()

    def synchronising(self, op: Op) -> AbstractContextManager[object]:
        """Gradients are reduced as they become ready at a chunk's last microbatch, in its B and in its W.

        With ``grad_sync_func`` they are reduced all at once, when the step is over.
        """
        assert op.kind in (B, W)
        last = op.mb == self.schedule.microbatches[op.lane] - 1
        return nullcontext() if last and self.call.config.grad_sync_func is None else self._no_sync(op.lane, op.stage)


def _no_sync(
    given: NoSync | Sequence[NoSync] | None, held: Sequence[tuple[Lane, int]]
) -> Callable[[Lane, int], AbstractContextManager[object]]:
    """Megatron's ``no_sync_func``: nothing, one for the whole model, or one for each chunk of the list."""
    if given is None:
        return lambda lane, stage: nullcontext()
    if callable(given):
        return lambda lane, stage: given()
    by_chunk = dict(zip(held, given, strict=True))
    return lambda lane, stage: by_chunk[lane, stage]()


def token_count(computation: MegatronComputation, device: torch.device) -> Tensor:
    """The tokens that this rank's losses were computed on, as Megatron counts them: a 0-dimensional int tensor."""
    return torch.as_tensor(computation.tokens, dtype=torch.int, device=device)
