"""From the flow of tensors to stages, lanes and microbatches.

The activation that a forward takes, and the gradient that its backward takes, are votes on which module's output
becomes which module's input.  The modules then form one chain for each lane, and a module's position in its chain is
its stage. A microbatch is counted at the start of its lane and keeps its number from forward to forward.  A single
misdirected message is outvoted, so it appears as such and does not change the chain.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dualpipe.record.events import Forward, ForwardId, Message, MessageId, ModuleId, RankLog, RecordError
from dualpipe.record.lanes import Holder, Lanes, chains_of
from dualpipe.record.microbatches import drop_evaluations, number
from dualpipe.record.phrases import counted
from dualpipe.schedule import Chunk, Kind, Lane, Op, Task


@dataclass(frozen=True)
class Lineage:
    """The lanes, the task of every forward that belongs to one, and notes.

    ``data`` are the receives of tensors that forwards take but no stage computed: inputs, labels, masks.
    """

    routes: Mapping[Lane, tuple[int, ...]]
    tasks: Mapping[ForwardId, Task]
    data: frozenset[MessageId]
    notes: tuple[str, ...]

    def op(self, kind: Kind, log: RankLog, forward: int) -> Op | None:
        """The op of this kind for the task of a rank's forward, or ``None`` if the forward is in no lane."""
        task = self.tasks.get(ForwardId(log.rank, log.find(forward)))
        return None if task is None else Op(kind, *task)


def match(messages: Sequence[Message]) -> dict[MessageId, MessageId]:
    """The partner of every matched message end: on each channel the k-th send matches the k-th receive."""
    ends: dict[tuple[object, ...], tuple[list[MessageId], list[MessageId]]] = defaultdict(lambda: ([], []))
    for message in messages:
        ends[message.channel][0 if message.send else 1].append(message.id)
    partner: dict[MessageId, MessageId] = {}
    for sends, receives in ends.values():
        for one, other in zip(sends, receives, strict=False):
            partner[one], partner[other] = other, one
    return partner


def reordered(
    messages: Mapping[MessageId, Message], partner: Mapping[MessageId, MessageId], counted: Collection[MessageId]
) -> list[Message]:
    """The counted sends that, by the order of posting between their ranks, meet a receive of another process group.

    A schedule file has one order between two ranks.  Each process group of a program has its own.
    """
    ends: dict[tuple[object, ...], tuple[list[MessageId], list[MessageId]]] = defaultdict(lambda: ([], []))
    for id in sorted(counted):
        sender, receiver, *_ = messages[id].channel
        ends[sender, receiver][0 if messages[id].send else 1].append(id)
    return [
        messages[one]
        for sends, receives in ends.values()
        for one, other in zip(sends, receives, strict=False)
        if partner.get(one) != other and messages[one].group != messages[other].group
    ]


