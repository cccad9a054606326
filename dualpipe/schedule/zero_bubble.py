"""Reads the schedules of sail-sg's zero-bubble-pipeline-parallelism: for each rank its list of ``ScheduledNode``.

Their scheduler (``zerobubble/scheduler``) makes such lists, and their runtime executes them.  Their package itself is
not imported: a node is any object with the attributes

====================  ========================================================================================
type                  an enum or a text: F, B, W, BW, SEND_FORWARD, RECV_FORWARD, SEND_BACKWARD, RECV_BACKWARD
microbatch            our microbatch
layer_group_idx       our stage
seq_split_idx         0, or absent
comm_peer_stage       messages only: the rank at the other end
comm_direction        messages only, an enum or a text: NEXT or PREV
====================  ========================================================================================

``stage`` and ``chunk``, the rank and the number of the chunk on it, are not read, since they follow from the rest.
Nodes of the optimizer's post validation (``POST_VALIDATION``, ``SEND_POST_VALIDATION``, ``RECV_POST_VALIDATION``) carry
scalars and are left out.  Lists from before the scheduler's communication passes have no messages; ``lower`` adds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dualpipe.schedule.computes import one_lane
from dualpipe.schedule.op import COMPUTE, RB, RF, SB, SENDS, SF, UP, B, F, Kind, Op, ScheduleError, Slot, W
from dualpipe.schedule.value import Schedule

_KINDS: dict[str, tuple[Kind, ...]] = {
    "F": (F,),
    "B": (B,),
    "W": (W,),
    "BW": (B, W),
    "SEND_FORWARD": (SF,),
    "RECV_FORWARD": (RF,),
    "SEND_BACKWARD": (SB,),
    "RECV_BACKWARD": (RB,),
}
_OF_THE_OPTIMIZER = frozenset({"POST_VALIDATION", "SEND_POST_VALIDATION", "RECV_POST_VALIDATION"})
_BATCH = (("SEND", "PREV"), ("RECV", "PREV"), ("SEND", "NEXT"), ("RECV", "NEXT"))
"""The order in which their runtime puts the messages of a batch."""
_CONSUMER = {RF: F, RB: B}


def from_nodes(order: Sequence[Iterable[Any]], name: str = "") -> Schedule:
    """The schedule of the scheduler's nodes, with one lane; ``order`` has the nodes of each rank.

    Messages form the batches that their runtime posts: all messages between two computes, except that a receive that
    the next compute needs ends its batch.

    Raises
    ------
    ScheduleError
        If a node has another type, as those of vocabulary parallelism have; if it splits a sequence; if no rank or two
        ranks run a stage; and if the order of computes cannot be run (raised by ``lower``).
    """
    ranks = [[node for node in nodes if _type_of(node) not in _OF_THE_OPTIMIZER] for nodes in order]
    for rank, nodes in enumerate(ranks):
        for node in nodes:
            _check(rank, node)
    return one_lane([*map(_slots, ranks)], name, "layer group")


def _type_of(node: Any) -> str:
    return str(getattr(node.type, "value", node.type))


def _check(rank: int, node: Any) -> None:
    if _type_of(node) not in _KINDS:
        raise ScheduleError(
            f"a node's type is one of {', '.join(_KINDS)}",
            f"rank {rank} has {_type_of(node)}",
            "make the schedule without vocabulary parallelism",
        )
    if getattr(node, "seq_split_idx", 0) or node.layer_group_idx is None:
        got = f"rank {rank} has {_type_of(node)} of microbatch {node.microbatch} with "
        got += f"seq_split_idx {getattr(node, 'seq_split_idx', 0)} and layer_group_idx {node.layer_group_idx}"
        raise ScheduleError("a node is a whole microbatch at a layer group", got, "make it without sequence splits")


def _slots(nodes: Sequence[Any]) -> Iterator[Slot]:
    batch: list[Any] = []
    for at, node in enumerate(nodes):
        ops = _ops(node)
        if ops[0].kind in COMPUTE:
            yield ops
            continue
        batch.append(node)
        following = next((op for other in nodes[at + 1 :] if (op := _ops(other)[0]).kind in COMPUTE), None)
        last = at + 1 == len(nodes) or _ops(nodes[at + 1])[0].kind in COMPUTE
        if last or (following is not None and _takes(following, ops[0])):
            yield tuple(_ops(message)[0] for message in sorted(batch, key=_place_in_batch))
            batch.clear()


def _ops(node: Any) -> Slot:
    peer = getattr(node, "comm_peer_stage", None)
    kinds = _KINDS[_type_of(node)]
    named = None if kinds[0] in COMPUTE else peer
    return tuple(Op(kind, UP, node.layer_group_idx, node.microbatch, named) for kind in kinds)


def _takes(compute: Op, receive: Op) -> bool:
    return _CONSUMER.get(receive.kind) is compute.kind and compute.task == receive.task


def _place_in_batch(node: Any) -> int:
    direction = getattr(node, "comm_direction", None)
    if direction is None:
        return 0
    kind = "SEND" if _KINDS[_type_of(node)][0] in SENDS else "RECV"
    return _BATCH.index((kind, str(getattr(direction, "name", direction))))
