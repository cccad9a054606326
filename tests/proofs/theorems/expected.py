"""The obligations that the theorems must have at one size, derived from the expanded schedule alone."""

from collections import Counter
from collections.abc import Iterator

from dualpipe.schedule import COMPUTE, MESSAGES, SB, SENDS, B, F, Op, Schedule, W
from dualpipe.schedule.generate import PLANS, generate

Facts = Counter  # of (ranks, fact)


class World:
    """A named schedule at one size, and the name of each op in the table of its rank."""

    def __init__(self, name: str, ranks: int, microbatches: int) -> None:
        self.schedule: Schedule = generate(name, ranks, microbatches)
        self.plans = [PLANS[name](ranks, microbatches, rank) for rank in range(ranks)]

    def local(self, op: Op) -> str:
        """``"SF0"`` for the activation that the rank's chunk 0 sends."""
        plan = self.plans[self.schedule.rank_of(op)]
        return f"{op.kind}{plan.chunks.index((op.lane, op.stage))}"

    def programs(self) -> Iterator[tuple[int, tuple]]:
        yield from enumerate(self.schedule.programs)

    def is_deferred(self, op: Op, slot: tuple) -> bool:
        """Whether the W of a B, or the B of a W, is in another slot."""
        partner = op._replace(kind=W if op.kind is B else B)
        return partner not in slot

    def channels(self) -> Iterator[tuple[tuple[int, int], list, list]]:
        """For each ordered pair of ranks its sends and its receives, each with the number of its slot."""
        found: dict[tuple[int, int], tuple[list, list]] = {}
        for rank, number, _, op in self.schedule:
            if op.kind in MESSAGES:
                peer = self.schedule.peer(op)
                pair = (rank, peer) if op.kind in SENDS else (peer, rank)
                found.setdefault(pair, ([], []))[op.kind not in SENDS].append((number, op))
        for pair, (sends, receives) in found.items():
            yield pair, sends, receives


def messages(world: World) -> Facts:
    facts = Facts()
    for pair, sends, receives in world.channels():
        for (_, send), (_, receive) in zip(sends, receives, strict=True):
            facts[pair, (world.local(send), send.mb, world.local(receive), receive.mb)] += 1
        facts[pair, ("total", len(sends), len(receives))] += 1
    return facts


def order(world: World) -> Facts:
    """Needs on the op's own rank, except those of a deferred W, which belong to ``queue``."""
    facts = Facts()
    for rank, number, _, op in world.schedule:
        if op.kind is W and world.is_deferred(op, world.schedule.programs[rank][number]):
            continue
        for need in world.schedule.needs(op):
            if world.schedule.rank_of(need) == rank:
                facts[(rank,), (world.local(op), op.mb, world.local(need), need.mb)] += 1
    return facts


def queue(world: World) -> Facts:
    facts = Facts()
    for rank, program in world.programs():
        popped = [op for slot in program for op in slot if op.kind is W and world.is_deferred(op, slot)]
        for number, op in enumerate(popped):
            facts[(rank,), (world.local(op._replace(kind=B)), op.mb, number)] += 1
        facts[(rank,), ("pending", len(popped), len(popped))] += 1
    return facts


def totals(world: World) -> Facts:
    facts = Facts()
    for rank, program in world.programs():
        plan = world.plans[rank]
        for row in plan.table:
            facts[(rank,), ("row", row.name, row.times(plan.sizes))] += 1
        counted = Counter(world.local(op) for slot in program for op in slot if op.kind is not W)
        for name, count in counted.items():
            facts[(rank,), ("all", name, count)] += 1
        for slot in program:
            for op in slot:
                if op.kind is W and not world.is_deferred(op, slot):
                    facts[(rank,), ("beside", world.local(op), op.mb)] += 1
    return facts


def live(world: World) -> Facts:
    facts = Facts()
    for rank, program in world.programs():
        for chunk in world.plans[rank].chunks:
            of_chunk = [[op for op in slot if (op.lane, op.stage) == chunk] for slot in program]
            number = world.plans[rank].chunks.index(chunk)
            for op, held in _held(of_chunk, F, B):
                facts[(rank,), (f"chunk {number}", world.local(op), op.mb, held)] += 1
    return facts


def memory(world: World) -> Facts:
    facts = Facts()
    for rank, program in world.programs():
        for op, held in _held(program, F, W):
            facts[(rank,), ("all", world.local(op), op.mb, held)] += 1
    return facts


def pending(world: World) -> Facts:
    facts = Facts()
    for rank, program in world.programs():
        apart = [[op for op in slot if op.kind in (B, W) and world.is_deferred(op, slot)] for slot in program]
        for op, held in _held(apart, B, W):
            facts[(rank,), (world.local(op), op.mb, held)] += 1
    return facts


def _held(slots, allocate, release) -> Iterator[tuple[Op, int]]:
    """For each op that allocates, how much is held then, before its slot releases anything."""
    held = 0
    for slot in slots:
        held += sum(op.kind is allocate for op in slot)
        yield from ((op, held) for op in slot if op.kind is allocate)
        held -= sum(op.kind is release for op in slot)


def accumulation(world: World) -> Facts:
    facts = Facts()
    for rank, program in world.programs():
        for number, chunk in enumerate(world.plans[rank].chunks):
            ran = [op.mb for slot in program for op in slot if op.kind is W and (op.lane, op.stage) == chunk]
            for first, second in zip(sorted(ran), sorted(ran)[1:], strict=False):
                facts[(rank,), (f"W{number}", first, second)] += 1
    return facts


def makespan_at_use(world: World) -> Facts:
    """Which compute waits for which: on a rank the previous one, and over a message the one that needs it."""
    facts = Facts()
    before: dict[Op, int] = {}
    needs: dict[Op, int] = {}
    for rank, program in world.programs():
        computes = 0
        for slot in program:
            if slot[0].kind in COMPUTE:
                needs |= dict.fromkeys(slot, computes)
                computes += 1
            before |= {op: computes - 1 for op in slot if op.kind in SENDS}
        for number in range(-1, computes):
            facts[(rank,), ("own", "own", number, number + 1)] = 1
    for pair, sends, _ in world.channels():
        for _, send in sends:
            there = send._replace(kind=F, stage=send.stage + 1)
            if send.kind is SB:
                there = send._replace(kind=B, stage=send.stage - 1)
            facts[pair, ("sender", "use", before[send], needs[there])] += 1
    return facts


def deadlock(world: World) -> Facts:
    """Which compute waits for which: on a rank the previous one, and for every message the one before its partner."""
    facts = Facts()
    before: dict[tuple[int, int], int] = {}
    for rank, program in world.programs():
        computes = 0
        for number, slot in enumerate(program):
            before[rank, number] = computes - 1
            computes += slot[0].kind in COMPUTE
        for number in range(-1, computes):
            facts[(rank,), ("own", "own", number, number + 1)] = 1
    for (source, target), sends, receives in world.channels():
        for (sent, _), (received, _) in zip(sends, receives, strict=True):
            a, b = before[source, sent], before[target, received]
            facts[(source, target), ("sender", "receiver", a, b + 1)] = 1
            facts[(source, target), ("receiver", "sender", b, a + 1)] = 1
    return facts
