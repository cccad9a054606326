"""How a recorded step compares with a plain run of its modules, as data; ``dualpipe.record.plain`` compares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dualpipe.errors import RuleError
from dualpipe.record.phrases import counted
from dualpipe.schedule import Chunk, Lane

REDUCTIONS = ("mean", "sum")
_SHOWS_NOTHING = "does not show it: record one that is not, with a higher limit"


def check_expected(compare: bool, clip_norm: float | None, reduction: str | None) -> None:
    """Raise ``RuleError`` for what is expected of a comparison if there is none, or for another value."""
    for name, given in (("clip norm", clip_norm), ("reduction", reduction)):
        if given is not None and not compare:
            raise RuleError(f"a {name} is for a comparison", f"got {given} without one", "compare too, or leave it out")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise RuleError("a clip norm is a positive number", f"got {clip_norm}", "give the limit of the norm")
    if reduction is not None and reduction not in REDUCTIONS:
        raise RuleError("a reduction is mean or sum", f"got {reduction!r}", "give one of them")


@dataclass(frozen=True)
class ChunkComparison:
    """A stage of a lane.

    As text, ``faults`` has what differs, ``unknown`` what could not be compared, and ``notes`` how gradients agree.
    ``summed`` is whether the gradients are the sums over both lanes, ``None`` if that does not show.  ``divided_by`` is
    the number of microbatches or replicas by which all of them are divided, ``scale`` any other factor of all of them.
    ``factor`` is both together, ``None`` if no gradient shows it.  ``taken`` is the factor by which the stage takes the
    gradients that the next stage has for it, ``None`` if that is unknown.  ``pipelines`` is the number of pipelines
    over which the gradients are summed.  ``copies`` are the numbers of parameters that are tied to one of an earlier
    stage.  ``squares`` is the sum of the squares of all elements of the gradients, if each replica holds a shard of
    them.
    """

    chunk: Chunk
    rank: int
    microbatches: int
    faults: tuple[str, ...]
    unknown: tuple[str, ...]
    notes: tuple[str, ...]
    summed: bool | None = None
    scale: float = 1.0
    divided_by: int = 1
    factor: float | None = None
    taken: float | None = 1.0
    pipelines: int = 1
    copies: frozenset[int] = frozenset()
    squares: float | None = None

    @property
    def says(self) -> str:
        """What was found, without the name of the stage."""
        found = "; ".join([*self.faults, *self.unknown]) or "outputs and gradients equal"
        return "; ".join([found, *self.notes])

    def text(self) -> str:
        return f"{self.chunk} on rank {self.rank}: {self.says}"

    def as_json(self) -> dict[str, Any]:
        return {
            "lane": str(self.chunk.lane),
            "stage": self.chunk.stage,
            "rank": self.rank,
            "microbatches": self.microbatches,
            "equal": not self.faults and not self.unknown,
            "faults": list(self.faults),
            "unknown": list(self.unknown),
            "notes": list(self.notes),
            "summed": self.summed,
            "scale": self.scale,
            "divided_by": self.divided_by,
        }


@dataclass(frozen=True)
class LossComparison:
    """The losses of a lane: how many backwards began from them, and how many of them the program kept or read.

    ``seen`` is ``None`` for a program without an optimizer, as its variables are gone when it ends.  ``collected`` is
    whether the program held losses whose backward had run, as a list of them does; a program that never did may have no
    use for its losses.  ``read`` is how many of them the program had read when it ended, ``None`` if that is unknown.
    ``divided_twice`` is the number by which both the losses and the gradients were divided, if there is one.
    ``dropped`` is where the program has dropped a loss that it had collected, if that is known.  ``sent`` is how and
    where the program gives them to other ranks, in a collective or a message; empty if it does not.
    """

    lane: Lane
    rank: int
    microbatches: int
    computed: int
    seen: int | None
    collected: bool
    read: int | None = None
    divided_twice: int | None = None
    sent: str = ""
    dropped: str = ""

    @property
    def faults(self) -> tuple[str, ...]:
        found = []
        if self.computed < self.microbatches:
            found.append(f"only {self.computed} of {self.microbatches} backwards began from a loss")
        if self.seen is not None and self.seen < self.computed and self.collected:
            kept = "none is" if self.seen == 0 else f"only {self.seen} are"
            at = f", one is dropped at {self.dropped}" if self.dropped else ""
            found.append(
                f"{self.computed} were computed and collected, and {kept} kept or read by the end of the step{at}: is "
                "their list cleared before it is returned, read on another rank, or thrown away?"
            )
        if self.divided_twice is not None:
            found.append(
                f"each loss is divided by {self.divided_twice} before its backward, and the gradients are divided by "
                f"{self.divided_twice} once more: one of the two is too much"
            )
        return tuple(found)

    @property
    def notes(self) -> tuple[str, ...]:
        """What may be wrong.  It is not a fault: a program does not have to read its losses."""
        if self.collected and self.read == 0 and not self.faults and self.sent:
            return (f"they go to other ranks in the {self.sent}",)
        if self.collected and self.read == 0 and not self.faults:
            return (
                f"none of them is ever read on rank {self.rank}: does the program read its losses on another rank?",
            )
        return ()

    def text(self) -> str:
        seen = "" if self.seen is None else f", {self.seen} of them kept or read by the end of the step"
        found = "; ".join([*(self.faults or [f"{self.computed} computed{seen}"]), *self.notes])
        return f"losses of lane {self.lane} on rank {self.rank}: {found}"

    def as_json(self) -> dict[str, Any]:
        return {
            "lane": str(self.lane),
            "rank": self.rank,
            "microbatches": self.microbatches,
            "computed": self.computed,
            "seen": self.seen,
            "read": self.read,
            "notes": list(self.notes),
            "faults": list(self.faults),
        }


@dataclass(frozen=True)
class LossWeights:
    """With which weights the losses of the microbatches enter the gradient.

    ``reduction`` is ``mean`` if the weights add up to 1, ``sum`` if each is 1, ``other`` if neither is the case, and
    empty if that could not be determined.  With ``summed`` the gradient is that of both lanes together.  ``expected``
    is the reduction that the user expects, if any.  With ``clipped``, clipping has hidden the weights.
    ``scaled`` is the part of each weight by which the gradients were scaled after the backwards, without the clipping,
    and ``at`` the line that multiplies or divides a loss before its backward, if there is one.  ``scale`` is the factor
    of the clipping: a gradient that is clipped is the same whether it was the mean or the sum before.
    """

    weights: Mapping[Lane, tuple[float, ...]] = field(default_factory=dict)
    reduction: str = ""
    expected: str | None = None
    summed: bool = False
    clipped: bool = False
    scaled: float = 1.0
    at: str = ""
    scale: float = 1.0

    @property
    def faults(self) -> tuple[str, ...]:
        return () if self.scale != 1.0 else self._mismatch()

    def _mismatch(self) -> tuple[str, ...]:
        if self.expected in (None, self.reduction) or not self.reduction or self._one:
            return ()
        why = "is each loss divided by their number" if self.expected == "mean" else "are they divided by their number"
        if self.reduction == "other" and not (why := self._uneven() or self._by_another_number()):
            return ()
        at = f" One is scaled at {self.at}" if self.at else ""
        rest = "" if self.reduction == "other" else f", and not the {self.expected}"
        return (f"{self._line()}{rest}: {why}?{at}",)

    @property
    def unknown(self) -> tuple[str, ...]:
        if self.expected is None and self.reduction == "other" and (uneven := self._uneven()):
            return (f"{self._line()}: {uneven}?",)
        if self.scale != 1.0 and (found := self._mismatch()):
            return (f"{found[0]}; but the gradients are clipped, so this step {_SHOWS_NOTHING}",)
        if self.expected is None or self.reduction in REDUCTIONS or self.faults:
            return ()
        known = self._line() or "with which weight a loss enters the gradient could not be determined"
        so = f"so it is not known whether the gradient is the {self.expected} over the microbatches"
        if self.clipped:
            known += ", since the gradients are clipped by a norm that was not found among the values of every rank"
            so += f": this step {_SHOWS_NOTHING}"
        return (f"{known}; {so}",)

    def _uneven(self) -> str:
        """A question about the microbatches whose weight is not the one that most have; empty if there are none."""
        every = [(lane, mb, weight) for lane, each in self.weights.items() for mb, weight in enumerate(each)]
        usual, count = Counter(f"{weight:.4g}" for _, _, weight in every).most_common(1)[0]
        unusual = [each for each in every if f"{each[2]:.4g}" != usual]
        if not unusual or 2 * count <= len(every):
            return ""
        shown = " and ".join(f"{weight:.4g} for microbatch {mb} of lane {lane}" for lane, mb, weight in unusual[:3])
        return f"the weight is {shown}, and {usual} for most others: is each loss divided alike"

    def _by_another_number(self) -> str:
        """A question about the small number by which all losses are divided; empty if there is none."""
        every = [weight for each in self.weights.values() for weight in each]
        number = round(1 / every[0]) if every[0] > 0 else 0
        if not 1 < number <= 2 * len(every) or any(abs(weight * number - 1) > 1e-3 for weight in every):
            return ""
        if all(len(each) == number for each in self.weights.values()):
            return "is each loss divided by the microbatches of its own lane, and not of both"
        after = round(1 / self.scaled)
        if after > 1 and number % after == 0 and abs(self.scaled * after - 1) <= 1e-3:
            return f"is each loss divided by {number // after}, and the gradient by {after} once more"
        return f"is each loss divided by {number}"

    @property
    def _one(self) -> bool:
        """Whether there is only one microbatch, whose loss is both mean and sum."""
        return all(len(each) == 1 for each in self.weights.values()) and not (self.summed and len(self.weights) > 1)

    def is_divided_twice(self, lane: Lane) -> bool:
        """Whether each loss of a lane has the weight of one that is divided by the microbatches' number twice."""
        weights = self.weights.get(lane, ())
        return len(weights) > 1 and all(abs(weight * len(weights) ** 2 - 1) < 1e-3 for weight in weights)

    def _line(self) -> str:
        every = [weight for each in self.weights.values() for weight in each]
        if not every or not self.reduction:
            return ""
        count = len(every) if self.summed else max(map(len, self.weights.values()))
        low, high = f"{min(every):.4g}", f"{max(every):.4g}"
        weight = low if low == high else f"{low} to {high}"
        what = "neither the mean nor the sum" if self.reduction == "other" else f"the {self.reduction}"
        over = counted(count, "microbatch", "microbatches")
        return f"each loss enters the gradient with weight {weight}: the gradient is {what} over {over}"

    def text(self) -> str:
        """One line, or none if nothing is known and nothing was expected."""
        return "; ".join([*self.faults, *self.unknown]) or self._line()

    def as_json(self) -> dict[str, Any]:
        return {
            "weights": {str(lane): list(each) for lane, each in self.weights.items()},
            "reduction": self.reduction or None,
            "expected": self.expected,
            "faults": list(self.faults),
            "unknown": list(self.unknown),
        }


