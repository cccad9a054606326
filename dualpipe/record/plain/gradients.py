"""How a program's gradient of a parameter relates to the gradients of the single microbatches in the plain run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dualpipe.record.child.replay import along
from dualpipe.record.plain.changes import describe
from dualpipe.record.plain.proportions import NEAR, are_one, story, usual_of
from dualpipe.record.plain.stretches import stretch_of
from dualpipe.schedule import Lane, Op, W

_MOST = 256
"""The most microbatches for which factors are determined."""

Name = tuple[Lane, int]
"""A microbatch: its lane, and its number there."""


class Line(NamedTuple):
    """An op, and the line of the program that runs it."""

    op: Op
    place: str


class Agreement(NamedTuple):
    """How a gradient agrees with the sum of its microbatches' gradients.

    ``how`` describes the agreement.  ``summed`` says whether the sum is over both lanes; ``None`` if there is one lane.
    ``divided_by`` is the number of microbatches or replicas by which the sum is divided.  ``scale`` is any other
    factor, such as that of clipping.  ``factor``, of the gradients of several parameters, is both together, ``None`` if
    none of them shows it.  ``pipelines`` is the number of pipelines over which the sum is, ``copies`` the parameters
    that are tied to one of an earlier stage.  ``squares`` is the sum of the squares of all elements, for gradients of
    which each replica holds a shard.
    """

    how: str
    summed: bool | None = None
    scale: float = 1.0
    divided_by: int = 1
    factor: float | None = None
    pipelines: int = 1
    copies: frozenset[int] = frozenset()
    squares: float | None = None

    def also(self, how: str) -> Agreement:
        """This agreement, with more to say of it."""
        return self._replace(how=", ".join(filter(None, (self.how, how))))


@dataclass(frozen=True)
class Parts:
    """The gradients of a parameter by microbatch: those of its own lane, and those of its replica on the other lane.

    ``before`` is the gradient before the step, if there was one, ``other_before`` that of the replica, and ``weight``
    the value of the parameter.  If the plain run did not compute gradients, ``slopes`` has derivatives instead, along a
    direction that the parameter's ``number`` determines.
    """

    number: int
    lane: Lane
    own: Mapping[int, Tensor | None]
    other: Mapping[int, Tensor | None] | None
    before: Tensor | None
    slopes: Mapping[int, float]
    other_slopes: Mapping[int, float]
    weight: Tensor | None = None
    other_before: Tensor | None = None

    def total(self, final: Tensor | None, of_other: bool = False) -> Tensor | None:
        """The sum in microbatch order, in the dtype that the program keeps."""
        total = self.other_before if of_other else self.before
        for _, gradient in sorted(((self.other or {}) if of_other else self.own).items()):
            if gradient is not None:
                total = added(total, gradient if final is None else gradient.to(final.dtype))
        return total

    def earlier(self) -> list[Tensor]:
        """The gradients before the step."""
        return [each for each in (self.before, self.other_before) if each is not None]

    def columns(self) -> list[tuple[Name, Tensor]]:
        """Every gradient with its microbatch."""
        far = next(lane for lane in Lane if lane is not self.lane)
        both = ((self.lane, self.own), (far, self.other or {}))
        return [((lane, mb), g) for lane, each in both for mb, g in sorted(each.items()) if g is not None]


def factors_of(final: Tensor | None, parts: Parts) -> dict[Name, float] | None:
    """Factors with which the gradients of the microbatches add up to ``final``, if they can be determined."""
    return None if final is None or parts.earlier() else _factors(final, parts.columns())


def scale_of(final: Tensor | None, parts: Parts) -> float | None:
    """The factor that most microbatches have in ``final``, if it can be determined."""
    earlier = [((parts.lane, -1 - number), each) for number, each in enumerate(parts.earlier())]
    factors = None if final is None else _factors(final, [*parts.columns(), *earlier])
    known = [factor for (_, mb), factor in (factors or {}).items() if mb >= 0]
    return usual_of(known) if any(known) else None


def totals_of(final: Tensor | None, parts: Parts, counts: Sequence[int]) -> Iterator[tuple[Tensor, bool, int]]:
    """The totals that a gradient may be: each with whether it is of both lanes, and by what it is divided."""
    own = parts.total(final)
    both = None if parts.other is None else added(own, parts.total(final, of_other=True))
    for total, over_both in ((own, False), (both, True)):
        for count in (1, *counts) if total is not None else ():
            assert total is not None
            yield total / count if count > 1 else total, over_both, count


def agreement(
    final: Tensor | None,
    parts: Parts,
    counts: Sequence[int],
    scales: Sequence[float] = (),
    patterns: Sequence[Mapping[Name, float]] = (),
    line: Callable[[int], Line | None] = lambda mb: None,
    limits: Callable[[], Sequence[float]] = tuple,
) -> Agreement | str:
    """How a gradient agrees with its microbatches' own, or what differs.

    ``counts`` are numbers by which a program may divide gradients, ``scales`` are factors that it has applied to other
    gradients.  ``patterns`` are the factors of the microbatches in other gradients: those of a small parameter cannot
    be determined.  ``line`` gives the line of the program that runs a microbatch's W.  ``limits`` returns those
    to which values of other gradients are clipped.
    """
    if parts.slopes:
        return _by_slope(final, parts, counts)
    own = parts.total(final)
    far = parts.total(final, of_other=True)
    both = None if parts.other is None else added(own, far)
    if own is None:
        nothing = final is None or not bool(final.any())
        return Agreement("") if nothing else "there is a gradient, but the plain run has none"
    if final is None:
        return "no gradient, but the plain run has one: are weight gradients put into the store, and run from it?"
    if both is not None and not any(bool(each.any()) for each in (final, own, both)):
        return Agreement("")  # a gradient of zero fits every reading
    for total, over_both in ((own, False), (both, True)):
        if total is None:
            continue
        if equal(final, total):
            return Agreement("summed over both lanes" if over_both else "", None if both is None else over_both)
        for count in counts:
            if equal(final, total / count) or equal(final, total * (1 / count)):
                lanes = "summed over both lanes and " if over_both else ""
                return Agreement(f"{lanes}divided by {count}", None if both is None else over_both, 1.0, count)
    if not bool(final.any()) and bool(own.any()):
        return (
            "the gradient is zero, but not in the plain run: are weight gradients put into the store, and run from it?"
        )
    if final.shape != own.shape:
        return f"the gradient has the shape {list(final.shape)} and not {list(own.shape)}"
    for total, over_both in ((own, False), (both, True)):
        for scale in scales if total is not None else ():
            if total is not None and _is_near(final, total.double() * scale):
                factors, summed = dict.fromkeys(parts.own, scale), None if both is None else over_both
                return _scaled(factors, "summed over both lanes and " * over_both, summed, counts)
    for total, over_both, count in totals_of(final, parts, counts):
        if changed := describe(final, total, parts.weight, limits()):
            lanes = "summed over both lanes, " * over_both + f"divided by {count}, " * (count > 1)
            return Agreement(f"{lanes}{changed}", None if both is None else over_both, 1.0, count)
    return _by_factors(final, parts, both is not None, counts, patterns, line) or _size_of(final, own, both)


def _is_near(one: Tensor, other: Tensor) -> bool:
    return float((one.double() - other.double()).abs().max()) <= 1e-4 * float(other.double().abs().max())


def _size_of(final: Tensor, own: Tensor, both: Tensor | None) -> str:
    most = min(float((final.double() - total.double()).abs().max()) for total in (own, both) if total is not None)
    return f"the gradient differs by up to {most:.3g}"


# a gradient as a sum of the microbatches' gradients, each times a factor


def _by_factors(
    final: Tensor,
    parts: Parts,
    two_lanes: bool,
    counts: Sequence[int],
    patterns: Sequence[Mapping[Name, float]],
    line: Callable[[int], Line | None],
) -> Agreement | str:
    """Describe a gradient as a sum of factors times the microbatches' gradients; empty if it is not such a sum."""
    columns = parts.columns()
    factors = factors_of(final, parts) or next(
        (dict(pattern) for pattern in patterns if not parts.earlier() and _fits(final, columns, pattern)), None
    )
    if factors is None:
        factors = _of_stretch(final, columns, parts)
    if factors is None:
        return ""
    own = {mb: factors[parts.lane, mb] for lane, mb in factors if lane is parts.lane}
    far = {mb: factor for (lane, mb), factor in factors.items() if lane is not parts.lane}
    if are_one([*factors.values()]):
        lanes = "summed over both lanes and " if two_lanes else ""
        return _scaled(own, lanes, True if two_lanes else None, counts)
    if far and are_one([*own.values()]) and not any(far.values()):
        return _scaled(own, "", False, counts)
    unusual = [mb for mb, factor in own.items() if abs(factor - usual_of([*factors.values()])) > NEAR * abs(factor)]
    at = line(unusual[-1]) if unusual else None
    return story(parts.lane, own, far, at is not None and at.op.kind is W) + (
        f" {at.op} is at {at.place}" if at else ""
    )


