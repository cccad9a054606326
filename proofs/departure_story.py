"""Puts a departure from another schedule into words: what each does there, and what usually causes it."""

from __future__ import annotations

from collections import Counter
from typing import assert_never

from dualpipe.schedule import COLLECTIVES, MESSAGES, RECEIVES, SENDS, B, F, Lane, Op, Placed, Schedule, W, show_slot
from proofs.against import Aspect, Comparison, Departure, Misplaced


def text(comparison: Comparison) -> str:
    """The comparison for a terminal: a verdict, then a story and its usual cause for each departure."""
    name, verdict = comparison.name, comparison.verdict
    heads = {"same": "the same schedule", "same but for slots": "the same order and messages, in other slots"}
    lines = [f"  against {name}: {heads.get(verdict, verdict)}"]
    lines += [f"      {_size(comparison, lane)}" for lane in comparison.sizes]
    lines += [f"      {_misplaced(each, name)}" for each in comparison.misplaced]
    if comparison.misplaced:
        lines.append("      the orders of the ranks were not compared, since their stages are different ones")
    has = comparison.has_collectives
    if any(has) and not all(has):
        lines.append(f"      collectives were not compared, since {'the schedule' if has[1] else name} has none")
    if unsure := comparison.unsure:
        names = "the name of 1 receive was" if unsure == 1 else f"the names of {unsure} receives were"
        why = "another receive was in flight into the same memory, which makes names uncertain"
        lines.append(f"      {names} not compared, since {why}")
    for departure in comparison.departures:
        lines.append(f"      {departure.aspect}: {tell(departure, comparison)}")
        where = place(departure, comparison)
        lines += [f"        {line}" for line in (where, meaning(departure, comparison)) if line]
    return "\n".join(lines) + "\n"


def _size(comparison: Comparison, lane: Lane) -> str:
    counts = (schedule.microbatches[lane] for schedule in (comparison.here, comparison.there))
    one, other = counts
    failed = ", since the program ended before the others" if comparison.here.failures and one < other else ""
    return f"lane {lane} has {one} microbatch{'es' * (one != 1)}{failed}, and in {comparison.name} {other}"


def _misplaced(found: Misplaced, name: str) -> str:
    stage = f"stage {found.stage} of lane {found.lane}"
    if found.here is None:
        return f"there is no {stage}, which {name} has on rank {found.there}"
    if found.there is None:
        return f"{stage} is on rank {found.here}, and {name} has no such stage"
    return f"{stage} is on rank {found.here}, and in {name} on rank {found.there}"


def tell(departure: Departure, comparison: Comparison) -> str:
    """What each schedule does where a rank departs."""
    name, rank, here, there = comparison.name, departure.rank, departure.here, departure.there
    if departure.aspect is Aspect.SLOTS and here is not None and there is not None:
        ours = show_slot(comparison.here.programs[rank][here.slot])
        theirs = show_slot(comparison.there.programs[rank][there.slot])
        return f"rank {rank} has {ours} as its slot {here.slot}, and {name} has {theirs}"
    if here is None:
        return f"rank {rank} {_lacks(departure, name)}"
    does = f"rank {rank} {_verb(here.op)} {here.op} in slot {here.slot}"
    if departure.surplus:
        return _has_more(departure, here, comparison) if departure.surplus > 0 else _has_fewer(departure, comparison)
    if _is_repeated(departure, comparison):
        return f"{does} once more than {name}"
    if departure.later is not None and departure.aspect is Aspect.MESSAGES:
        peers = comparison.here.peer(here.op), comparison.there.peer(departure.later.op)
        if peers[0] != peers[1]:
            direction = "to" if here.op.kind in SENDS else "from"
            return f"{does} {direction} rank {peers[0]}, and {name} {direction} rank {peers[1]}"
    if there is not None and departure.aspect is Aspect.WEIGHTS and here.op.kind is not there.op.kind:
        return does + _deferred(departure, here, there, name)
    verb = _verb(here.op)
    if there is not None and departure.later is not None and departure.found is not None:
        slots = here.slot, departure.found.slot, departure.later.slot, there.slot
        if slots[0] == slots[1] and slots[2] == slots[3]:
            return f"{does} before {there.op}, and {name} after it"
    also = f"never {verb} on this rank" if departure.later is None else f"{verb} in its slot {departure.later.slot}"
    if there is None:
        return f"{does}, which {name} {also}"
    where = "" if departure.found is None else f", which this rank {_verb(there.op)} in slot {departure.found.slot}"
    return f"{does}, which {name} {also}; there {name} {_verb(there.op)} {there.op}{where}"