@dataclass(frozen=True)
class Clipping:
    """What is wrong with the norm by which gradients were clipped, what could not be determined, and notes.

    ``scale`` is the factor of the clipping alone, 1 if nothing shows that there was any, and ``None`` if it cannot be
    separated from that of a division before it.
    """

    faults: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    scale: float | None = 1.0

    def as_json(self) -> dict[str, Any]:
        return {"faults": list(self.faults), "unknown": list(self.unknown), "notes": list(self.notes)}


@dataclass(frozen=True)
class Comparison:
    """A recorded step and its plain run.

    ``replicas`` says what is wrong with the replicas of stages on two lanes before the optimizer's step, ``updates``
    after it, and ``changes`` where the program changes gradients in place, if they are not equal.
    """

    chunks: tuple[ChunkComparison, ...]
    losses: tuple[LossComparison, ...]
    replicas: tuple[str, ...]
    clipping: Clipping = Clipping()
    weights: LossWeights = LossWeights()
    changes: tuple[str, ...] = ()
    updates: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """``equal``, ``different`` or ``unknown``."""
        faults = [*(each.faults for each in self.chunks), *(each.faults for each in self.losses), self.clipping.faults]
        if self.replicas or self.updates or self.weights.faults or any(faults):
            return "different"
        unknown = (self.clipping.unknown, self.weights.unknown, *(each.unknown for each in self.chunks))
        return "unknown" if any(unknown) else "equal"

    def text(self) -> str:
        """What differs, and the lines of the program that change gradients; then what was not compared or is equal."""
        faults = [each.text() for each in self.chunks if each.faults]
        faults += [each.text() for each in self.losses if each.faults]
        faults += [*self.weights.faults, *self.replicas, *self.clipping.faults, *self.updates]
        others = _grouped([each for each in self.chunks if not each.faults])
        others += [each.text() for each in self.losses if not each.faults]
        others += [] if self.weights.faults else filter(None, [self.weights.text()])
        others += [*self.clipping.unknown, *self.clipping.notes]
        lines = [*faults, *self.changes, *others] if faults else [*others, *self.changes]
        head = f"compared with a plain run of the same modules: {self.verdict}"
        return "\n".join([head, *(f"  {line}" for line in lines)]) + "\n"

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "chunks": [each.as_json() for each in self.chunks],
            "losses": [each.as_json() for each in self.losses],
            "replicas": [*self.replicas, *self.updates],
            "clipping": self.clipping.as_json(),
            "loss_weights": self.weights.as_json(),
            "changes": list(self.changes),
        }


_FEWEST = 3
"""So many stages of which the same is said share a line."""


def _grouped(chunks: Sequence[ChunkComparison]) -> list[str]:
    """A line for each stage and lane, or one for several of which the same is said."""
    alike: dict[str, list[ChunkComparison]] = {}
    for each in chunks:
        alike.setdefault(each.says, []).append(each)
    lines = []
    for says, group in alike.items():
        if len(group) < _FEWEST:
            lines += [each.text() for each in group]
            continue
        of_lane: dict[Lane, list[str]] = {}
        for each in group:
            of_lane.setdefault(each.chunk.lane, []).append(str(each.chunk.stage))
        where = [f"stage{'s' * (len(found) > 1)} {' '.join(found)} of lane {lane}" for lane, found in of_lane.items()]
        lines.append(f"{' and '.join(where)}: {says}")
    return lines
