"""Reads the schedules of Piper (uw-syfi/piper): its directives, from JSON.

===========  ===========================================================================================
op           what is read
===========  ===========================================================================================
place        the devices of a stage: ``{"op": "place", "filter": {"PP": 0}, "devices": [0, 2]}``
split        the microbatches: ``{"op": "split", "filter": {}, "dim_name": "MB", "num_microbatches": 4}``
order        the order of one rank: groups of ``{"PP": 0, "MB": 1, "PASS": "F"}``, where ``PASS`` is F, B (a full
             backward), BI or BW; a group of several becomes a slot
others       nothing: ``replicate`` and ``shard`` concern the ranks of data and expert parallelism
===========  ===========================================================================================

The sets of devices, in ascending order, are the ranks, as in Piper's compiler.  That compiler also adds the messages;
here ``lower`` adds them.  Piper itself is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dualpipe.schedule.computes import one_lane
from dualpipe.schedule.op import UP, B, F, Kind, Op, ScheduleError, Slot, W
from dualpipe.schedule.value import Schedule

_KINDS: dict[str, tuple[Kind, ...]] = {"F": (F,), "B": (B, W), "BI": (B,), "BW": (W,)}
_IN_SLOT = {F: 0, B: 1, W: 2}
Directive = Mapping[str, Any]
Devices = tuple[int, ...]


def from_directives(directives: Iterable[Directive], name: str = "", stage: str = "PP") -> Schedule:
    """The schedule of Piper's directives, with one lane; ``stage`` is the model's tag for pipeline stages.

    Raises
    ------
    ScheduleError
        If a filter is not one pass of one microbatch at one stage; if a stage has no ``place`` or two; if a rank has no
        ``order`` or several; and if the order cannot be run (raised by ``lower``).
    """
    given = list(directives)
    devices = _places(given, stage)
    rank_of = {held_by: rank for rank, held_by in enumerate(sorted(set(devices.values())))}
    split = [each for each in given if each.get("op") == "split"]
    microbatch = str(split[0]["dim_name"]) if split else ""
    programs: dict[int, list[Slot]] = {}
    for each in (each for each in given if each.get("op") == "order"):
        slots = [_slot(group, stage, microbatch) for group in each["filters"]]
        ranks = {rank_of[_place_of(op, devices, stage)] for slot in slots for op in slot}
        if len(ranks) != 1 or not ranks.isdisjoint(programs):
            got = f"the order that begins with {each['filters'][0]} is for the ranks {sorted(ranks)}"
            taken = ", which have one already" if not ranks.isdisjoint(programs) else ""
            raise ScheduleError("each rank has one order directive", got + taken, "give one for each rank")
        programs[ranks.pop()] = slots
    without = [rank for rank in rank_of.values() if rank not in programs]
    if without:
        raise ScheduleError("each rank has one order directive", f"rank {without[0]} has none", "add it")
    return one_lane([programs[rank] for rank in sorted(programs)], name)


def _places(directives: Sequence[Directive], tag: str) -> dict[int, Devices]:
    """The devices of each stage."""
    found: dict[int, Devices] = {}
    for each in directives:
        if each.get("op") == "place" and tag in each["filter"]:
            placed_on = tuple(sorted(map(int, each["devices"])))
            stage = _number(each["filter"], tag)
            if found.setdefault(stage, placed_on) != placed_on:
                got = f"{tag} {stage} is on {list(found[stage])} and on {list(placed_on)}"
                raise ScheduleError("each stage has one place", got, "leave one out")
    return found


def _place_of(op: Op, devices: Mapping[int, Devices], tag: str) -> Devices:
    if op.stage not in devices:
        got = f"an order names {tag} {op.stage}, and there are place directives for {sorted(devices)}"
        raise ScheduleError(
            "each stage has a place directive", got, "add it, or pass the tag that the model has for stages"
        )
    return devices[op.stage]


def _slot(group: Iterable[Mapping[str, Any]], tag: str, microbatch: str) -> Slot:
    return tuple(sorted((op for each in group for op in _ops(each, tag, microbatch)), key=lambda op: _IN_SLOT[op.kind]))


def _ops(chosen: Mapping[str, Any], tag: str, microbatch: str) -> Iterator[Op]:
    word = chosen.get("PASS")
    if word not in _KINDS or not chosen.keys() <= {"PASS", tag, microbatch}:
        got = f"got {dict(chosen)}"
        raise ScheduleError(
            f"an order's filter has {tag}, the microbatch and PASS, one of {', '.join(_KINDS)}",
            got,
            "write it in this form",
        )
    for kind in _KINDS[str(word)]:
        yield Op(kind, UP, _number(chosen, tag), _number(chosen, microbatch) if microbatch else 0)


def _number(chosen: Mapping[str, Any], tag: str) -> int:
    """The number that a filter gives for a tag; other values, such as ``"*"``, are refused."""
    value = chosen.get(tag)
    if not str(value).isdecimal():
        raise ScheduleError(f"a filter gives one number for {tag}", f"got {dict(chosen)}", "write one for each number")
    return int(str(value))
