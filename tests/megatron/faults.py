"""Faults between a schedule and Megatron that real implementations shipped, each planted in the running drop-in.

``plant`` runs on every rank before the drop-in does, and patches it to behave like the faulty implementation.  The
numbers are those of docs/reference/museum.md.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from ci.faults.fault import Fault
from reference.megatron.case import Case, Model
from tests.megatron.faults_of_replicas import (
    experts_balanced_in_one_lane,
    initial_weights_differ,
    logits_of_one_lane,
    mirror_chunk_numbered_as_rank_r,
    norm_counts_both_replicas,
    norm_counts_every_optimizer_instance,
    norm_of_one_stage_only,
    replicas_not_reduced_together,
)

BASE = Case(pp=2, steps=1, timeout=10)


@dataclass(frozen=True)
class MegatronFault(Fault[[], None]):
    """A fault, and the case that shows it.  The first difference or failure must match ``says``."""

    case: Case = BASE

    def __str__(self) -> str:
        return f"{self.number}-{self.plant.__name__}"


def weights_never_run() -> None:
    from dualpipe.runtime.weightgrad import DeferredGradients

    DeferredGradients.run = lambda self, key: self._deferred.pop(key)


def layer_counted_twice() -> None:
    from dualpipe.runtime.weightgrad import DeferredGradients

    real = DeferredGradients.defer

    def defer(self, use, x, dy):
        for _ in range(2 if use.weight.shape[0] == 4 * BASE.hidden else 1):
            real(self, use, x, dy)

    DeferredGradients.defer = defer


def hooks_bypassed() -> None:
    from dualpipe.runtime.weightgrad import DeferredGradients

    def run(self, key):
        for entry in self._deferred.pop(key):
            for parameter, gradient in zip(entry.use.trained, entry.gradients(), strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    DeferredGradients.run = run


def weight_gradient_after_the_reduction() -> None:
    from dualpipe.megatron import schedule
    from dualpipe.runtime.weightgrad import DeferredGradients

    late: list[tuple[Any, Any]] = []
    real, run = schedule._finalize, DeferredGradients.run

    def finalize(*args):
        real(*args)
        for store, entries in late:
            store._deferred["late"] = entries
            run(store, "late")
        late.clear()

    DeferredGradients.run = lambda self, key: late.append((self, self._deferred.pop(key)))
    schedule._finalize = finalize


def gradients_rescaled_at_each_accumulation() -> None:
    from dualpipe.megatron.computation import MegatronComputation
    from dualpipe.schedule import W

    real = MegatronComputation.synchronising

    def synchronising(self, op):
        if op.kind is W:
            self.model[op.lane, op.stage][0].scale_gradients(0.5)
        return real(self, op)

    MegatronComputation.synchronising = synchronising


def _microbatches_in_forward_step(count: Callable[[int], int]) -> None:
    from dualpipe.megatron import computation

    real = computation.forward_step

    def forward_step(func, iterator, model, microbatches, *args, **options):
        return real(func, iterator, model, count(microbatches), *args, **options)

    computation.forward_step = forward_step


def not_normalised_by_microbatches() -> None:
    _microbatches_in_forward_step(lambda count: 1)


def normalised_twice() -> None:
    _microbatches_in_forward_step(lambda count: count * count)


def normalised_by_both_lanes() -> None:
    _microbatches_in_forward_step(lambda count: 2 * count)


def gradients_cleared_in_mid_accumulation() -> None:
    from dualpipe.megatron.computation import MegatronComputation
    from dualpipe.schedule import B

    real = MegatronComputation.synchronising

    def synchronising(self, op):
        if op.kind is B and op.mb == 1:
            for parameter in self.model[op.lane, op.stage][0].parameters():
                parameter.main_grad.zero_()
        return real(self, op)

    MegatronComputation.synchronising = synchronising


def losses_read_on_the_first_rank() -> None:
    from dualpipe.megatron import schedule

    schedule.collect_losses = lambda collected, *where: [value for values in collected.values() for value in values]


def losses_cleared_before_they_are_returned() -> None:
    from dualpipe.megatron import schedule

    real = schedule.collect_losses

    def collect_losses(collected, *where):
        for values in collected.values():
            values.clear()
        return real(collected, *where)

    schedule.collect_losses = collect_losses


def dropout_drawn_in_order_of_execution() -> None:
    from dualpipe.megatron.model import ChunkSetup

    ChunkSetup.drawing = lambda self: nullcontext()


def labels_of_the_lanes_swapped() -> None:
    from dualpipe.megatron import schedule

    real = schedule.split_data_iterator

    def split(iterator, chunks):
        data = real(iterator, chunks)
        data._iterators = dict(zip(data._iterators, reversed(data._iterators.values()), strict=True))
        return data

    schedule.split_data_iterator = split if dist.get_rank() else real


def messages_on_the_default_group() -> None:
    from dualpipe.megatron import model

    real = model._transport
    model._transport = lambda groups, device, timeout: real(replace(groups, pipeline=dist.group.WORLD), device, timeout)


def delayed_gradient_overwrites() -> None:
    from dualpipe.megatron import layers

    real = layers._Use.weight_gradients

    def weight_gradients(self, x, dy):
        self.weight.main_grad.zero_()
        return real(self, x, dy)

    layers._Use.weight_gradients = weight_gradients


def mirror_chunk_used_by_the_wrong_lane() -> None:
    from dualpipe.megatron import schedule

    real = schedule.MegatronComputation

    def computation(plan, model, call):
        if dist.get_rank() == plan.ranks // 2:  # a middle rank, whose two chunks look alike
            model = dict(zip(model, reversed(model.values()), strict=True))
        return real(plan, model, call)

    schedule.MegatronComputation = computation


def one_receive_too_many_on_a_middle_rank() -> None:
    from dualpipe.megatron import schedule
    from dualpipe.schedule import RF, Op, Schedule

    real = schedule.schedule_for

    def schedule_for(name, ranks, microbatches, *more):
        made = real(name, ranks, microbatches, *more)
        lane, stage = next((lane, route.index(1)) for lane, route in made.routes.items())
        extra = (Op(RF, lane, stage, microbatches),)
        programs = tuple((extra, *p) if rank == 1 else p for rank, p in enumerate(made.programs))
        return Schedule(made.routes, programs, made.name)

    schedule.schedule_for = schedule_for


def outputs_freed_under_the_backward() -> None:
    from dualpipe.runtime import live

    def edge(output):
        if output.requires_grad and output.dim():
            output.data = torch.empty(1, dtype=output.dtype)
        return torch.autograd.graph.get_gradient_edge(output) if output.requires_grad else None

    live._edge = edge


def gradients_never_finalized() -> None:
    from dualpipe.megatron import schedule

    schedule._finalize = lambda *args: None


def fault(number: int, title: str, plant: Callable[[], None], says: str, case: Case = BASE) -> MegatronFault:
    return MegatronFault(number, title, plant, ("trial, Megatron",), says, case)


UNCLIPPED = replace(BASE, clip=0.0)  # the norm alone is wrong, and nothing that follows from it
TWO_STEPS = replace(BASE, steps=2)
OVERLAPPED = replace(TWO_STEPS, overlap_grad_reduce=True)
FOUR = replace(BASE, pp=4)

FAULTS = [
    fault(11, "W stored and never run", weights_never_run, "gradient of .* differs"),
    fault(12, "a weight counted twice in the W split", layer_counted_twice, "gradient of .*linear_fc1.weight"),
    fault(13, "the split backward bypasses DDP's hooks", hooks_bypassed, "gradient of .*weight .* differs"),
    fault(
        14,
        "a weight gradient arrives after the all-reduce",
        weight_gradient_after_the_reduction,
        "differs between",
        TWO_STEPS,
    ),
    fault(
        15, "the replicas are not reduced together", replicas_not_reduced_together, "differs between ranks", TWO_STEPS
    ),
    fault(15, "the replicas start apart", initial_weights_differ, "differs between ranks"),
    fault(
        15,
        "queries and keys clipped by the logits of one lane",
        logits_of_one_lane,
        "weight of .*linear_q_up_proj",
        replace(BASE, model=Model.DEEPSEEK, dtype="bf16", qk_clip=True),
    ),
    fault(
        15,
        "experts balanced over the tokens of one lane",
        experts_balanced_in_one_lane,
        "gradient of",
        replace(BASE, model=Model.MOE, global_aux_loss=True),
    ),
    fault(16, "the norm counts a parameter twice", norm_counts_both_replicas, "gradient norm", UNCLIPPED),
    fault(
        16,
        "the norm counts every instance of the distributed optimizer",
        norm_counts_every_optimizer_instance,
        "gradient norm",
        replace(UNCLIPPED, dp=2, distributed_optimizer=True, instances=2),
    ),
    fault(17, "the norm of one stage only", norm_of_one_stage_only, "gradient norm", UNCLIPPED),
    fault(18, "gradients rescaled at each accumulation", gradients_rescaled_at_each_accumulation, "gradient of"),
    fault(19, "gradients not normalised by microbatches", not_normalised_by_microbatches, "gradient of"),
    fault(20, "normalised twice", normalised_twice, "gradient of"),
    fault(20, "normalised by the microbatches of both lanes", normalised_by_both_lanes, "gradient of"),
    fault(21, "gradients cleared in mid-accumulation", gradients_cleared_in_mid_accumulation, "gradient of"),
    fault(22, "the loss read on the wrong rank", losses_read_on_the_first_rank, "loss of microbatch .* is missing"),
    fault(
        26,
        "dropout depends on the order of execution",
        dropout_drawn_in_order_of_execution,
        "loss of microbatch|gradient of",
        replace(BASE, dropout=0.1),
    ),
    fault(27, "labels of the two lanes swapped", labels_of_the_lanes_swapped, "loss of microbatch"),
    fault(
        28,
        "a message on the default group",
        messages_on_the_default_group,
        "RuleError: a schedule must run on as many processes as it has ranks",
        replace(BASE, dp=2),
    ),
    fault(30, "a delayed weight gradient overwrites", delayed_gradient_overwrites, "gradient of .*weight"),
    fault(32, "the losses are cleared before they are returned", losses_cleared_before_they_are_returned, "loss of"),
    fault(
        33, "the mirror chunk used by the wrong lane", mirror_chunk_used_by_the_wrong_lane, "loss of|gradient of", FOUR
    ),
    fault(
        34,
        "one receive too many on a middle rank",
        one_receive_too_many_on_a_middle_rank,
        "StepError|DisagreementError",
        replace(FOUR, timeout=3),
    ),
    fault(
        36,
        "freed outputs break the backward's shape check",
        outputs_freed_under_the_backward,
        r"sends \[1\] float32 where the boundary is",
    ),
    fault(37, "the mirror chunk numbered as rank r", mirror_chunk_numbered_as_rank_r, "whose first layer is"),
    fault(38, "gradients never finalized", gradients_never_finalized, "gradient of .* differs"),
    fault(
        38,
        "gradients finalized before the last W, reduction overlapped",
        weight_gradient_after_the_reduction,
        "Communication call has not been issued|differs between ranks",
        OVERLAPPED,
    ),
]