def trace(
    logs: Sequence[RankLog],
    messages: Mapping[MessageId, Message],
    partner: Mapping[MessageId, MessageId],
    lanes: Lanes | None = None,
) -> Lineage:
    """The stage, lane and microbatch of every forward.

    Raises ``RecordError`` if the modules form no chains, unless ``lanes`` says which they form.
    """
    forwards = {f.id: f for log in logs for f in log.forwards.values()}
    data = _find_data(forwards.values(), messages, partner)
    before: dict[ForwardId, ForwardId] = {}
    votes: dict[tuple[ForwardId, ForwardId], None] = {}
    for forward in forwards.values():
        origins = list(forward.after)
        for id in forward.messages:
            sent = _send_of(id, messages, partner)
            origins += sent.activation_of if sent is not None and not sent.gradient_of else []
        origins = [o for o in origins if o in forwards and o != forward.id]
        if origins:
            before[forward.id] = origins[0]
        votes.update(dict.fromkeys((origin, forward.id) for origin in origins))
        for id in forward.gradients:
            sent = _send_of(id, messages, partner)
            for later in sent.gradient_of if sent is not None else []:
                if later in forwards:
                    votes[forward.id, later] = None
    module_of = _modules(logs, forwards, votes, messages, partner)
    used = {earlier for earlier, _ in votes}
    used |= {forward for m in messages.values() for forward in (*m.activation_of, *m.gradient_of)}
    for isolated in _isolated(forwards, module_of, used):
        del module_of[isolated]
    notes = [*_notes_on_data(data, messages, partner), *_notes_on_left_out(forwards, module_of)]
    if lanes is None:
        observed = _chains(logs, forwards, module_of, votes, data)
        lanes = {lane: tuple(Holder(rank) for rank, _ in chain) for lane, chain in zip(Lane, observed, strict=False)}
        chains: list[list[ModuleId | None]] = [[*chain] for chain in observed]
    else:
        chains = chains_of(lanes, forwards, module_of, messages)
    routes = {lane: tuple(rank for rank, _ in holders) for lane, holders in lanes.items()}
    chunk_of: dict[ModuleId, Chunk] = {}
    for lane, chain in zip(Lane, chains, strict=False):
        chunk_of |= {module: Chunk(lane, stage) for stage, module in enumerate(chain) if module is not None}
    module_of = {forward: module for forward, module in module_of.items() if module in chunk_of}
    tasks, on_order = number(forwards, module_of, chunk_of, chains, before)
    tasks, on_evaluations = drop_evaluations(forwards, module_of, tasks)
    return Lineage(routes, tasks, data, (*notes, *on_order, *on_evaluations))


def _send_of(
    id: MessageId, messages: Mapping[MessageId, Message], partner: Mapping[MessageId, MessageId]
) -> Message | None:
    """The send that a receive was matched with."""
    return messages.get(partner[id]) if id in partner else None


def _find_data(
    forwards: Collection[Forward], messages: Mapping[MessageId, Message], partner: Mapping[MessageId, MessageId]
) -> frozenset[MessageId]:
    """The receives that give a forward a tensor that no stage made.

    Raises ``RecordError`` if a forward takes nothing else and sends a gradient back: then it takes an activation.
    """
    back = {(forward, m.peer): m for m in messages.values() for forward in m.gradient_of}
    found: set[MessageId] = set()
    for forward in forwards:
        sent = {id: _send_of(id, messages, partner) for id in forward.messages}
        other = {id for id, s in sent.items() if s is not None and not s.activation_of and not s.gradient_of}
        if other and len(other) == len(sent) and not forward.after:
            for id in sorted(other):
                if (forward.id, messages[id].peer) in back:
                    send = messages[partner[id]]
                    raise RecordError(
                        "a stage's activation is the output of a torch.nn.Module call",
                        f"rank {forward.id.rank} starts a forward at {forward.at} from what rank {send.id.rank} sends "
                        f"at {send.at}, which is the output of no module call",
                        "put the stage's computation into a module",
                    )
        found |= other
    return frozenset(found)


def _notes_on_data(
    data: Collection[MessageId], messages: Mapping[MessageId, Message], partner: Mapping[MessageId, MessageId]
) -> list[str]:
    sent = [(messages[partner[id]], id.rank) for id in data]
    places = sorted({(send.id.rank, send.at, other, bool(send.passed_on)) for send, other in sent})
    return [
        f"rank {one} passes on to a forward of rank {other}, at {at}, what it received; it is taken for data"
        if passed_on
        else f"no module call made what rank {one} sends at {at} to a forward of rank {other}; it is taken for data"
        for one, at, other, passed_on in places
    ]