def _has_more(departure: Departure, here: Placed, comparison: Comparison) -> str:
    """The words for messages too many: all later ones of the channel are shifted, and so are their names."""
    posts = _posts(departure.rank, departure.surplus, here.op, comparison.here)
    which = "the first is " if departure.surplus > 1 else ""
    before, _ = _computes_around(here, comparison.here)
    after = f"after {before[-1]}" if before else "before its first forward"
    named = f"{here.op} (a guess)" if here in comparison.here.observed.guesses else f"{here.op}"
    return f"{posts} more than {comparison.name}: {which}{named} in slot {here.slot}, {after}"


def _has_fewer(departure: Departure, comparison: Comparison) -> str:
    """The words for messages too few."""
    here, there, name = departure.here, departure.there, comparison.name
    if here is None or there is None:
        raise AssertionError("messages are too few between two computes")
    posts = _posts(departure.rank, -departure.surplus, there.op, comparison.there)
    before, later = _computes_around(here, comparison.here)
    own = [placed.op for placed in _between(comparison.here, here.rank, len(before))]
    key = comparison.there.peer(there.op), there.op.kind in SENDS
    count = sum((comparison.here.peer(op), op.kind in SENDS) == key for op in own)
    gap = f"between {before[-1]} and {later[0]}" if before else f"before {later[0]}"
    return f"{posts} fewer than {name}: {count or 'none'} {gap}, where {name} has {there.op} in its slot {there.slot}"


def _posts(rank: int, count: int, op: Op, schedule: Schedule) -> str:
    """That a rank posts so many messages like this one."""
    sends = op.kind in SENDS
    noun = f"{_number(count)} {'send' if sends else 'receive'}{'s' * (count > 1)}"
    return f"rank {rank} posts {noun} {'to' if sends else 'from'} rank {schedule.peer(op)}"


def _computes_around(placed: Placed, schedule: Schedule) -> tuple[list[Op], list[Op]]:
    """The F and B of the rank in the slots before this one, and those from it on."""
    program = schedule.programs[placed.rank]
    before, later = (
        [op for slot in part for op in slot if op.kind in (F, B)]
        for part in (program[: placed.slot], program[placed.slot :])
    )
    return before, later


def _between(schedule: Schedule, rank: int, computes: int) -> list[Placed]:
    """The messages of a rank after so many of its F and B, up to the next one."""
    found, seen = [], 0
    for number, slot in enumerate(schedule.programs[rank]):
        if seen == computes:
            found += [Placed(rank, number, at, op) for at, op in enumerate(slot) if op.kind in MESSAGES]
        seen += sum(op.kind in (F, B) for op in slot)
    return found


def _lacks(departure: Departure, name: str) -> str:
    there, found = departure.there, departure.found
    if there is None:
        raise AssertionError("a departure has an op on one side at least")
    often = "never" if found is None else "once less"
    return f"{often} {_verb(there.op)} {there.op}, which {name} {_verb(there.op)} in its slot {there.slot}"


def _deferred(departure: Departure, here: Placed, there: Placed, name: str) -> str:
    """The words for a W that one of them runs before what the other runs first."""
    if here.op.kind is W:
        later = departure.later
        when = f"never runs {here.op}" if later is None else f"defers {here.op} to its slot {later.slot}"
        return f" before {there.op}, which {name} runs first: {name} {when}"
    when = "never runs it" if departure.found is None else f"defers it to slot {departure.found.slot}"
    return f" before {there.op}, which {name} runs first, in its slot {there.slot}: this rank {when}"


def _is_repeated(departure: Departure, comparison: Comparison) -> bool:
    """Whether this schedule has had the op before, which the other one has once."""
    here = departure.here
    if here is None:
        return False
    program = comparison.here.programs[departure.rank]
    before = [*(op for slot in program[: here.slot] for op in slot), *program[here.slot][: here.position]]
    if here.op.kind in COLLECTIVES:
        return here.op in before
    return here.op.bare in {op.bare for op in before}


