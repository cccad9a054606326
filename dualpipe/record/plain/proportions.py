"""The factors with which microbatches are in a gradient: which are the same, which one is usual, all in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from dualpipe.schedule import Lane

NEAR = 1e-3
"""Up to this difference, relative to the largest one, two factors are the same: gradients are rounded."""
_TIMES = {"1": "once", "2": "twice"}


def are_one(factors: Sequence[float]) -> bool:
    """Whether the factors are equal up to rounding, and positive."""
    return bool(factors) and max(factors) - min(factors) <= NEAR * abs(max(factors)) and max(factors) > 0


def alike(factors: Sequence[float]) -> bool:
    """Whether factors are the same up to rounding, and not zero."""
    return all(abs(factor - factors[0]) <= NEAR * abs(factors[0]) and factor for factor in factors)


def story(lane: Lane, own: Mapping[int, float], far: Mapping[int, float], ran: bool = False) -> str:
    """The factors in words, with what usually causes them.

    ``ran`` is whether the weight gradient was run that has an unusual factor.
    """
    other = next(each for each in Lane if each is not lane)
    most = max([*own.values(), *far.values()], key=abs)
    usual = usual_of([*own.values(), *far.values()])
    lacking = [mb for mb, factor in own.items() if not factor]
    lacking_far = [mb for mb, factor in far.items() if not factor]
    if far and len(lacking_far) == len(far):
        rest, lacking_far, far = " and is not summed over both lanes", [], {}
    else:
        rest = ""
    if not any(own.values()):
        return (
            f"the gradient has nothing of lane {lane}"
            f"{'' if are_one([*far.values()]) else f', and of lane {other} {_listed(far, most)}'}: "
            "are weight gradients put into the store, and run from it?"
        )
    words = [f"microbatch{'es' * (len(lacking) > 1)} {_numbers(lacking)}"] if lacking else []
    if lacking_far:
        words.append(f"microbatch{'es' * (len(lacking_far) > 1)} {_numbers(lacking_far)} of lane {other}")
    lacks = f"lacks {' and '.join(words)}" if words else ""
    if lacks and all(abs(factor - usual) <= NEAR * abs(usual) for factor in (*own.values(), *far.values()) if factor):
        return f"the gradient {lacks}{rest}{_asked(_cause(own, lacking, ran))}"
    there, there_far = ({mb: factor for mb, factor in each.items() if factor} for each in (own, far))
    has = "has " + _listed(there, usual) + (f", and of lane {other} {_listed(there_far, usual)}" if there_far else "")
    if lacks and _is_rescaled(own) and _is_rescaled(far or own):
        lacks, causes = lacks.replace("lacks", "has nearly nothing of", 1), [_RESCALED]
    else:
        causes = [*([_cause(own, lacking, ran)] if lacks else []), _cause_of_factors(own)]
    return f"the gradient {f'{lacks}, and ' if lacks else ''}{has}{rest}{_asked(*causes)}"


def _asked(*causes: str) -> str:
    """The questions for the causes that are known, the first one after a colon."""
    first, *others = [*filter(None, causes), ""]
    return "".join([f": {first}" if first else "", *(f" {each[0].upper()}{each[1:]}" for each in others if each)])


def usual_of(factors: Sequence[float]) -> float:
    """The factor that most microbatches have, or else the largest one; or half of that, if the others are that."""
    nonzero = [factor for factor in factors if factor]
    least, most = min(nonzero, key=abs), max(nonzero, key=abs)
    if all(abs(one - least) <= NEAR * abs(least) or abs(one - 2 * least) <= NEAR * abs(one) for one in nonzero):
        of_most = sum(abs(one - most) <= NEAR * abs(most) for one in nonzero)
        return most if 2 * of_most > len(nonzero) else least
    return max(nonzero, key=lambda one: (sum(abs(one - other) <= NEAR * abs(one) for other in nonzero), one))


def _listed(factors: Mapping[int, float], unit: float) -> str:
    """``microbatches 0 1 once and microbatch 2 twice``."""
    groups: dict[str, list[int]] = {}
    for mb, factor in factors.items():
        groups.setdefault(f"{factor / unit:.3g}", []).append(mb)
    return " and ".join(
        f"microbatch{'es' * (len(mbs) > 1)} {_numbers(mbs)} {_TIMES.get(times, f'{times} times')}"
        for times, mbs in groups.items()
    )


def _numbers(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _cause(own: Mapping[int, float], lacking: Sequence[int], ran: bool) -> str:
    order = sorted(own)
    if not lacking:
        return "is it reduced over the lanes before the other rank's last weight gradient?"
    first = next((at for at, mb in enumerate(order) if mb not in lacking), len(order))
    rest = [mb for mb in lacking if mb not in order[:first]]
    causes = ["set to zero or None, or replaced, in the middle of the step"] * bool(first)
    if rest and ran:
        causes.append(
            "used before that weight gradient runs, or is that added to another tensor than the one that is used, as "
            "to .grad beside main_grad"
        )
    elif rest and rest == order[-len(rest) :]:
        causes.append("finalized or used before the last weight gradients, or are these never run")
    elif rest:
        causes.append("without a weight gradient that is stored and never run")
    return f"is it {', or '.join(causes)}?"


_RESCALED = "is the sum so far rescaled whenever a gradient is added?"


def _is_rescaled(own: Mapping[int, float]) -> bool:
    """Whether each factor is the same multiple of the next one.

    The first ones may be too small to be seen.
    """
    values = [own[mb] for mb in sorted(own)]
    seen = next((at for at, value in enumerate(values) if value), len(values))
    steps = [one / two for one, two in pairwise(values[seen:]) if two]
    if not steps or len(steps) < len(values) - seen - 1 or not are_one(steps) or abs(steps[0] - 1) <= NEAR:
        return False
    return not seen or steps[0] * values[seen] <= 2 * NEAR * max(values)


def _cause_of_factors(own: Mapping[int, float]) -> str:
    if _is_rescaled(own):
        return _RESCALED
    values = own.values()
    if any(factor > 1.5 * min(filter(None, values), default=factor) for factor in values):
        return "is a weight gradient run twice, or added by the backward as well?"
    return ""
