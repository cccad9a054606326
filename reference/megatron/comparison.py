"""Compares an implementation with the ground truth bitwise: every loss, gradient, weight and norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from reference.comparison import Difference, compare
from reference.megatron.case import Case
from reference.megatron.trace import Shard, StepTrace, Tensors

_BALANCED = "router.expert_bias"
"""A weight that stays as it is if all experts got as many tokens."""
KINDS = ("gradients", "weights", "main_weights")


def differences(
    case: Case,
    truth: Sequence[StepTrace],
    found: Sequence[StepTrace],
    kinds: Sequence[str] = KINDS,
    norm_rounding: float = 0.0,
) -> list[Difference]:
    """Every tensor that is not ``torch.equal`` to the truth's, in order of step, kind and shard.

    ``kinds``: the fields of a trace, besides losses and norms, that the implementation must have recorded.
    ``norm_rounding``: the largest relative difference of a gradient norm that counts as equal.
    """
    steps = enumerate(zip(truth, found, strict=True))
    return [d for step, (t, f) in steps for d in _of_step(case, step, t, f, kinds, norm_rounding)]


def norm_difference(truth: Sequence[StepTrace], found: Sequence[StepTrace]) -> float:
    """The largest relative difference of a gradient norm from the truth's; 0 if all are equal."""
    return max(
        abs(norm - true) / true
        for step, other in zip(truth, found, strict=True)
        for true in step.norms.values()
        for norm in other.norms.values()
    )


def tensors_compared(truth: Sequence[StepTrace]) -> int:
    """The number of tensors that are compared."""
    return sum(
        len(step.losses) + sum(len(tensors) for kind in KINDS for tensors in getattr(step, kind).values())
        for step in truth
    )


def _of_step(
    case: Case, step: int, truth: StepTrace, found: StepTrace, kinds: Sequence[str], norm_rounding: float
) -> Iterator[Difference]:
    last = case.stages - 1
    for microbatch in sorted(truth.losses.keys() | found.losses.keys()):
        where = f"microbatch {microbatch.number} of replica {microbatch.replica}"
        at = partial(Difference, step, "loss", last, where)
        seen = found.losses.get(microbatch, [])
        if len(seen) > 1:
            yield at(None, f"was returned {len(seen)} times")
        (true,) = truth.losses.get(microbatch, [None])
        yield from compare(at, true, seen[0] if seen else None)
    for what in kinds:
        yield from _of_shards(
            step, what.replace("_", " ").removesuffix("s"), getattr(truth, what), getattr(found, what)
        )
    yield from _between_replicas(step, found)
    yield from _of_norms(step, truth, found, norm_rounding)


def _of_shards(
    step: int, what: str, truth: Mapping[Shard, Tensors], found: Mapping[Shard, Tensors]
) -> Iterator[Difference]:
    for shard in sorted(truth.keys() | found.keys()):
        true, seen = truth.get(shard, {}), found.get(shard, {})
        for name in dict.fromkeys([*true, *seen]):
            at = partial(Difference, step, what, shard.stage, shard.locate(name))
            yield from compare(at, true.get(name), seen.get(name))


def _between_replicas(step: int, found: StepTrace) -> Iterator[Difference]:
    """Compare the replicas of a stage with each other, so that differences show even if all are wrong.

    A replica holds only the experts of its own rank; the comparison with the truth finds missing ones.
    """
    first: dict[tuple[int, int], dict[str, Tensor]] = {}
    for shard in sorted(found.weights):
        reference = first.setdefault((shard.stage, shard.tp), {})
        for name, weight in found.weights[shard].items():
            at = partial(Difference, step, "weight against the first replica's", shard.stage, shard.locate(name))
            yield from compare(at, reference.setdefault(name, weight), weight)


def _of_norms(step: int, truth: StepTrace, found: StepTrace, rounding: float) -> Iterator[Difference]:
    """Check that all ranks have the truth's gradient norm and made the optimizer's step."""
    (true,) = set(truth.norms.values())
    for shard, norm in found.norms.items():
        if not abs(norm - true) <= rounding * true:
            detail = f"is {norm:.9g} instead of {true:.9g}, relative difference {abs(norm - true) / true:.1g}"
            yield Difference(step, "gradient norm", shard.stage, str(shard), None, detail)
    if len(set(found.norms.values())) != 1:
        yield Difference(step, "gradient norm", 0, "all ranks", None, "is not one number")
    for shard, done in found.done.items():
        if not done:
            yield Difference(step, "optimizer's step", shard.stage, str(shard), None, "was not made")


def failed_sanity_checks(case: Case, truth: Sequence[StepTrace]) -> list[str]:
    """Describe where the ground truth itself did not train; empty if it did.

    Otherwise two runs in which nothing happens would be equal.  Every gradient must be finite and not all zero, and
    every weight and the loss must change at every step.
    """
    complaints = []
    for step, result in enumerate(truth):
        for shard, gradients in result.gradients.items():
            for name, gradient in gradients.items():
                if not torch.isfinite(gradient).all():
                    complaints.append(f"step {step}, {shard}: the gradient of {name} is not finite")
                elif not gradient.any() and name != case.unused_weight:
                    complaints.append(f"step {step}, {shard}: the gradient of {name} is zero")
        if not all(norm > 0 for norm in result.norms.values()):
            complaints.append(f"step {step}: the gradient norm is not positive")
        complaints += [
            f"step {step}, {shard}: no attention logit is above {case.qk_threshold}, so nothing is clipped"
            for shard, largest in result.logits.items()
            if largest <= case.qk_threshold
        ]
    for step, (before, after) in enumerate(pairwise(truth), start=1):
        if mean_loss(before) == mean_loss(after):
            complaints.append(f"step {step}: the loss did not change")
        for shard, weights in after.weights.items():
            complaints += [
                f"step {step}, {shard}: {name} did not change"
                for name, weight in weights.items()
                if torch.equal(weight, before.weights[shard][name]) and not name.endswith(_BALANCED)
            ]
    return complaints


def mean_loss(step: StepTrace) -> float:
    """The mean loss per token over all microbatches, in nats."""
    total: Tensor = torch.stack([losses[0] for losses in step.losses.values()]).double().sum(dim=0)
    return float(total[0] / total[1])