def _verb(op: Op) -> str:
    if op.kind in SENDS:
        return "sends"
    if op.kind in COLLECTIVES:
        return "launches"
    return "receives" if op.kind in RECEIVES else "runs"


def place(departure: Departure, comparison: Comparison) -> str:
    """Where in the source a recorded program is when it departs: at that message, or else after the last one before."""
    here, observed = departure.here, comparison.here.observed
    if here is None:
        return ""
    if departure.surplus < 0:
        computes = len(_computes_around(here, comparison.here)[0])
        own = [(each.op, observed.place(each)) for each in _between(comparison.here, here.rank, computes)]
        lines = [f"{op} at {at}" for op, at in own if at]
        return f"what it posts there: {', '.join(lines)}" if lines else ""
    before = [placed for placed in comparison.here if placed.rank == here.rank and placed[:3] <= here[:3]]
    for placed in reversed(before):
        if at := observed.place(placed):
            return f"at {at}" if placed == here else f"after {placed.op}, which is posted at {at}"
    return ""


def meaning(departure: Departure, comparison: Comparison) -> str:
    """What usually causes such a departure, as a question or a place to look at; or how the program failed there."""
    if departure.here is None and (failed := _failure(departure.rank, comparison)):
        return failed
    match departure.aspect:
        case Aspect.ORDER:
            return _of_order(departure, comparison)
        case Aspect.WEIGHTS:
            return _of_weights(departure, comparison)
        case Aspect.MESSAGES:
            return _of_messages(departure, comparison)
        case Aspect.COLLECTIVES:
            return _of_collectives(departure)
        case Aspect.SLOTS:
            return _of_slots(departure, comparison)
        case _:
            assert_never(departure.aspect)


def _failure(rank: int, comparison: Comparison) -> str:
    """How the recorded program failed on a rank whose program ends early, if it did."""
    own = [
        failure
        for failure in comparison.here.failures
        if failure.rank == rank and failure.ends_early and not failure.is_later
    ]
    return f"the program of this rank ended there: {own[0]}" if own else ""


def _of_order(departure: Departure, comparison: Comparison) -> str:
    here, there, rank = departure.here, departure.there, departure.rank
    if here is None:
        return "did an error or a wait for a message stop the rank there, or is a loop one iteration short?"
    if there is None or _is_repeated(departure, comparison):
        return "does a loop run one iteration too many, or is an op issued twice?"
    one, other = here.op, there.op
    if one.mb >= comparison.there.microbatches[one.lane]:
        return "does the program have more microbatches than the schedule that it is compared with?"
    if one.kind is not other.kind:
        warm_up = not any(op.kind is B for slot in comparison.here.programs[rank][: here.slot] for op in slot)
        phase = "before its first backward" if warm_up else "in this phase"
        few = "many" if one.kind is F else "few"
        return f"does the rank run too {few} forwards {phase}: is their number that of another rank or size?"
    if one.chunk != other.chunk and departure.later is None:
        return "does this rank hold that stage? The chunk depends on the lane and on the rank's half of the pipeline."
    if one.chunk != other.chunk:
        return "are the rank's two chunks exchanged? On the second half of the ranks they must swap their roles."
    return "does each chunk count its microbatches separately, and increase the count after each use?"


def _of_weights(departure: Departure, comparison: Comparison) -> str:
    here, there = departure.here, departure.there
    if here is None:
        return "does the program run the stored weight gradients often enough, also at the end?"
    if there is None:
        return "does each microbatch run its weight gradient exactly once?"
    if there.op.kind is W and departure.found is None:
        return "is the weight gradient stored and never run?"
    if here.op.kind is W and there.op.kind is W and _is_at_once(here, comparison.here):
        return "does the backward put this weight gradient into the store, and is what the store has run at the end?"
    if here.op.kind is W and there.op.kind is W:
        return "is the store for weight gradients first in, first out?"
    if here.op.kind is W:
        return (
            "does the backward put weight gradients into the store? If it adds them at once, nothing is left to defer."
        )
    return "is a weight gradient deferred although it should run with its backward, or is it deferred too long?"


def _is_at_once(weight: Placed, schedule: Schedule) -> bool:
    """Whether a W is in the slot of its B, so that it does not come from a store."""
    return any(op.kind is B and op.task == weight.op.task for op in schedule.programs[weight.rank][weight.slot])


