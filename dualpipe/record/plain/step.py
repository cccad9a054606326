"""A recorded step compared with its plain run: how each chunk's outputs, links and gradients agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from dualpipe.record.comparison import ChunkComparison
from dualpipe.record.phrases import counted, names_of
from dualpipe.record.plain import links, pipelines, shared
from dualpipe.record.plain.changes import limit_of
from dualpipe.record.plain.clipping import changed_later
from dualpipe.record.plain.crossed import crossed, left_out
from dualpipe.record.plain.gradients import (
    Agreement,
    Line,
    Parts,
    agreement,
    factors_of,
    scale_of,
    totals_of,
    with_earlier,
)
from dualpipe.record.plain.links import Plainly
from dualpipe.record.plain.names import unique
from dualpipe.record.plain.proportions import alike
from dualpipe.schedule import B, Chunk, Lane, Op, Task, W

_MOST_NAMES = 3


@dataclass(frozen=True)
class Step:
    """One training step of a pipeline: the files of its ranks, and what they have for each forward."""

    files: Mapping[int, Mapping[str, Any]]
    forwards: Mapping[Task, Plainly]
    routes: Mapping[Lane, tuple[int, ...]]
    microbatches: Mapping[Lane, int]
    others: bool
    """Whether there are ranks outside of these routes, as those of other data-parallel pipelines."""
    places: Mapping[Op, str]
    replicas: tuple[Step, ...] = ()
    """The other pipelines of the job, if all are recorded."""
    foreign: Mapping[Op, bool] = field(default_factory=dict)
    """The sends of what no stage made, and whether that is certainly something else."""
    reductions: Callable[[Chunk], Mapping[str, frozenset[str]]] = lambda chunk: {}
    """Gives the collectives on gradients of a chunk's parameters, each with its line, and the names of these."""

    def chunk(self, chunk: Chunk) -> ChunkComparison:
        rank, count = self.routes[chunk.lane][chunk.stage], self.microbatches[chunk.lane]
        file = self.files[rank]
        if "error" in file:
            return ChunkComparison(chunk, rank, count, (), (str(file["error"]),), ())
        faults: list[str] = []
        unknown: list[str] = [] if count else ["no microbatch was recorded"]
        linked: dict[int, list[links.Difference]] = {}
        for mb in range(count):
            found = self.forwards.get(Task(*chunk, mb))
            if found is None:
                faults.append(f"microbatch {mb} ran no forward")
            elif "error" in found:
                unknown.append(f"microbatch {mb} cannot be run plainly: {found['error']}")
            elif not links.all_equal(found["returned"], found["plainly"]):
                what = f"the output of microbatch {mb} differs from the plain one"
                if changed := found.get("changed"):
                    faults.append(f"{what}: {names_of(changed)} had changed since the step began")
                else:
                    unknown.append(f"{what}, on the same input and weights: does its module keep a state of its own?")
            else:
                if at := found.get("drawn"):
                    faults.append(
                        f"microbatch {mb} is computed again in the backward, with other random numbers than in its "
                        f"forward, at {at}: are the states of all random generators kept and set again?"
                    )
                of_task = links.differences(Task(*chunk, mb), found, self.forwards, self.foreign, self.places)
                linked[mb] = list(of_task)
                after = chunk.stage + 1
                following = self.forwards.get(Task(chunk.lane, after, mb))
                if left_out(found, following):
                    what = f"microbatch {mb} uses no gradient for an output of which stage {after} has one"
                    linked[mb].append(links.Difference("unknown", what))
                if crossed(found, following):
                    faults.append(
                        f"microbatch {mb} uses the gradient that stage {after} has for one output for another "
                        "one: are they sent in another order, or does the backward run from what was not sent?"
                    )
        if unknown:
            return ChunkComparison(chunk, rank, count, _shown(faults), _shown(unknown), ())
        every = [each for found in linked.values() for each in found]
        faults += [each.what for each in every if each.which == "fault"]
        apart = [f"{each.what}: is it computed further without autograd?" for each in every if each.which == "unknown"]
        scales = {mb: next((e.factor for e in found if e.which == "scaled"), 1.0) for mb, found in linked.items()}
        if scales and not alike([*scales.values()]):
            shown = ", ".join(f"{scale:.4g} times that of microbatch {mb}" for mb, scale in scales.items())
            faults.append(
                f"it takes the gradients that stage {chunk.stage + 1} has for it at different scales: {shown}"
            )
        taken = None if faults or apart else next(iter(scales.values()), 1.0)
        notes = self._on_links(every, taken)
        kept = self._gradients(chunk, rank)
        apart += pipelines.updated_apart(self, chunk)
        apart += [*self._elsewhere(chunk), *changed_later(self, chunk)]
        if not isinstance(kept, Agreement):
            kept = pipelines.of_all(self, chunk) or pipelines.in_shards(self, chunk) or kept
        if isinstance(kept, Agreement):
            return ChunkComparison(
                chunk,
                rank,
                count,
                _shown(faults),
                _shown(apart),
                (*([kept.how] if kept.how else []), *notes),
                kept.summed,
                kept.scale,
                kept.divided_by,
                kept.factor,
                taken,
                kept.pipelines,
                kept.copies,
                kept.squares,
            )
        if self.others:
            apart.append(f"{kept}, which may be the sum over pipelines that are not in the file")
        else:
            faults.append(kept)
        return ChunkComparison(chunk, rank, count, _shown(faults), _shown(apart), (), taken=taken)

    def _elsewhere(self, chunk: Chunk) -> list[str]:
        """What to say of gradients that the program has cleared although no optimizer uses them."""
        found = {n: at for n, at in self.file(chunk)["elsewhere"].items() if n in self.names(chunk)}
        if not found:
            return []
        at = next(filter(None, found.values()), "")
        made = f" after it made another tensor from it at {at}" if at else ""
        return [
            f"{names_of([self.name(chunk, n) for n in found])}: the program has cleared the gradient{made}, and no "
            "optimizer of torch.optim has the parameter, or that tensor as the gradient of another one"
        ]

    @staticmethod
    def _on_links(linked: Sequence[links.Difference], taken: float | None) -> tuple[str, ...]:
        """Notes on links that agree, but not bitwise."""
        counts = Counter(each.which for each in linked)
        notes = [
            f"{counted(count, 'link agrees', 'links agree')} with the neighbouring stages {how}"
            for which, how in (("near", "up to rounding"), ("narrow", "after a cast to a narrower type"))
            if (count := counts[which])
        ]
        if alone := counts["alone"]:
            are = counted(alone, "link is", "links are")
            notes.append(f"{are} not compared, because the stage at the other end could not be run plainly")
        if taken is not None and not alike([taken, 1.0]):
            notes.append(f"it takes {taken:.4g} times the gradients that the next stage has for it")
        return tuple(notes)

    def named(self, chunk: Chunk, of: str) -> dict[str, Tensor]:
        """The weights of a chunk by name, before the optimizer's step (``weights``) or after it (``changed``)."""
        file = self.file(chunk) if self.has(chunk) else {}
        kept = file.get(of) or {} if file.get("by_optimizer") else {}
        return {name: kept[number] for number, name in self.names(chunk).items() if number in kept} if kept else {}

    def has(self, chunk: Chunk) -> bool:
        """Whether there is such a chunk, and its rank has made a plain run."""
        route = self.routes.get(chunk.lane, ())
        return chunk.stage < len(route) and "error" not in self.files[route[chunk.stage]]

    def parts_by_name(self, chunk: Chunk) -> dict[str, Parts]:
        names = self.names(chunk)
        return {names[number]: parts for number, parts in self.parts(chunk).items()}

    def file(self, chunk: Chunk) -> Mapping[str, Any]:
        return self.files[self.routes[chunk.lane][chunk.stage]]

    def names(self, chunk: Chunk) -> dict[int, str]:
        """The names of the chunk's parameters by number."""
        return unique(self._by_microbatch(chunk)[0], self.file(chunk).get("names", ()))

    def _gradients(self, chunk: Chunk, rank: int) -> str | Agreement:
        """How the gradients of a chunk agree with the plain ones, or what differs."""
        file, names = self.files[rank], self.names(chunk)
        agree: list[Agreement] = []
        wrong: dict[str, list[str]] = {}
        factors: dict[str, float] = {}  # of the gradients that show it
        of_several = {number for number, chunks in shared.users(self, rank).items() if len(chunks) > 1}
        fitted = [factors_of(file["final"][number], parts) for number, parts in self.parts(chunk).items()]
        patterns = [factors for factors in fitted if factors]
        for number, parts in self.parts(chunk).items():
            name = names[number]
            final = file["final"][number]
            if number in file["elsewhere"]:
                continue
            if number in of_several:
                found = shared.over_stages(self, rank, number)
                if isinstance(found, Agreement):
                    agree.append(found)
                else:
                    wrong.setdefault(found, []).append(name)
                continue
            line = partial(self._line, chunk, number)
            found = self._wrong(chunk, number) or agreement(
                final, parts, self.counts(), self.scales, patterns, line, lambda: self.limits
            )
            if not isinstance(found, Agreement):
                found = shared.summed_with(self, chunk, number, final) or found
            if isinstance(found, Agreement):
                found = with_earlier(found, parts, file["step"])
            if isinstance(found, Agreement) and number in file["own"]:
                found = found.also("kept in a tensor of the program's own, which its optimizer uses")
            if isinstance(found, Agreement):
                agree.append(found)
                if final is not None and bool(final.any()):
                    factors[name] = found.scale / found.divided_by
            else:
                wrong.setdefault(found, []).append(name)
        if wrong:
            return "; ".join(_shown([f"{names_of(of_each)}: {what}" for what, of_each in wrong.items()]))
        if factors and not alike([*factors.values()]):
            least, most = (of(factors, key=factors.__getitem__) for of in (min, max))
            shown = " and ".join(f"{name} by {factors[name]:.4g}" for name in (least, most))
            alone = self._reduced_alone(chunk, least, most)
            return f"the gradients of its parameters are scaled by different factors: {shown}{alone}"
        summed = {each.summed for each in agree if each.summed is not None}
        notes = {each.how for each in agree if each.how}
        scale = next((each.scale for each in agree if each.scale != 1), 1.0)
        divided = {each.divided_by for each in agree}
        by = divided.pop() if len(divided) == 1 else 1
        factor = next(iter(factors.values()), None)
        of_both = summed.pop() if len(summed) == 1 else None
        copies = frozenset(number for each in agree for number in each.copies)
        return Agreement(", ".join(sorted(notes)), of_both, scale, by, factor, copies=copies)

    def _reduced_alone(self, chunk: Chunk, *names: str) -> str:
        """Which of two parameters takes part in a collective of its own."""
        found = [{each for each, held in self.reductions(chunk).items() if name in held} for name in names]
        alone = [(name, sorted(own - other)) for name, own, other in zip(names, found, found[::-1], strict=True)]
        return "".join(f"; {name} is also in the {own[0]}" for name, own in alone if own)

    @cached_property
    def limits(self) -> tuple[float, ...]:
        """The values to which the program clips gradients, where they show it."""
        found: set[float] = set()
        for lane, route in self.routes.items():
            for stage, rank in enumerate(route):
                final = self.files[rank].get("final", {})
                for number, parts in self.parts(Chunk(lane, stage)).items() if final else ():
                    if final[number] is not None:
                        totals = totals_of(final[number], parts, self.counts())
                        found.update(filter(None, (limit_of(final[number], total) for total, _, _ in totals)))
        return tuple(sorted(found))

    @cached_property
    def scales(self) -> tuple[float, ...]:
        """The factors that the program has scaled gradients by, where a gradient is large enough to show it."""
        found: list[float] = []
        for lane, route in self.routes.items():
            for stage, rank in enumerate(route):
                final = self.files[rank].get("final", {})
                for number, parts in self.parts(Chunk(lane, stage)).items() if final else ():
                    scale = scale_of(final[number], parts)
                    if scale is not None and all(abs(scale - other) > 1e-4 * abs(other) for other in (1.0, *found)):
                        found.append(scale)
        return tuple(found)

    def is_summed(self, chunk: Chunk) -> bool | None:
        """Whether the gradients of a chunk have a part of its replica's; ``None`` if that does not show."""
        final = self.file(chunk).get("final", {})
        found = [factors_of(final[number], parts) for number, parts in self.parts(chunk).items() if final]
        far = [factor for each in found if each for (lane, _), factor in each.items() if lane is not chunk.lane]
        return any(far) if far else None

    def _line(self, chunk: Chunk, number: int, mb: int) -> Line | None:
        """The line of the program for the W of a microbatch, or else for its B; and what computes the gradient."""
        made_by = self.forwards.get(Task(*chunk, mb), {}).get("functions", {}).get(number)
        ops = (Op(kind, *chunk, mb) for kind in (W, B))
        rest = f", and {made_by}" if made_by else ""
        return next((Line(op, self.places[op] + rest) for op in ops if self.places.get(op)), None)

    def _wrong(self, chunk: Chunk, number: int) -> str:
        """Where the program's own computation of a weight gradient is no derivative of its module."""
        for task, found in self.forwards.items():
            if task.chunk == chunk and number in found.get("wrong", {}):
                own, slope = found["wrong"][number]
                times = f", {own / slope:.3g} times as much" if slope else ""
                return (
                    f"what the program computes as the gradient of one microbatch has a slope of {own:.4g}{times}, and "
                    f"the module's is {slope:.4g}: is the formula of W right, and run once for each use of the weight?"
                )
        return ""

    def counts(self) -> tuple[int, ...]:
        """What a program may divide gradients by: microbatches, replicas."""
        counts = {2, *self.microbatches.values(), sum(self.microbatches.values())}
        return tuple(sorted({count for one in counts for count in (one, 2 * one) if count > 1}))

    def parts(self, chunk: Chunk) -> dict[int, Parts]:
        """The gradients of every parameter of a chunk, microbatch by microbatch."""
        file, names = self.file(chunk), self.names(chunk)
        own, slopes = self._by_microbatch(chunk)
        lane = next((lane for lane in self.routes if lane != chunk.lane), None)
        far: dict[str, dict[int, Tensor | None]] = {}
        far_before: dict[str, Tensor] = {}
        far_slopes: dict[str, dict[int, float]] = {}
        if lane is not None:
            replica = Chunk(lane, chunk.stage)
            of_replica = self.names(replica)
            of_lane, slopes_of_lane = self._by_microbatch(replica)
            far = {of_replica[number]: each for number, each in of_lane.items()}
            far_before = {of_replica[n]: each for n, each in self.file(replica)["before"].items() if n in of_replica}
            far_slopes = {of_replica[number]: each for number, each in slopes_of_lane.items()}
        return {
            number: Parts(
                number,
                chunk.lane,
                each,
                None if lane is None else far.get(names[number], {}),
                file["before"].get(number),
                slopes.get(number, {}),
                far_slopes.get(names[number], {}),
                file.get("weights", {}).get(number),
                far_before.get(names[number]),
            )
            for number, each in own.items()
        }

    def _by_microbatch(self, chunk: Chunk) -> tuple[dict[int, dict[int, Tensor | None]], dict[int, dict[int, float]]]:
        """By parameter and microbatch the plain gradients of a chunk, and the slopes in place of some."""
        gradients: dict[int, dict[int, Tensor | None]] = {}
        slopes: dict[int, dict[int, float]] = {}
        for mb in range(self.microbatches[chunk.lane]):
            found = self.forwards.get(Task(*chunk, mb)) or {}
            for number, gradient in found.get("weights", {}).items():
                gradients.setdefault(number, {})[mb] = gradient
            for number, slope in found.get("slopes", {}).items():
                slopes.setdefault(number, {})[mb] = slope
        return gradients, slopes

    def name(self, chunk: Chunk, number: int) -> str:
        return self.names(chunk)[number]


def _shown(found: Sequence[str]) -> tuple[str, ...]:
    """The first of several findings of one kind, and how many there are more."""
    more = len(found) - _MOST_NAMES
    return (*found[:_MOST_NAMES], *([f"and {more} more"] if more > 0 else []))
