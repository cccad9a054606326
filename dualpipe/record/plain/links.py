"""The links of a stage to its neighbours in a recorded step: whether it took what they give plainly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from dualpipe.record.plain.gradients import equal
from dualpipe.schedule import SB, SF, Op, Task

Plainly = Mapping[str, Any]
"""What a rank's file has for one forward."""


def differences(
    task: Task, found: Plainly, forwards: Mapping[Task, Plainly], foreign: Mapping[Op, bool]
) -> Iterator[tuple[str, str]]:
    """What differs for one microbatch in its links: what it took, and the gradient that its output got.

    Each difference is a ``fault``, ``unknown``, or ``outside``: the tensor may be computed outside of any module from
    the other stage's output, which is not a fault.  A tensor that some stage returns for another microbatch is always a
    fault.  ``found`` is what the microbatch's own rank has, ``forwards`` what all ranks have; ``foreign`` is as for
    ``compare``.
    """
    before = forwards.get(task._replace(stage=task.stage - 1))
    after = forwards.get(task._replace(stage=task.stage + 1))
    if before is not None and not _among(found["took"], before.get("plainly", [])):
        what = f"microbatch {task.mb} does not take what stage {task.stage - 1} returns for it"
        known = _another(found["took"], (each.get("returned", []) for each in forwards.values()))
        which = "fault" if known else _which(foreign, Op(SF, task.lane, task.stage - 1, task.mb))
        yield which, what if which == "fault" else f"{what}: is that computed further outside of a module?"
    if not found["ran"]:
        yield "fault", f"no gradient reaches microbatch {task.mb}"
    elif after is not None and not _among(found["gradients"], after.get("input gradients", [])):
        what = f"microbatch {task.mb} does not take the gradient that stage {task.stage + 1} has for it"
        others = (each.get("input gradients", []) for each in forwards.values())
        known = _another(found["gradients"], others)
        which = "fault" if known else _which(foreign, Op(SB, task.lane, task.stage + 1, task.mb))
        yield which, what if which == "fault" else f"{what}: is the output computed further outside of a module?"


def _which(foreign: Mapping[Op, bool], send: Op) -> str:
    """The kind of difference, if ``send`` delivers another tensor than the one that the stage returned."""
    if send not in foreign:
        return "outside"
    return "fault" if foreign[send] else "unknown"


def all_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(equal, one, other))


def _among(taken: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> bool:
    """Whether every taken tensor is bitwise equal to a given one, whatever its shape."""
    flat = [tensor.reshape(-1) for tensor in given if tensor is not None]
    return all(any(equal(tensor.reshape(-1), other) for other in flat) for tensor in taken if tensor is not None)


def _another(taken: Sequence[Tensor | None], of_others: Iterator[Sequence[Tensor | None]]) -> bool:
    """Whether all tensors are among those of one of the others."""
    return any(tensor is not None for tensor in taken) and any(_among(taken, given) for given in of_others)