def _of_messages(departure: Departure, comparison: Comparison) -> str:
    here, there, later = departure.here, departure.there, departure.later
    if departure.surplus:
        return _of_counts(departure, comparison)
    if here is None:
        return "is a send or a receive left out, or did the rank stop before it?"
    if _is_repeated(departure, comparison) or (there is None and later is None):
        return "is a message posted once too often, for instance a receive that nothing consumes?"
    if later is None or comparison.here.peer(here.op) != comparison.there.peer(later.op):
        return "is the peer the rank that holds the next or the previous stage of this lane?"
    if there is not None and departure.found is None:
        return f"is {there.op} left out?"
    return "are the messages added to their batch in another order? They carry no tag, so both sides must use the same."


def _of_counts(departure: Departure, comparison: Comparison) -> str:
    """What causes messages too many or too few, and what follows from it."""
    too_many, count = departure.surplus > 0, abs(departure.surplus)
    if (other := _of_another_peer(departure, comparison)) is not None:
        having, lacking = (comparison.name, "this rank") if too_many else ("this rank", comparison.name)
        peer = (comparison.there if too_many else comparison.here).peer(other)
        which = "it" if too_many else "another message"
        return (
            f"does {which} name the wrong peer? There {having} has {other.bare} for rank {peer}, which {lacking} lacks."
        )
    also = f", or only posted {'earlier' if too_many else 'later'} than in {comparison.name}"
    follows = "all later messages in that direction between the two ranks meet the wrong partners"
    if comparison.here.observed:
        follows += f", and the names of the messages that follow on this channel may be shifted by {_number(count)}"
    return (
        f"is {'it' if count == 1 else 'each of them'} {'posted once too often' if too_many else 'left out'}"
        f"{also if departure.is_open else ''}? {'In the first case' if departure.is_open else 'Then'} {follows}."
    )


def _of_another_peer(departure: Departure, comparison: Comparison) -> Op | None:
    """A message that would make up for one too many or too few at its place, if it had another peer."""
    here, like = departure.here, departure.there if departure.surplus < 0 else departure.here
    if here is None or like is None:
        raise AssertionError("messages too many or too few have a place")
    computes = len(_computes_around(here, comparison.here)[0])
    own, others = (
        [(schedule.peer(op), op) for *_, op in _between(schedule, here.rank, computes) if op.kind is like.op.kind]
        for schedule in (comparison.here, comparison.there)
    )
    more, fewer = (others, own) if departure.surplus > 0 else (own, others)
    counts = Counter(peer for peer, _ in fewer)
    counts.subtract(peer for peer, _ in more)
    return next((op for peer, op in more if counts[peer] < 0), None)


def _number(count: int) -> str:
    return "one" if count == 1 else str(count)


def _of_collectives(departure: Departure) -> str:
    if departure.here is None or departure.there is None:
        return "does a member of the group leave a collective out, or launch one too many?"
    return "are collectives launched from several streams or threads, whose order differs from rank to rank?"


_MESSAGE = SENDS | RECEIVES


def _of_slots(departure: Departure, comparison: Comparison) -> str:
    if departure.here is None or departure.there is None:
        raise AssertionError("slots are compared one by one")
    one = comparison.here.programs[departure.rank][departure.here.slot]
    other = comparison.there.programs[departure.rank][departure.there.slot]
    ours, theirs = ({op.bare for op in slot} for slot in (one, other))
    messages = one[0].kind in _MESSAGE, other[0].kind in _MESSAGE
    if one[0].kind in COLLECTIVES or other[0].kind in COLLECTIVES:
        return "is a collective launched earlier or later?"
    if messages == (True, True) and ours < theirs:
        return "are messages posted one by one and not as one batch? Then another order at the peer can block them."
    if messages == (True, True):
        return "are messages of two steps posted as one batch, or with no wait between them?"
    if messages == (False, False):
        if {op.kind for op in ours ^ theirs} == {W}:
            return "does one of the two run B and W in one call of the engine, and the other in two calls?"
        if ours < theirs:
            return (
                "do the F and B of a pair run one after the other? If a method overlaps them, name it with --together."
            )
        return "are computes in one slot that should be in several?"
    return "is a batch of messages posted earlier or later?"