def _modules(
    logs: Sequence[RankLog],
    forwards: Mapping[ForwardId, Forward],
    votes: Mapping[tuple[ForwardId, ForwardId], None],
    messages: Mapping[MessageId, Message],
    partner: Mapping[MessageId, MessageId],
) -> dict[ForwardId, ModuleId]:
    """The module of every forward in the pipeline, that is, one whose module exchanges tensors in some forward.

    A forward that starts with a part of a module belongs to the whole module.  If no tensor was exchanged at all, the
    forwards count whose rank was waiting for a message before their backward.
    """
    joined = {forward for vote in votes for forward in vote}
    joined |= {forward for m in messages.values() for forward in (*m.activation_of, *m.gradient_of)}
    joined |= {f.id for f in forwards.values() if f.messages or f.gradients}
    if joined.isdisjoint(forwards):
        waiting = {m.id.rank for m in messages.values() if m.id not in partner}
        joined |= {f.id for f in forwards.values() if f.id.rank in waiting and not f.backward_began}
    called: dict[int, set[int]] = defaultdict(set)
    for forward in joined:
        if forward in forwards:
            called[forward.rank].add(forwards[forward].module)
    whole: dict[ModuleId, ModuleId] = {}
    for rank, modules in called.items():
        for module in modules:
            holders = [m for m in modules if module in logs[rank].modules[m][1]]
            largest = max(holders, key=lambda m: len(logs[rank].modules[m][1]), default=module)
            whole[ModuleId(rank, module)] = ModuleId(rank, largest)
    own = {f.id: ModuleId(f.id.rank, f.module) for f in forwards.values()}
    return {forward: whole[module] for forward, module in own.items() if module in whole}


def _isolated(
    forwards: Mapping[ForwardId, Forward], module_of: Mapping[ForwardId, ModuleId], used: Collection[ForwardId]
) -> list[ForwardId]:
    """Forwards that exchange nothing and change no weight gradient, such as trial runs for shapes.

    The last ones of a module are kept, because a program that hangs there would have used them.
    """
    isolated: list[ForwardId] = []
    active: set[ModuleId] = set()
    for id in sorted(module_of, reverse=True):
        forward = forwards[id]
        if forward.messages or forward.after or forward.gradients or forward.weights or id in used:
            active.add(module_of[id])
        elif module_of[id] in active:
            isolated.append(id)
    return isolated


def _notes_on_left_out(forwards: Mapping[ForwardId, Forward], module_of: Mapping[ForwardId, ModuleId]) -> list[str]:
    """Notes on forwards outside the pipeline, such as a reference run."""
    apart: dict[str, list[int]] = defaultdict(list)
    for forward in forwards.values():
        if forward.id not in module_of:
            apart[forward.at].append(forward.id.rank)
    return [
        counted(
            len(ranks),
            f"forward at {at} ({_ranks(ranks)}) exchanges nothing with other ranks or stages and is left out",
            f"forwards at {at} ({_ranks(ranks)}) exchange nothing with other ranks or stages and are left out",
        )
        for at, ranks in sorted(apart.items())
    ]


def _ranks(ranks: Collection[int]) -> str:
    distinct = sorted(set(ranks))
    return f"rank{'s' * (len(distinct) > 1)} {' '.join(map(str, distinct))}"


def _unfollowed(logs: Sequence[RankLog]) -> RecordError | None:
    """Why no message has the output of a module, if forwards take tensors that messages cannot be followed to."""
    how = {
        "outside": "was made outside of torch's operators (NumPy, a list)",
        "object": "was in a pickled object",
        "collective": "is the result of a collective",
    }
    for log in logs:
        for forward, arrival, at, _, backward in log.taken:
            if log.find(forward) in log.forwards and not backward:
                return RecordError(
                    "a stage takes its input from a point-to-point message of tensors",
                    f"rank {log.rank} starts a forward at {at} from a tensor that {how[log.arrivals[arrival].how]}, "
                    "which is not followed",
                    "record it with tensors that are sent and received themselves",
                )
    return None


