"""The links of a stage to its neighbours in a recorded step: whether it took what they give plainly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from dualpipe.record.plain.gradients import equal
from dualpipe.schedule import SB, SF, Op, Task

Plainly = Mapping[str, Any]
"""What a rank's file has for one forward."""
ROUNDING = 1e-4
"""How far a sum in another order may be off, relative to its largest element."""


def differences(
    task: Task, found: Plainly, forwards: Mapping[Task, Plainly], foreign: Mapping[Op, bool]
) -> Iterator[tuple[str, str]]:
    """What differs for one microbatch in its links: what it took, and the gradient that its output got.

    Each difference is a ``fault``, ``unknown``, ``outside``, ``near`` or ``alone``.  ``outside``: the tensor may be
    computed outside of any module from the other stage's output.  ``near``: it agrees up to rounding.  ``alone``: the
    other stage could not be run plainly.  None of these three is a fault.  A tensor of another microbatch is always a
    fault, and so is a gradient in place of an activation, or vice versa.  ``found`` is what the own rank of the
    microbatch has, ``forwards`` what all ranks have; ``foreign`` is as for ``compare``.
    """
    before = forwards.get(task._replace(stage=task.stage - 1))
    after = forwards.get(task._replace(stage=task.stage + 1))
    if before is not None and not _ran(before):
        yield "alone", f"microbatch {task.mb} takes what stage {task.stage - 1} returns"
    elif before is not None and not _among(found["took"], before.get("plainly", [])):
        what = f"microbatch {task.mb} does not take what stage {task.stage - 1} returns for it"
        known = _another(found["took"], _tensors(forwards, "returned", task), _tensors(forwards, "input gradients"))
        near = not known and _among(found["took"], before.get("plainly", []), _near)
        which = "near" if near else _which(foreign, Op(SF, task.lane, task.stage - 1, task.mb))
        yield _finding(which, what, known, "is that computed further outside of a module?")
    if not found["ran"]:
        yield "fault", f"no gradient reaches microbatch {task.mb}"
    elif after is not None and not _ran(after):
        yield "alone", f"microbatch {task.mb} takes the gradient that stage {task.stage + 1} has for it"
    elif after is not None and not _among(found["gradients"], after.get("input gradients", [])):
        what = f"microbatch {task.mb} does not take the gradient that stage {task.stage + 1} has for it"
        others = {one: each for one, each in forwards.items() if (one.lane, one.mb) != (task.lane, task.mb)}
        of_others = _tensors(others, "input gradients")  # a residual passes a gradient on from stage to stage
        known = _another(found["gradients"], of_others, _tensors(forwards, "returned"))
        near = not known and _among(found["gradients"], after.get("input gradients", []), _near)
        which = "near" if near else _which(foreign, Op(SB, task.lane, task.stage + 1, task.mb))
        yield _finding(which, what, known, "is the output computed further outside of a module?")


def _finding(which: str, what: str, known: str, question: str) -> tuple[str, str]:
    """A difference of a kind; it is a fault if it is ``known`` what was taken instead."""
    return ("fault", what + known) if known or which == "fault" else (which, f"{what}: {question}")


def _ran(found: Plainly) -> bool:
    """Whether a forward could be run plainly, with the outputs of the recorded step."""
    return "error" not in found and all_equal(found.get("returned", ()), found.get("plainly", ()))


def _which(foreign: Mapping[Op, bool], send: Op) -> str:
    """The kind of difference, if ``send`` delivers another tensor than the one that the stage returned."""
    if send not in foreign:
        return "outside"
    return "fault" if foreign[send] else "unknown"


def all_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(equal, one, other))


def _among(
    taken: Sequence[Tensor | None],
    given: Sequence[Tensor | None],
    alike: Callable[[Tensor, Tensor], bool] = equal,
) -> bool:
    """Whether every taken tensor equals a given one, bitwise or by ``alike``, whatever its shape."""
    flat = [tensor.reshape(-1) for tensor in given if tensor is not None]
    return all(any(alike(tensor.reshape(-1), other) for other in flat) for tensor in taken if tensor is not None)


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same up to rounding."""
    if one.shape != other.shape or not (one.is_floating_point() and other.is_floating_point()):
        return False
    most = float(other.double().abs().max()) if other.numel() else 0.0
    return not one.numel() or float((one.double() - other.double()).abs().max()) <= ROUNDING * most


def _tensors(
    forwards: Mapping[Task, Plainly], which: str, but: Task | None = None
) -> Iterator[tuple[str, Sequence[Tensor | None]]]:
    """The outputs or the input gradients of all forwards but one, each with a description."""
    words = "the output of stage {}" if which == "returned" else "the gradient of the input of stage {}"
    for task, found in forwards.items():
        if task != but:
            lane = "" if len({each.lane for each in forwards}) == 1 else f" of lane {task.lane}"
            yield f"{words.format(task.stage)} for microbatch {task.mb}{lane}", found.get(which, [])


def _another(taken: Sequence[Tensor | None], *of_others: Iterator[tuple[str, Sequence[Tensor | None]]]) -> str:
    """What all tensors are instead, if they are among those of one of the others.  Zeros may be anything."""
    if not any(tensor is not None and bool(tensor.any()) for tensor in taken):
        return ""
    found = (words for others in of_others for words, given in others if _among(taken, given))
    return next((f", but {words}" for words in found), "")
