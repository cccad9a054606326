"""The links of a stage to its neighbours in a recorded step: whether it took what they give plainly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualpipe.record.plain.gradients import equal
from dualpipe.schedule import SB, SF, Op, Task

Plainly = Mapping[str, Any]
"""What a rank's file has for one forward."""
ROUNDING = 1e-4
"""How far a sum in another order may be off, relative to its largest element."""
_NARROW = (torch.bfloat16, torch.float16)
_Tensors = Sequence[Tensor | None]


class Difference(NamedTuple):
    """How a link is not bitwise equal.

    ``which`` is ``fault``; ``unknown`` for a tensor that could not be related to those of the other stage; ``near`` if
    it agrees up to rounding, ``narrow`` if it agrees after a cast to a narrower type, as for the message alone, and
    ``scaled`` if it is ``factor`` times what the other stage has.
    """

    which: str
    what: str = ""
    factor: float = 1.0


def differences(
    task: Task,
    found: Plainly,
    forwards: Mapping[Task, Plainly],
    foreign: Mapping[Op, bool],
    places: Mapping[Op, str] | None = None,
) -> Iterator[Difference]:
    """What differs for one microbatch in its links: what it took, and the gradient that its output got.

    A stage takes the input of its module, or the leaf from which the program computes that; it gives the output of its
    module, or the tensor from which its backward runs.  Gradients are those of the same tensors.  So what a program
    computes further outside of a module is compared at the ends of its graph.  A tensor of another microbatch is always
    a fault, and so is a gradient in place of an activation, or vice versa.  ``found`` is what the own rank of the
    microbatch has, ``forwards`` what all ranks have; ``foreign`` and ``places`` are as for ``compare``.
    """
    before = forwards.get(task._replace(stage=task.stage - 1))
    after = forwards.get(task._replace(stage=task.stage + 1))
    if before is not None and not _ran(before):
        yield Difference("alone", f"microbatch {task.mb} takes what stage {task.stage - 1} returns")
    elif before is not None:
        what = f"microbatch {task.mb} does not take what stage {task.stage - 1} returns for it"
        taken = [found["took"], [value for value, _ in found.get("leaves", ())]]
        given = [*before.get("plainly", ()), *(value for value, _ in before.get("roots", ()))]
        if difference := _agreement(taken, given):
            others = [*_tensors(forwards, "returned", task), *_tensors(forwards, "input gradients")]
            known = _another(taken, others) if difference.which == "unknown" else ""
            yield _described(difference, what, known, foreign, Op(SF, task.lane, task.stage - 1, task.mb))
    if not found.get("needs gradient", True):
        return  # nothing in this stage or before it is trained
    if not found["ran"]:
        yield Difference("fault", f"no gradient reaches microbatch {task.mb}")
    elif after is not None and not _ran(after):
        yield Difference("alone", f"microbatch {task.mb} takes the gradient that stage {task.stage + 1} has for it")
    elif after is not None:
        yield from _of_gradient(task, found, after, forwards, foreign, places or {})


def _ran(found: Plainly) -> bool:
    """Whether a forward could be run plainly, with the outputs of the recorded step."""
    return "error" not in found and all_equal(found.get("returned", ()), found.get("plainly", ()))


def _of_gradient(
    task: Task,
    found: Plainly,
    after: Plainly,
    forwards: Mapping[Task, Plainly],
    foreign: Mapping[Op, bool],
    places: Mapping[Op, str],
) -> Iterator[Difference]:
    what = f"microbatch {task.mb} does not take the gradient that stage {task.stage + 1} has for it"
    send = Op(SB, task.lane, task.stage + 1, task.mb)
    parts = [parts for _, parts in after.get("leaves", ())]
    taken = [found["gradients"], [gradient for _, gradient in found.get("roots", ())]]
    given = [*after.get("input gradients", ()), *(_sum(each) for each in parts if each)]
    difference = _agreement(taken, given, scaled=True)
    if difference is None:
        return
    if difference.which in ("unknown", "scaled") and (early := _early(taken, parts)):
        have, add = early
        at = f", {send} at {places[send]}" if send in places else ""
        yield Difference(
            "fault",
            f"microbatch {task.mb} takes only a part of the gradient that stage {task.stage + 1} has for it{at}: what "
            f"the backward at {have} gives, without that of the backward at {add}; send it after the last backward",
        )
        return
    own = task.lane, task.mb  # a residual passes a gradient on from stage to stage
    of_others = {one: each for one, each in forwards.items() if (one.lane, one.mb) != own}
    others = [*_tensors(of_others, "input gradients"), *_tensors(forwards, "returned")]
    others.append((f"the gradient of the output of stage {task.stage + 1}", after.get("gradients", [])))
    known = _another(taken, others) if difference.which in ("unknown", "scaled") else ""
    yield _described(difference, what, known, foreign, send)