def _chains(
    logs: Sequence[RankLog],
    forwards: Mapping[ForwardId, Forward],
    module_of: Mapping[ForwardId, ModuleId],
    votes: Mapping[tuple[ForwardId, ForwardId], None],
    data: Collection[MessageId],
) -> list[list[ModuleId]]:
    """The modules of each lane in the order of stages; the lane that starts at the lower rank first."""
    modules = sorted(set(module_of.values()))
    if not modules and (unfollowed := _unfollowed(logs)) is not None:
        raise unfollowed
    if not modules:
        raise RecordError(
            "a pipeline sends activations from rank to rank",
            "no message has the output of a module call",
            "record a program whose stages are torch.nn.Module calls and that sends what they return",
        )
    ballot: dict[ModuleId, Counter[ModuleId]] = {module: Counter() for module in modules}
    for earlier, later in votes:
        if earlier in module_of and later in module_of and module_of[earlier] != module_of[later]:
            ballot[module_of[later]][module_of[earlier]] += 1
    _check_joins(forwards, module_of, votes)
    fed = Counter(module_of[o] for o, f in forwards.items() if o in module_of and (f.after or {*f.messages} - {*data}))
    total = Counter(module_of.values())
    previous: dict[ModuleId, ModuleId | None] = {}
    for module in modules:
        choice = ballot[module].most_common(1)
        reads_data = 2 * fed[module] < total[module] or not choice
        previous[module] = None if reads_data else choice[0][0]
    following: dict[ModuleId, ModuleId] = {}
    for module, sender in previous.items():
        if sender is None:
            continue
        if sender in following:
            one, other = _where(forwards, module_of, following[sender]), _where(forwards, module_of, module)
            raise RecordError(
                "a stage sends its output to one stage",
                f"{_where(forwards, module_of, sender)} sends to {one} and to {other}",
                "record a program without branches",
            )
        following[sender] = module
    chains = []
    for module in modules:
        if previous[module] is None:
            chain = [module]
            while chain[-1] in following:
                chain.append(following[chain[-1]])
            chains.append(chain)
    covered = {module for chain in chains for module in chain}
    lost = [module for module in modules if module not in covered]
    if lost:
        raise RecordError(
            "every stage is reached from data",
            f"{_where(forwards, module_of, lost[0])} is in a cycle of stages",
            "name its class with --container if it is one module for several stages, so that its parts are the stages",
        )
    if len(chains) > len(Lane):
        starts = ", ".join(_where(forwards, module_of, chain[0]) for chain in chains)
        raise RecordError(
            "a schedule has one lane or two",
            f"data enters at {len(chains)} places: {starts}",
            "give the ranks of one pipeline with --pipeline-ranks",
        )
    return sorted(chains, key=lambda chain: chain[0])


def _check_joins(
    forwards: Mapping[ForwardId, Forward],
    module_of: Mapping[ForwardId, ModuleId],
    votes: Mapping[tuple[ForwardId, ForwardId], None],
) -> None:
    """Raise ``RecordError`` if most forwards of a module take the outputs of two other modules, as skips do."""
    origins: dict[ForwardId, set[ModuleId]] = defaultdict(set)
    for earlier, later in votes:
        if earlier in module_of and later in module_of and module_of[earlier] != module_of[later]:
            origins[later].add(module_of[earlier])
    total, several = Counter(module_of.values()), Counter(module_of[f] for f, made in origins.items() if len(made) > 1)
    for module, count in sorted(several.items()):
        if 2 * count > total[module] and count > 1:
            later = next(f for f, made in origins.items() if module_of[f] == module and len(made) > 1)
            one, other, *_ = sorted(origins[later])
            raise RecordError(
                "a stage takes the output of one stage",
                f"{_where(forwards, module_of, module)} takes that of {_where(forwards, module_of, one)} and that of "
                f"{_where(forwards, module_of, other)}",
                "record a program without branches",
            )


def _where(forwards: Mapping[ForwardId, Forward], module_of: Mapping[ForwardId, ModuleId], module: ModuleId) -> str:
    at = next(f.at for f in forwards.values() if module_of.get(f.id) == module)
    return f"the module that rank {module.rank} calls at {at}"
