"""A checker of messages that shares nothing with the lowering or the simulator: match the channels, then just run."""

from dualpipe.schedule import COMPUTE, SENDS, Op, Schedule


def boundary(op: Op) -> tuple:
    """What a message is, whichever side names it: direction of flow, lane, the lower of its two stages, microbatch."""
    lower = op.stage - (op.kind.value in ("RF", "SB"))
    return op.kind.value[1], op.lane, lower, op.mb


def mismatches(schedule: Schedule) -> list[tuple]:
    """Where on an ordered pair of ranks the k-th send is not the k-th receive."""
    channels: dict[tuple[int, int], tuple[list, list]] = {}
    for rank, _, _, op in schedule:
        if op.kind in COMPUTE:
            continue
        other = schedule.neighbour(op)
        sending = op.kind in SENDS
        sent, received = channels.setdefault((rank, other) if sending else (other, rank), ([], []))
        (sent if sending else received).append(boundary(op))
    return [(pair, sent, received) for pair, (sent, received) in channels.items() if sent != received]


def unordered(schedule: Schedule) -> list[tuple[Op, Op]]:
    """The ops that come before something they need on their own rank."""
    seen: set[Op] = set()
    found = []
    for _, _, _, op in schedule:
        here = [need for need in schedule.needs(op) if schedule.rank_of(need) == schedule.rank_of(op)]
        found += [(op, need) for need in here if need not in seen]
        seen.add(op)
    return found


def stuck(schedule: Schedule) -> dict[int, int]:
    """For each rank that does not reach its end the slot at which it stops, where every message slot blocks."""
    at = [0] * schedule.ranks
    met: set[tuple] = set()

    def posted(rank: int) -> set[tuple]:
        program = schedule.programs[rank]
        slot = program[at[rank]] if at[rank] < len(program) else ()
        return {(boundary(op), op.kind in SENDS) for op in slot if op.kind not in COMPUTE}

    moved = True
    while moved:
        moved = False
        waiting = set().union(*map(posted, range(schedule.ranks)))
        met |= {what for what, sending in waiting if (what, not sending) in waiting}
        for rank, program in enumerate(schedule.programs):
            if at[rank] < len(program) and all(what in met for what, _ in posted(rank)):
                at[rank] += 1
                moved = True
    return {rank: at[rank] for rank, program in enumerate(schedule.programs) if at[rank] < len(program)}
