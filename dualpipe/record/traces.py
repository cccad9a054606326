"""Names the ranges that the recorder has put into the program's torch.profiler traces.

==========================  =========================================================================================
name                        range
==========================  =========================================================================================
``1F3>``                    the outermost module call of a forward; later calls of it are ``1F3> continued``
``1B3>+1W3>``               a run of the autograd engine, with what it computed
``1W3> part``               a run of the engine with some weight gradients, before the one with the last
``1W3> ends``               the instant of the last weight gradient, where the program adds it without the engine
``post 1SB3>@0+1RF4>@0``    the instant at which messages were posted
``wait 1RF4>@0``            a wait for messages
==========================  =========================================================================================
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from dualpipe.files import write_whole
from dualpipe.record.events import Event, ForwardId, MessageId, RankLog, RecordError
from dualpipe.record.failures import Codes
from dualpipe.record.lanes import Lanes
from dualpipe.record.pipelines import Ranks, select
from dualpipe.record.recording import Recording, assemble
from dualpipe.record.slots import last_weights, weights_without_backward
from dualpipe.record.steps import computing_steps, select_step
from dualpipe.schedule import B, F, Kind, Op, W, show_slot

_NUMBERED = re.compile(rb'"dualpipe:([0-9]+)"')
_GZIP = b"\x1f\x8b"


def name_ranges(logs: Sequence[RankLog], ranks: Ranks = (), lanes: Lanes | None = None, codes: Codes = ()) -> list[str]:
    """Give the ranges in all traces the names of their ops, in every training step; returns notes.

    ``ranks`` are those of one pipeline of the job, whose traces are named; empty for all.
    """
    paths = {log.rank: [Path(e["path"]) for e in log.events if e["event"] == "trace"] for log in logs}
    if not any(paths.values()):
        return []
    numbered = ranks or tuple(range(len(logs)))
    own = select(logs, ranks) if ranks else logs
    own_codes = [codes[rank] for rank in ranks] if ranks and codes else codes
    names: dict[int, dict[int, str]] = {rank: {} for rank in numbered}
    notes: list[str] = []
    for count, step in enumerate(computing_steps(own), start=1):
        selected = select_step(own, step)
        if not any(event["event"] == "range" for log in selected for event in log.events):
            continue
        try:
            recording = assemble(own, step=count, lanes=lanes, codes=own_codes)
        except RecordError as error:
            notes.append(f"the ranges of step {count} in the profiler's traces have no names: {error}")
            continue
        for rank, log in zip(numbered, selected, strict=True):
            names[rank] |= dict(_names(log, recording))
    written = [path for rank in numbered for path in dict.fromkeys(paths[rank]) if _rewrite(path, names[rank])]
    if written:
        notes.append(f"named the ops in {len(written)} traces of torch.profiler, as in {written[0]}")
    return notes


def _rewrite(path: Path, names: Mapping[int, str]) -> bool:
    """Put the names into a trace; returns whether it had ranges.  One that the program has removed is left out."""
    try:
        data = path.read_bytes()
        zipped = data.startswith(_GZIP)
        text = gzip.decompress(data) if zipped else data
    except (OSError, EOFError, zlib.error):
        return False

    def named(found: re.Match[bytes]) -> bytes:
        name = names.get(int(found.group(1)))
        return found.group() if name is None else json.dumps(name).encode()

    renamed, count = _NUMBERED.subn(named, text)
    if count:
        write_whole(path, gzip.compress(renamed) if zipped else renamed)
    return bool(count)


def _names(log: RankLog, recording: Recording) -> Iterator[tuple[int, str]]:
    """The number and the name of every range of one rank's step that belongs to an op."""
    begun: set[Op] = set()
    for index, event in enumerate(log.events):
        if event["event"] != "range":
            continue
        match event["what"]:
            case "call":
                ops = _ops(F, log, event["numbers"], recording)
                continued = " continued" if begun.issuperset(ops) else ""
                begun.update(ops)
                name = f"{show_slot(tuple(ops))}{continued}" if ops else ""
            case "run":
                name = _run_name(log, event["numbers"][0], recording)
            case "weights":
                last = last_weights(log)
                ended = [f for f in event["numbers"] if last.get(log.find(f)) == index - 1]
                ops = _ops(W, log, ended, recording)
                name = f"{show_slot(tuple(ops))} ends" if ops else ""
            case what:
                ids = [MessageId(log.rank, number) for number in event["numbers"]]
                ops = list(dict.fromkeys(recording.messages[id] for id in ids if id in recording.messages))
                name = f"{what} {show_slot(tuple(ops))}" if ops else ""
        if name:
            yield event["number"], name


def _run_name(log: RankLog, run: int, recording: Recording) -> str:
    """What a run of the engine computed; W is in the run with the last of its gradients, as in the schedule."""
    last, alone = last_weights(log), weights_without_backward(log)
    backwards: list[int] = []
    weights: list[int] = []
    parts: list[int] = []
    for index, event in enumerate(log.events):
        if event.get("run") != run:
            continue
        if event["event"] == "backward":
            backwards += event["forwards"]
            weights += [*event["untrainable"], *event.get("sharded", ())]
        elif event["event"] in ("weights", "weights requested"):
            for forward in event["forwards"]:
                (weights if last.get(log.find(forward)) == index else parts).append(forward)
            backwards += _first_stage(event, index, log, alone, recording)
    ops = [*_ops(B, log, backwards, recording), *_ops(W, log, weights, recording)]
    if ops or not (some := _ops(W, log, parts, recording)):
        return show_slot(tuple(ops))
    return f"{show_slot(tuple(some))} part"


def _first_stage(
    event: Event, index: int, log: RankLog, alone: Mapping[int, int], recording: Recording
) -> Collection[int]:
    """Forwards of stage 0 whose backward is this run, which computes only gradients of weights."""
    found = [forward for forward in event["forwards"] if alone.get(log.find(forward)) == index]
    return [f for f in found if any(op.stage == 0 for op in _ops(B, log, [f], recording))]


def _ops(kind: Kind, log: RankLog, forwards: Sequence[int], recording: Recording) -> list[Op]:
    """The ops of forwards that are part of the pipeline, each once."""
    found = (recording.tasks.get(ForwardId(log.rank, log.find(forward))) for forward in forwards)
    return list(dict.fromkeys(Op(kind, *task) for task in found if task is not None))
