"""Runs Megatron's chunks for the interpreter: F calls Megatron's ``forward_step``; B and W start the reduction of
gradients at the last microbatch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import check_first_val_step, forward_step
from torch import Tensor, nn

from dualpipe.errors import StageError
from dualpipe.megatron.groups import at_stage
from dualpipe.megatron.losses import detached
from dualpipe.megatron.model import ChunkSetup
from dualpipe.runtime.executor import Overlap
from dualpipe.runtime.live import Tensors
from dualpipe.runtime.modules import describe
from dualpipe.schedule import B, Chunk, Lane, Op, Schedule, W

NoSync = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Call:
    """The arguments of a schedule function of Megatron that forwards need."""

    forward_step_func: Callable[..., Any]
    iterators: Mapping[Chunk, Iterator[Any] | None]
    config: Any
    forward_only: bool
    collect_non_loss_data: bool
    first_val_step: bool | None
    context_parallel_size: int


@dataclass
class MegatronComputation:
    """A step on Megatron's chunks; a ``dualpipe.runtime.executor.Computation``.

    ``collected[lane]`` holds the results of the loss function, one for each microbatch, if the rank has the last stage
    of the lane; ``tokens`` is the sum of the numbers of tokens that the loss function returned.
    """

    schedule: Schedule
    model: Mapping[Chunk, tuple[nn.Module, ChunkSetup]]
    call: Call
    collected: dict[Lane, list[Any]] = field(default_factory=dict)
    tokens: Tensor | int = 0

    def __post_init__(self) -> None:
        self._no_sync = _no_sync(self.call.config.no_sync_func, list(self.model))

    def overlaps(self) -> dict[tuple[Chunk, Chunk], Overlap]:
        """The chunks (of F, of B) whose F&B pairs run as one unit."""
        return {}

    def forward(self, op: Op, inputs: Tensors) -> Tensors:
        return self.run_forward(op, inputs, self.call.forward_step_func)

    def run_forward(self, op: Op, inputs: Tensors, forward_step_func: Callable[..., Any]) -> Tensors:
        module, setup = self.model[op.chunk]
        call, last = self.call, self.schedule.is_last(op)
        collected: list[Any] = self.collected.setdefault(op.lane, []) if last else []
        with setup.drawing(), at_stage(op.stage, self.schedule.stages):
            output, tokens = forward_step(
                forward_step_func,
                call.iterators[op.chunk],
                module,
                self.schedule.microbatches[op.lane],  # each lane is a data-parallel replica with its own microbatches
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
        collected[-1] = detached(collected[-1])  # a loss function may return tensors that keep the whole graph alive
        self.tokens = self.tokens + tokens
        if call.forward_only:
            return ()
        if not isinstance(output, Tensor) or output.numel() != 1:
            raise StageError(
                "the loss function must return a scalar tensor",
                f"at {op} it returned {describe(output)}",
                "reduce it to the microbatch's loss",
            )
        return (output if call.config.grad_scale_func is None else call.config.grad_scale_func(output),)

    @contextmanager
    def around(self, op: Op) -> Iterator[None]:
        config = self.call.config
        if config.timers is not None:
            config.timers("backward-compute", log_level=2).start()
        # a recomputed layer may ask for its stage
        with at_stage(op.stage, self.schedule.stages), self.synchronising(op):
            yield
            if op.kind is W:
                for backward_dw in self.model[op.chunk][1].split.delayed:
                    backward_dw()
        if config.timers is not None:
            config.timers("backward-compute").stop()

    def synchronising(self, op: Op) -> AbstractContextManager[object]:
        """Reduce gradients as they become ready in B and W of a chunk's last microbatch, and nowhere else.

        With ``grad_sync_func`` they are all reduced at the end of the step.
        """
        assert op.kind in (B, W)
        last = op.mb == self.schedule.microbatches[op.lane] - 1
        return nullcontext() if last and self.call.config.grad_sync_func is None else self._no_sync(op.chunk)


def _no_sync(
    given: NoSync | Sequence[NoSync] | None, chunks: Sequence[Chunk]
) -> Callable[[Chunk], AbstractContextManager[object]]:
    """Megatron's ``no_sync_func`` by chunk: ``given`` is nothing, one for the whole model, or one for each chunk."""
    if given is None:
        return lambda chunk: nullcontext()
    if callable(given):
        return lambda chunk: given()
    by_chunk = dict(zip(chunks, given, strict=True))
    return lambda chunk: by_chunk[chunk]()


def token_count(computation: MegatronComputation, device: torch.device) -> Tensor:
    """The number of tokens in this rank's losses, as Megatron counts them: a 0-dimensional int32 tensor."""
    return torch.as_tensor(computation.tokens, dtype=torch.int, device=device)