def _described(difference: Difference, what: str, known: str, foreign: Mapping[Op, bool], send: Op) -> Difference:
    """The difference in words.  It is a fault if the tensor is ``known`` as another's, or the send is of another."""
    if known or (difference.which in ("unknown", "scaled") and foreign.get(send)):
        return Difference("fault", what + known)
    return difference._replace(what=what)


def _agreement(takens: Sequence[_Tensors], given: _Tensors, scaled: bool = False) -> Difference | None:
    """How what a stage takes, one list or the other, agrees with what it is given; ``None`` if bitwise."""
    present = [taken for taken in takens if any(tensor is not None for tensor in taken)]
    for which, alike in (("", equal), ("narrow", _narrowed), ("near", near)):
        if any(_among(taken, given, alike) for taken in present):
            return Difference(which) if which else None
    for taken in present if scaled else ():
        factor = _factor(taken, given)
        if factor is not None:
            return Difference("scaled", factor=factor)
    return Difference("unknown")


def _early(takens: Sequence[_Tensors], leaves: Sequence[Sequence[tuple[str, Tensor]]]) -> tuple[str, str] | None:
    """The lines of two backwards, if what is taken has the gradient of the first one and not that of the second."""
    for parts in leaves:
        sums = list(accumulate(part for _, part in parts))[:-1]
        for at, partial in enumerate(sums):
            if any(_are(taken, partial) for taken in takens):
                return parts[at][0], parts[at + 1][0]
        for at, (line, part) in enumerate(parts[1:], start=1):
            if any(_are(taken, part) for taken in takens):
                return line, parts[at - 1][0]
    return None


def _are(taken: _Tensors, partial: Tensor) -> bool:
    present = [tensor for tensor in taken if tensor is not None]
    return bool(present) and any(_among(present, [partial], alike) for alike in (equal, _narrowed, near))


def _sum(parts: Sequence[tuple[str, Tensor]]) -> Tensor:
    *_, total = accumulate(part for _, part in parts)
    return total


def all_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(equal, one, other))


def _among(taken: _Tensors, given: _Tensors, alike: Callable[[Tensor, Tensor], bool] = equal) -> bool:
    """Whether every taken tensor equals a given one, bitwise or by ``alike``, whatever its shape."""
    flat = [tensor.reshape(-1) for tensor in given if tensor is not None]
    return all(any(alike(tensor.reshape(-1), other) for other in flat) for tensor in taken if tensor is not None)


def _narrowed(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor is bitwise the other one after a cast to a narrower type and back."""
    if not (one.is_floating_point() and other.is_floating_point()):
        return False
    return any(equal(one, other.to(narrow).to(one.dtype)) for narrow in _NARROW)


def near(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same up to rounding."""
    if one.shape != other.shape or not (one.is_floating_point() and other.is_floating_point()):
        return False
    most = float(other.double().abs().max()) if other.numel() else 0.0
    return not one.numel() or float((one.double() - other.double()).abs().max()) <= ROUNDING * most


def _factor(taken: _Tensors, given: _Tensors) -> float | None:
    """The number by which all taken tensors are given ones times it, up to rounding, if there is one."""
    found: list[float] = []
    for tensor in taken:
        if tensor is None or not bool(tensor.any()):
            continue
        one = tensor.double().reshape(-1)
        for other in given:
            if other is None or other.numel() != one.numel() or not bool(other.any()):
                continue
            whole = other.double().reshape(-1)
            factor = float(one @ whole / (whole @ whole))
            if float((one - factor * whole).abs().max()) <= ROUNDING * float(one.abs().max()):
                found.append(factor)
                break
        else:
            return None
    if not found or max(found) - min(found) > 10 * ROUNDING * abs(found[0]):
        return None
    return found[0]


def _tensors(forwards: Mapping[Task, Plainly], which: str, but: Task | None = None) -> Iterator[tuple[str, _Tensors]]:
    """The outputs or the input gradients of all forwards but one, each with a description."""
    words = "the output of stage {}" if which == "returned" else "the gradient of the input of stage {}"
    for task, found in forwards.items():
        if task != but:
            lane = "" if len({each.lane for each in forwards}) == 1 else f" of lane {task.lane}"
            yield f"{words.format(task.stage)} for microbatch {task.mb}{lane}", found.get(which, [])


def _another(takens: Sequence[_Tensors], of_others: Sequence[tuple[str, _Tensors]]) -> str:
    """What the tensors of a list are instead, if they are among those of one of the others.  Zeros may be anything."""
    for taken in takens:
        if any(tensor is not None and bool(tensor.any()) for tensor in taken):
            for words, given in of_others:
                if _among(taken, given):
                    return f", but {words}"
    return ""