def _of_stretch(final: Tensor, columns: Sequence[tuple[Name, Tensor]], parts: Parts) -> dict[Name, float] | None:
    """The factors of a gradient of few elements that is the sum over consecutive microbatches."""
    if parts.earlier() or len(columns) > _MOST or any(g.shape != final.shape for _, g in columns):
        return None
    names = [[name for name, _ in columns if (name[0] is parts.lane) == is_own] for is_own in (True, False)]
    given = dict(columns)
    found = stretch_of(final, *([given[name] for name in each] for each in names))
    return (
        None
        if found is None
        else {n: f for each, of in zip(names, found, strict=True) for n, f in zip(each, of, strict=True)}
    )


def _fits(final: Tensor, columns: Sequence[tuple[Name, Tensor]], factors: Mapping[Name, float]) -> bool:
    """Whether a gradient is the sum with these factors."""
    if not columns or any(name not in factors for name, _ in columns):
        return False
    return _is_near(final, torch.stack([factors[name] * g.double() for name, g in columns]).sum(0))


def _scaled(factors: Mapping[int, float], lanes: str, summed: bool | None, counts: Sequence[int]) -> Agreement:
    scale = sum(factors.values()) / len(factors)
    for count in counts:
        if abs(scale * count - 1) <= NEAR:
            return Agreement(f"{lanes}divided by {count}, up to rounding", summed, 1.0, count)
    if abs(scale - 1) <= NEAR:
        return Agreement(f"{'summed over both lanes, ' * bool(lanes)}equal up to rounding", summed)
    return Agreement(f"{lanes}scaled by {scale:.4g}, up to rounding", summed, scale)


