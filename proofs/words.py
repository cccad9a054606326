"""The words for ops in stories."""

from __future__ import annotations

from dualpipe.schedule import SENDS, Kind, Op, Placed

VERBS = {
    Kind.F: "runs the forward",
    Kind.B: "runs the backward for the input",
    Kind.W: "computes the weight gradient",
    Kind.SF: "sends the activation",
    Kind.SB: "sends the gradient",
}
NOUNS = {
    Kind.F: "the forward",
    Kind.B: "the backward for the input",
    Kind.W: "the weight gradient",
    Kind.RF: "the activation",
    Kind.RB: "the gradient",
}
TOGETHER = {
    Kind.AA: "the all-to-all",
    Kind.AR: "the all-reduce",
    Kind.US: "the unsharding of the weights",
    Kind.RS: "the resharding of the weights",
    Kind.RG: "the reduction of the gradients",
}


def content(op: Op) -> str:
    """What a message carries: ``the activation of microbatch 3 of lane > (stage 1 to stage 2)``."""
    here, there = op.stage, op.stage + (1 if op.kind in (Kind.SF, Kind.RB) else -1)
    source, target = (here, there) if op.kind in SENDS else (there, here)
    noun = "the activation" if forwards(op) else "the gradient"
    where = f"stage {source} to stage {target}" if min(source, target) >= 0 else f"at stage {op.stage}"
    return f"{noun} of microbatch {op.mb} of lane {op.lane} ({where})"


def collective(op: Op) -> str:
    """A collective with its stage and group: ``the reduction of the gradients of stage 0 of lane > in group 1``."""
    where = "" if op.peer is None else f" in group {op.peer}"
    return f"{TOGETHER[op.kind]} of {op.task if op.kind is Kind.AA else op.chunk}{where}"


def forwards(op: Op) -> bool:
    """Whether a message carries an activation."""
    return op.kind in (Kind.SF, Kind.RF)


def in_slot(place: Placed) -> str:
    """Where an op is: ``in slot 5 (0SF2>)``."""
    return f"in slot {place.slot} ({place.op})"
