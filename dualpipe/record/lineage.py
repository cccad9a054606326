"""Who hands on to whom: from the flow of tensors to stages, lanes and microbatches.

A *chunk* is the part of the model that one module on one rank is.  Where a forward takes an activation from, and whose
gradient its backward takes, are votes on which chunk comes before which.  The chunks then make one chain for each lane,
and a chunk's place in its chain is its stage.  A microbatch is counted where its lane begins, and keeps its number from
forward to forward.  One misdirected message is outvoted, so it shows as what it is and does not bend the chain.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from dualpipe.record.data import find_data, notes_on_data, sent_to
from dualpipe.record.events import Forward, Message, MessageId, Owner, RankLog, RecordError
from dualpipe.record.microbatches import number, set_evaluations_aside
from dualpipe.record.names import Chunk, Lineage
from dualpipe.schedule import Lane


def match(messages: Sequence[Message]) -> dict[MessageId, MessageId]:
    """For every message end its partner: on each channel the k-th send meets the k-th receive."""
    ends: dict[tuple[object, ...], tuple[list[MessageId], list[MessageId]]] = defaultdict(lambda: ([], []))
    for message in messages:
        ends[message.channel][0 if message.send else 1].append(message.id)
    partner: dict[MessageId, MessageId] = {}
    for sends, receives in ends.values():
        for one, other in zip(sends, receives, strict=False):
            partner[one], partner[other] = other, one
    return partner


def trace(
    logs: Sequence[RankLog], messages: Mapping[MessageId, Message], partner: Mapping[MessageId, MessageId]
) -> Lineage:
    """Stages, lanes and microbatches of every forward.  Raises ``RecordError`` where there is no such order."""
    forwards = {f.owner: f for log in logs for f in log.forwards.values()}

    data = find_data(forwards.values(), messages, partner)
    before: dict[Owner, Owner] = {}
    votes: dict[tuple[Owner, Owner], None] = {}
    for forward in forwards.values():
        origins = list(forward.after)
        for id in forward.messages:
            sent = sent_to(id, messages, partner)
            origins += sent.activation_of if sent is not None and not sent.gradient_of else []
        origins = [o for o in origins if o in forwards and o != forward.owner]
        if origins:
            before[forward.owner] = origins[0]
        votes.update(dict.fromkeys((origin, forward.owner) for origin in origins))
        for id in forward.gradients:
            sent = sent_to(id, messages, partner)
            for later in sent.gradient_of if sent is not None else []:
                if later in forwards:
                    votes[forward.owner, later] = None
    chunk_of = _chunks(logs, forwards, votes, messages, partner)
    used = {earlier for earlier, _ in votes}
    used |= {owner for m in messages.values() for owner in (*m.activation_of, *m.gradient_of)}
    for owner in _dry(forwards, chunk_of, used):
        del chunk_of[owner]
    notes = [*notes_on_data(data, messages, partner), *_aside(forwards, chunk_of)]
    chains = _chains(forwards, chunk_of, votes, data)
    routes = {lane: tuple(rank for rank, _ in chain) for lane, chain in zip(Lane, chains, strict=False)}
    place = {
        chunk: (lane, stage) for lane, chain in zip(Lane, chains, strict=False) for stage, chunk in enumerate(chain)
    }
    names, more = number(forwards, chunk_of, place, chains, before)
    names, aside = set_evaluations_aside(forwards, chunk_of, names)
    return Lineage(routes, names, data, (*notes, *more, *aside))


def _chunks(
    logs: Sequence[RankLog],
    forwards: Mapping[Owner, Forward],
    votes: Mapping[tuple[Owner, Owner], None],
    messages: Mapping[MessageId, Message],
    partner: Mapping[MessageId, MessageId],
) -> dict[Owner, Chunk]:
    """The chunk of every forward that is part of the pipeline: it, or another one of its module, exchanges tensors.

    A forward that begins with a part of a module is of the chunk that the whole module is.  Where nothing was exchanged
    at all, the forwards count that were to hand something on when their rank got stuck.
    """
    joined = {owner for vote in votes for owner in vote}
    joined |= {owner for m in messages.values() for owner in (*m.activation_of, *m.gradient_of)}
    joined |= {f.owner for f in forwards.values() if f.messages or f.gradients}
    if joined.isdisjoint(forwards):
        stuck = {m.id.rank for m in messages.values() if m.id not in partner}
        joined |= {f.owner for f in forwards.values() if f.owner.rank in stuck and not f.behind}
    called: dict[int, set[int]] = defaultdict(set)
    for owner in joined:
        if owner in forwards:
            called[owner.rank].add(forwards[owner].module)
    whole: dict[Chunk, Chunk] = {}
    for rank, modules in called.items():
        for module in modules:
            holders = [m for m in modules if module in logs[rank].modules[m][1]]
            largest = max(holders, key=lambda m: len(logs[rank].modules[m][1]), default=module)
            whole[rank, module] = (rank, largest)
    return {f.owner: whole[f.owner.rank, f.module] for f in forwards.values() if (f.owner.rank, f.module) in whole}


def _dry(forwards: Mapping[Owner, Forward], chunk_of: Mapping[Owner, Chunk], used: Collection[Owner]) -> list[Owner]:
    """Forwards that begin from nothing and end in nothing, though later ones go on: trials of shapes, for example.

    They take nothing from another stage, hand nothing on either way and add to no weight gradient.

    The last ones of a stage are kept: a program that hangs there had more to do with them.
    """
    dry: list[Owner] = []
    busy: set[Chunk] = set()
    for owner in sorted(chunk_of, reverse=True):
        forward = forwards[owner]
        if forward.messages or forward.after or forward.gradients or forward.weights or owner in used:
            busy.add(chunk_of[owner])
        elif chunk_of[owner] in busy:
            dry.append(owner)
    return dry


def _aside(forwards: Mapping[Owner, Forward], chunk_of: Mapping[Owner, Chunk]) -> list[str]:
    """What was computed beside the pipeline, such as a reference run: no tensor of it travels."""
    apart: dict[str, list[int]] = defaultdict(list)
    for forward in forwards.values():
        if forward.owner not in chunk_of:
            apart[forward.at].append(forward.owner.rank)
    return [
        f"{len(ranks)} forwards at {at} ({_ranks(ranks)}) exchange nothing with other ranks or stages and are left out"
        for at, ranks in sorted(apart.items())
    ]


def _ranks(ranks: Collection[int]) -> str:
    distinct = sorted(set(ranks))
    return f"rank{'s' * (len(distinct) > 1)} {' '.join(map(str, distinct))}"


def _chains(
    forwards: Mapping[Owner, Forward],
    chunk_of: Mapping[Owner, Chunk],
    votes: Mapping[tuple[Owner, Owner], None],
    data: Collection[MessageId],
) -> list[list[Chunk]]:
    """The chunks of each lane in order of stages; the lane that enters at the lower rank first."""
    chunks = sorted(set(chunk_of.values()))
    if not chunks:
        raise RecordError(
            "a pipeline hands activations from rank to rank",
            "no message holds what a module call made",
            "record a program whose stages are torch.nn.Module calls and that sends what they return",
        )
    ballot: dict[Chunk, Counter[Chunk]] = {chunk: Counter() for chunk in chunks}
    for earlier, later in votes:
        if earlier in chunk_of and later in chunk_of and chunk_of[earlier] != chunk_of[later]:
            ballot[chunk_of[later]][chunk_of[earlier]] += 1
    fed = Counter(chunk_of[o] for o, f in forwards.items() if o in chunk_of and (f.after or {*f.messages} - {*data}))
    total = Counter(chunk_of.values())
    previous: dict[Chunk, Chunk | None] = {}
    for chunk in chunks:
        choice = ballot[chunk].most_common(1)
        enters = 2 * fed[chunk] < total[chunk] or not choice
        previous[chunk] = None if enters else choice[0][0]
    following: dict[Chunk, Chunk] = {}
    for chunk, earlier_chunk in previous.items():
        if earlier_chunk is None:
            continue
        if earlier_chunk in following:
            one, other = _where(forwards, chunk_of, following[earlier_chunk]), _where(forwards, chunk_of, chunk)
            raise RecordError(
                "a stage hands on to one stage",
                f"{_where(forwards, chunk_of, earlier_chunk)} hands on to {one} and to {other}",
                "record a program without branches",
            )
        following[earlier_chunk] = chunk
    chains = []
    for chunk in chunks:
        if previous[chunk] is None:
            chain = [chunk]
            while chain[-1] in following:
                chain.append(following[chain[-1]])
            chains.append(chain)
    covered = {chunk for chain in chains for chunk in chain}
    lost = [chunk for chunk in chunks if chunk not in covered]
    if lost:
        raise RecordError(
            "every stage is reached from data",
            f"{_where(forwards, chunk_of, lost[0])} is on a circle of stages",
            "record a program in which a microbatch passes each stage once",
        )
    if len(chains) > len(Lane):
        starts = ", ".join(_where(forwards, chunk_of, chain[0]) for chain in chains)
        raise RecordError(
            "a schedule has one lane or two",
            f"data enters at {len(chains)} places: {starts}",
            "record one pipeline alone, without data parallelism",
        )
    return sorted(chains, key=lambda chain: chain[0])


def _where(forwards: Mapping[Owner, Forward], chunk_of: Mapping[Owner, Chunk], chunk: Chunk) -> str:
    at = next(f.at for f in forwards.values() if chunk_of.get(f.owner) == chunk)
    return f"the module that rank {chunk[0]} calls at {at}"
