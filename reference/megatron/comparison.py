"""How a party that trained on Megatron is held against the truth: every loss, gradient, weight and norm, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from reference.comparison import Difference, compare
from reference.megatron.case import Case
from reference.megatron.trace import Place, StepTrace, Tensors

KINDS = ("gradients", "weights", "main_weights")


def differences(
    case: Case, truth: Sequence[StepTrace], found: Sequence[StepTrace], kinds: Sequence[str] = KINDS
) -> list[Difference]:
    """Every tensor that is not ``torch.equal`` to the truth's, in order of step, kind and place.

    ``kinds``: the fields of a trace, besides losses and norms, that the party has to show.
    """
    steps = enumerate(zip(truth, found, strict=True))
    return [d for step, (t, f) in steps for d in _of_step(case, step, t, f, kinds)]


def norm_difference(truth: Sequence[StepTrace], found: Sequence[StepTrace]) -> float:
    """The largest relative difference of a gradient norm from the truth's; 0 where all are equal."""
    return max(
        abs(norm - true) / true
        for step, other in zip(truth, found, strict=True)
        for true in step.norms.values()
        for norm in other.norms.values()
    )


def tensors_compared(truth: Sequence[StepTrace]) -> int:
    """How many tensors a party is compared in."""
    return sum(
        len(step.losses) + sum(len(tensors) for kind in KINDS for tensors in getattr(step, kind).values())
        for step in truth
    )


def _of_step(case: Case, step: int, truth: StepTrace, found: StepTrace, kinds: Sequence[str]) -> Iterator[Difference]:
    last = case.pp - 1
    for microbatch in sorted(truth.losses.keys() | found.losses.keys()):
        where = f"microbatch {microbatch.number} of replica {microbatch.replica}"
        place = partial(Difference, step, "loss", last, where)
        seen = found.losses.get(microbatch, [])
        if len(seen) > 1:
            yield place(None, f"was returned {len(seen)} times")
        (true,) = truth.losses.get(microbatch, [None])
        yield from compare(place, true, seen[0] if seen else None)
    for what in kinds:
        yield from _of_places(
            step, what.replace("_", " ").removesuffix("s"), getattr(truth, what), getattr(found, what)
        )
    yield from _between_replicas(step, found)
    yield from _of_norms(case, step, truth, found)


def _of_places(
    step: int, what: str, truth: Mapping[Place, Tensors], found: Mapping[Place, Tensors]
) -> Iterator[Difference]:
    for place in sorted(truth.keys() | found.keys()):
        true, seen = truth.get(place, {}), found.get(place, {})
        for name in dict.fromkeys([*true, *seen]):
            where = f"{name} (replica {place.replica}, tensor rank {place.tp})"
            yield from compare(partial(Difference, step, what, place.stage, where), true.get(name), seen.get(name))


def _between_replicas(step: int, found: StepTrace) -> Iterator[Difference]:
    """The replicas of a stage against each other, so that this shows even where all are wrong.

    A replica holds the experts of its own rank; that none lacks what it should have is for the truth to tell.
    """
    first: dict[tuple[int, int], dict[str, Tensor]] = {}
    for place in sorted(found.weights):
        reference = first.setdefault((place.stage, place.tp), {})
        for name, weight in found.weights[place].items():
            where = f"{name} (replica {place.replica}, tensor rank {place.tp})"
            told = partial(Difference, step, "weight against the first replica's", place.stage, where)
            yield from compare(told, reference.setdefault(name, weight), weight)


def _of_norms(case: Case, step: int, truth: StepTrace, found: StepTrace) -> Iterator[Difference]:
    """One norm for all ranks, the truth's, and every rank made its optimizer's step."""
    (true,) = set(truth.norms.values())
    for place, norm in found.norms.items():
        if not abs(norm - true) <= case.norm_rounding * true:
            told = f"is {norm:.9g} instead of {true:.9g}, relative difference {abs(norm - true) / true:.1g}"
            yield Difference(step, "gradient norm", place.stage, str(place), None, told)
    if len(set(found.norms.values())) != 1:
        yield Difference(step, "gradient norm", 0, "all ranks", None, "is not one number")
    for place, done in found.done.items():
        if not done:
            yield Difference(step, "optimizer's step", place.stage, str(place), None, "was not made")


def vital_signs(truth: Sequence[StepTrace]) -> list[str]:
    """What shows that something happened at all; a list of complaints, empty when all is well.

    A run in which nothing happens matches, too: every gradient must be finite and not all zero, every weight move at
    every step, and so must the loss.
    """
    complaints = []
    for step, result in enumerate(truth):
        for place, gradients in result.gradients.items():
            for name, gradient in gradients.items():
                if not torch.isfinite(gradient).all():
                    complaints.append(f"step {step}, {place}: the gradient of {name} is not finite")
                elif not gradient.any():
                    complaints.append(f"step {step}, {place}: the gradient of {name} is zero")
        if not all(norm > 0 for norm in result.norms.values()):
            complaints.append(f"step {step}: the gradient norm is not positive")
    for step, (before, after) in enumerate(pairwise(truth), start=1):
        if mean_loss(before) == mean_loss(after):
            complaints.append(f"step {step}: the loss is that of the step before")
        for place, weights in after.weights.items():
            complaints += [
                f"step {step}, {place}: {name} did not move"
                for name, weight in weights.items()
                if torch.equal(weight, before.weights[place][name])
            ]
    return complaints


def mean_loss(step: StepTrace) -> float:
    """The loss per token of all microbatches, in nats."""
    total: Tensor = torch.stack([losses[0] for losses in step.losses.values()]).double().sum(dim=0)
    return float(total[0] / total[1])
