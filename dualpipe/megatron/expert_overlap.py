"""F&B pairs of Megatron's mixtures of experts: the all-to-all of one beside the computation of the other.

``TransformerModelChunkSchedulePlan`` of megatron-core 0.16.1 cuts a chunk into nodes (attention, dispatch, experts,
combine), each with a backward of its own, and ``run(f_plan, b_plan, b_grad)`` interleaves the F of one chunk with the B
of another, layer by layer, on two streams.  Here every F builds a plan, and its B runs that plan backwards::

    F alone     run(plan, None)              a leaf with the plan's output goes on: to the loss or to the next stage
    B alone     backward to the leaf, then run(None, plan, leaf.grad)
    F&B pair    backward to the leaf, then run(plan of F, plan of B, leaf.grad)

Linear layers defer their weight gradients as in any other B.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from typing import Any

import torch
from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron.core.pipeline_parallel.utils import set_streams
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from dualpipe.errors import RuleError
from dualpipe.megatron.computation import MegatronComputation
from dualpipe.runtime.executor import Overlap
from dualpipe.runtime.live import Tensors
from dualpipe.runtime.weightgrad import run_backward
from dualpipe.schedule import B, Chunk, Op, Task


@dataclass
class PlannedComputation(MegatronComputation):
    """A training step on Megatron's chunks through schedule plans.  ``plans`` are those between F and B, each with the
    leaf that its output became."""

    plans: dict[Task, tuple[Any, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        set_streams()
        if not _takes_plans(self.call.forward_step_func):
            raise RuleError(
                "with --dualpipe-overlap-moe the forward step function must be able to return a schedule plan",
                "it has no parameter return_schedule_plan",
                "return model.build_schedule_plan(...) instead of model(...) if return_schedule_plan is true, as "
                "Megatron-LM's pretrain_gpt.py does",
            )

    def overlaps(self) -> dict[tuple[Chunk, Chunk], Overlap]:
        """The chunks (of F, of B) whose F&B pairs run as one unit: all."""
        return dict.fromkeys(permutations(self.model, 2), self.overlap)

    def forward(self, op: Op, inputs: Tensors) -> Tensors:
        return self.run_forward(op, inputs, partial(self.planned, op, None, None))

    def overlap(self, forward: Op, inputs: Tensors, backward: Op, outputs: Tensors, gradients: Tensors) -> Tensors:
        run_backward(outputs, gradients or tuple(map(torch.ones_like, outputs)))
        plan, leaf = self.plans.pop(backward.task)
        return self.run_forward(forward, inputs, partial(self.planned, forward, plan, leaf.grad))

    @contextmanager
    def around(self, op: Op) -> Iterator[None]:
        with super().around(op):
            yield
            if op.kind is B and op.task in self.plans:  # overlap has run that of a pair
                plan, leaf = self.plans.pop(op.task)
                TransformerModelChunkSchedulePlan.run(None, plan, b_grad=leaf.grad)

    def planned(
        self, op: Op, backward: Any, gradient: Tensor | None, iterator: Iterator[Any] | None, module: nn.Module
    ) -> tuple[Tensor, Any]:
        """A forward step function for ``op``, beside the plan ``backward`` from ``gradient``, if there is one."""
        gpt = get_attr_wrapped_model(module, "build_schedule_plan", return_model_obj=True)
        plan, loss = self.call.forward_step_func(iterator, gpt, return_schedule_plan=True)
        output = TransformerModelChunkSchedulePlan.run(plan, backward, b_grad=gradient)
        leaf = output.detach().requires_grad_(output.requires_grad)
        self.plans[op.task] = (plan, leaf)
        return leaf, loss


def _takes_plans(function: Any) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(each.name == "return_schedule_plan" or each.kind is each.VAR_KEYWORD for each in parameters)