def _factors(final: Tensor, columns: Sequence[tuple[Name, Tensor]]) -> dict[Name, float] | None:
    """The factor of every microbatch; ``None`` if no factors give the gradient, or if several do."""
    if not columns or len(columns) > _MOST or final.numel() < 2 * len(columns) + 2:
        return None
    matrix = torch.stack([gradient.double().reshape(-1) for _, gradient in columns], dim=1)
    wanted = final.double().reshape(-1)
    if not (bool(matrix.isfinite().all()) and bool(wanted.isfinite().all())):
        return None
    if int(torch.linalg.matrix_rank(matrix, rtol=1e-6)) < len(columns):
        return None
    found = torch.linalg.lstsq(matrix, wanted).solution
    if float((matrix @ found - wanted).abs().max()) > 1e-4 * float(wanted.abs().max()):
        return None
    largest = float(found.abs().max())
    return {name: _rounded(float(factor), largest) for (name, _), factor in zip(columns, found, strict=True)}


def _rounded(factor: float, largest: float) -> float:
    return 0.0 if abs(factor) < NEAR * largest else factor


def with_earlier(found: Agreement, parts: Parts, step: int) -> Agreement | str:
    """The agreement of a gradient that may have been something else than zero before the step, or what is wrong."""
    far = next(lane for lane in Lane if lane is not parts.lane)
    lanes = [parts.lane] * (parts.before is not None) + [far] * (parts.other_before is not None and bool(found.summed))
    if not lanes:
        return found
    if step == 1:
        return found.also("added to what was there before the step")
    of = f"of lane {' and of lane '.join(lanes)} " if found.summed else ""
    return f"the gradient includes that {of}of an earlier step: is it set to zero or None after the optimizer's step?"


# a gradient of which only the slope is known


def _by_slope(final: Tensor | None, parts: Parts, counts: Sequence[int]) -> Agreement | str:
    """How a gradient agrees with the sum of slopes: of its own lane, or of both."""
    own = sum(parts.slopes.values())
    if final is None or not bool(final.any()):
        return (
            "no gradient, but the plain run has one: are weight gradients put into the store, and run from it?"
            if own
            else (Agreement(""))
        )
    found = along(final, parts.number)
    close = 1e-3 * max(abs(own), 1e-3 * float(final.double().norm()))
    sums: Iterator[tuple[float, bool]] = iter([(own, False), (own + sum(parts.other_slopes.values()), True)])
    for total, over_both in sums if parts.other is not None else [(own, False)]:
        for count in (1, *counts):
            if abs(found * count - total) <= close * count:
                lanes = ["summed over both lanes"] if over_both else []
                how = [*lanes, *([f"divided by {count}"] if count > 1 else []), "compared with slopes, not bit by bit"]
                shown = " and ".join(how[:-1]) + ", " * (len(how) > 1) + how[-1]
                return Agreement(shown, None if parts.other is None else over_both, divided_by=count)
    return f"the slope along the gradient is {found:.4g}, and the module's is {own:.4g}"


def added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def sum_of(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The sum in order; ``None`` if there is nothing to add, or if the shapes differ."""
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(there).sum(0) if there and len({tensor.shape for tensor in there}) == 1 else None


def equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors have the same shape and, bit by bit, the same values in the first one's dtype."""
    if one is None or other is None or one.shape != other.shape:
        return False
    other = other.to(one.dtype)
    one, other = (one, other) if one.dim() else (one.reshape(1), other.reshape(1))
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
