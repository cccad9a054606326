"""The costs of a measured run, from the traces that torch.profiler wrote on its ranks.

A range whose name is an op, such as ``1F3>`` or ``1B3>+1W3>``, is a time of its stage.  ``dualpipe record`` names the
ranges in the traces of a program; a program may also name ranges so itself, by ``torch.profiler.record_function``.
Where a trace has such ranges on a GPU as well, those count.

====================================  ===============================================================================
name                                  what is measured
====================================  ===============================================================================
``1F3>``, ``1B3>``, ``1W3>``          F, B, W
``1B3>+1W3>``                         a full backward
``1F3> continued``                    more of the last ``1F3>``
``1W3> part``                         more of the next W of that name
``1W3> ends``                         W: its parts, or else the time since the end of the range before it on this rank
``post 1SF3>@2``, ``wait 2RF3>@1``    latency: from the post of the other end to the end of the wait, if that waited
                                      from before that post
====================================  ===============================================================================

Latencies are measured only between ranks of the same host, which share a clock.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dualpipe.errors import RuleError
from dualpipe.schedule import COMPUTE, MESSAGES, RB, RECEIVES, RF, SB, SF, B, F, Kind, Op, Slot, W
from dualpipe.schedule.text import parse_ops
from dualpipe.timeline import measured_costs
from dualpipe.timeline.measured_costs import Event, Measured, StageTimes, check_stages, times_of

_NAME = re.compile(r"(?:(post|wait) )?(\S+?)(?: (continued|part|ends))?")
_UNNAMED = re.compile(r"dualpipe:[0-9]+")
_MICROSECOND = 1e-6
_GZIP = b"\x1f\x8b"
_SUFFIXES = (".json", ".json.gz")
_RULE = (
    "--cost-from is a trace of `dualpipe verify --trace`, or the torch.profiler traces of a recorded program's ranks"
)
_OTHER_END = {SF: (RF, 1), RF: (SF, -1), SB: (RB, -1), RB: (SB, 1)}
"""For each kind of message the kind of its other end, and the difference between the stages of the two ends."""


class Range(NamedTuple):
    """A range of a trace, in microseconds: its ops, and the word that its name has besides, or an empty one."""

    start: float
    end: float
    ops: Slot
    word: str


@dataclass(frozen=True)
class Profile:
    """What one trace says: the rank that wrote it, its host, and its ranges in order of time."""

    rank: object
    host: str
    ranges: Sequence[Range]


def read(paths: Sequence[Path]) -> Measured:
    """The costs in one trace of ``dualpipe verify``, or in traces of torch.profiler, one or more for each rank.

    For a folder, all traces in it are read.  Raises ``RuleError`` for other files, and for traces that lack a stage,
    all forwards or all backwards.
    """
    files = list(dict.fromkeys(file.resolve() for path in paths for file in _files(path)))
    contents = {file: _load(file) for file in files}
    if len(contents) == 1 and _is_of_verify(*contents.values()):
        return measured_costs.read(files[0])
    return _measured([_profile(file, content) for file, content in contents.items()])


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES))
    if not found:
        raise RuleError(_RULE, f"{path} has no file that ends in {' or '.join(_SUFFIXES)}", "name the traces")
    return found


def _load(path: Path) -> Mapping[str, Any]:
    try:
        data = path.read_bytes()
        content = json.loads(gzip.decompress(data) if data.startswith(_GZIP) else data)
        if not isinstance(content["traceEvents"], list):
            raise TypeError
    except OSError as error:
        raise RuleError(_RULE, f"{path}: {error.strerror or error}", "name another file") from error
    except (ValueError, KeyError, TypeError, EOFError, zlib.error) as error:
        raise RuleError(_RULE, f"{path} is not a trace", "name such traces") from error
    return dict(content)


def _is_of_verify(content: Mapping[str, Any]) -> bool:
    names = (e["args"].get("name") for e in content["traceEvents"] if _is(e, "process_name"))
    return any(name in (measured_costs.MEASURED, "simulated") for name in names)


def _is(event: Any, name: str) -> bool:
    return isinstance(event, dict) and event.get("name") == name and isinstance(event.get("args"), dict)


def _profile(path: Path, content: Mapping[str, Any]) -> Profile:
    found: dict[str, list[Range]] = {"user_annotation": [], "gpu_user_annotation": []}
    unnamed, process = 0, 0
    start = float(content.get("baseTimeNanoseconds") or 0) / 1000
    try:
        for event in content["traceEvents"]:
            if event.get("cat") in found and event.get("ph") == "X":
                unnamed += bool(_UNNAMED.fullmatch(event["name"]))
                if (each := _range(event, start)) is not None:
                    found[event["cat"]].append(each)
                    process = event["pid"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RuleError(_RULE, f"{path} has an event that torch.profiler does not write", "name such traces") from error
    on_cpu, on_gpu = found.values()
    computes = [each for each in on_gpu if each.ops[0].kind in COMPUTE]
    ranges = computes + [each for each in on_cpu if each.ops[0].kind in MESSAGES] if computes else on_cpu
    if not ranges:
        got = f"{path} has {unnamed} ranges of a recording whose ops have no names" if unnamed else f"{path} has none"
        fix = "run the program to its end under `dualpipe record`" if unnamed else _HOW
        raise RuleError("a torch.profiler trace has ranges that are named as ops, such as 1F3>", got, fix)
    about = content.get("distributedInfo")
    rank = about.get("rank") if isinstance(about, dict) else None
    host = str(content.get("host_name", ""))
    return Profile((host, process) if rank is None else rank, host, sorted(ranges, key=lambda each: each.start))


_HOW = "profile the program while it runs under `dualpipe record`, or name ranges with torch.profiler.record_function"


def _range(event: Event, start: float) -> Range | None:
    """The range of an event, or ``None`` if its name says nothing about ops."""
    found = _NAME.fullmatch(event["name"])
    ops = parse_ops(found.group(2)) if found else None
    if found is None or ops is None:
        return None
    before, after = found.group(1), found.group(3)
    if {op.kind in (MESSAGES if before else COMPUTE) for op in ops} != {True} or (before and after):
        return None
    began = start + float(event["ts"])
    return Range(began, began + float(event["dur"]), ops, before or after or "")


@dataclass
class _Samples:
    """Seconds of each stage by kind, and what could not be divided among ops."""

    of_stage: defaultdict[int, defaultdict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    undivided: int = 0

    def add(self, profile: Profile) -> None:
        last: dict[Op, list[float]] = {}  # the samples whose last one is of that op
        parts: dict[Op, float] = {}  # of a W that has not ended
        before = profile.ranges[0].start
        for each in profile.ranges:
            kind = _KINDS.get(tuple(op.kind for op in each.ops)) if len({op.task for op in each.ops}) == 1 else None
            if each.ops[0].kind in COMPUTE and kind is None:
                self.undivided += 1
            elif kind is not None:
                op, seconds = each.ops[0], (each.end - each.start) * _MICROSECOND
                if each.word == "part":
                    parts[op] = parts.get(op, 0.0) + seconds
                elif each.word == "continued" and op in last:
                    last[op][-1] += seconds
                else:
                    if each.word == "ends" and op not in parts:
                        seconds = (each.end - before) * _MICROSECOND
                    last[op] = self.of_stage[op.stage][kind]
                    last[op].append(seconds + parts.pop(op, 0.0))
            before = max(before, each.end)


_KINDS: dict[tuple[Kind, ...], str] = {(F,): "F", (B,): "B", (W,): "W", (B, W): "BW"}


def _measured(profiles: Sequence[Profile]) -> Measured:
    samples = _Samples()
    for profile in profiles:
        samples.add(profile)
    stages = {
        stage: StageTimes(*(times_of(kinds.get(kind, [])) for kind in StageTimes._fields))
        for stage, kinds in sorted(samples.of_stage.items())
    }
    _check_ranks(profiles, stages)
    check_stages(stages)
    latencies, apart = _latencies(profiles)
    remarks = []
    if samples.undivided:
        remarks.append(f"{samples.undivided} ranges with ops of several microbatches, or with F and B, are left out")
    if apart:
        remarks.append(f"{apart} messages between hosts are left out of the latency, since each host has its own clock")
    return Measured(len({profile.rank for profile in profiles}), stages, times_of(latencies), tuple(remarks))


def _check_ranks(profiles: Sequence[Profile], stages: Mapping[int, StageTimes]) -> None:
    """Raise ``RuleError`` if a stage exchanges messages with one that no trace has an op of."""
    for op in (op for profile in profiles for each in profile.ranges for op in each.ops if op.kind in MESSAGES):
        other = _other_end(op).stage
        if stages and other not in stages:
            got = f"got {op}, a message of stage {op.stage} with stage {other}, and no op of stage {other}"
            raise RuleError("--cost-from has the torch.profiler traces of all ranks", got, "add the missing ones")


def _other_end(op: Op) -> Op:
    kind, further = _OTHER_END[op.kind]
    return Op(kind, op.lane, op.stage + further, op.mb)


def _latencies(profiles: Sequence[Profile]) -> tuple[list[float], int]:
    """The seconds of the messages whose receivers waited from before they were sent, and how many cross hosts."""
    posts: defaultdict[Op, list[float]] = defaultdict(list)
    hosts: dict[Op, str] = {}
    for profile in profiles:
        for op, start in ((op, each.start) for each in profile.ranges if each.word == "post" for op in each.ops):
            posts[op.bare].append(start)
            hosts[op.bare] = profile.host
    for times in posts.values():
        times.sort()
    found, apart = [], 0
    for profile in profiles:
        for wait in (each for each in profile.ranges if each.word == "wait"):
            ends = [_other_end(op) for op in wait.ops]
            if any(hosts.get(end, profile.host) != profile.host for end in ends):
                apart += 1
                continue
            posted = max((time for end in ends if (time := _last(posts[end], wait.end)) is not None), default=None)
            if posted is not None and posted >= wait.start and any(op.kind in RECEIVES for op in wait.ops):
                found.append((wait.end - posted) * _MICROSECOND)
    return found, apart


def _last(times: Sequence[float], before: float) -> float | None:
    """The last of sorted times that is not after another one."""
    count = bisect_right(times, before)
    return times[count - 1] if count else None
