"""Prints the order in which DeepSeek's own ``DualPipe.step()`` computes and communicates.

    PYTHONPATH=<folder with their package> python deepseek_recorder.py RANKS:MICROBATCHES ...

Their package (https://github.com/deepseek-ai/DualPipe, MIT licence) has the import name of ours, so this runs in a
process of its own and imports nothing of ours.  Their control flow, counters, queues and batches run as they are;
replaced are only the computation, the posting of messages, and what would need a GPU.

For every size and rank a line ``RANKS MICROBATCHES RANK: SLOT ...`` is printed, slots as in a schedule file.  What a
message is gets read off what travels: a send from the value that it is given, a receive from the computation that
later takes what it gave.  Every message names its peer.
"""

import sys
from pathlib import Path
from unittest import mock

import torch

STAGED = []  # the ops of the batch that is being collected, in posting order
SLOTS = []  # the slots of the rank that is being recorded


class Value:
    """What travels in place of a tensor: an activation or a gradient."""

    _base = None  # their check that a stage returns no view

    def __init__(self, name=None):
        self.name = name  # stage-less: (microbatch, lane)
        self.receive = None  # the list [kind, stage, microbatch, lane, peer] of the op that brought it


class Group:
    """The process group of one rank."""

    def __init__(self, ranks, rank):
        self.ranks, self.own = ranks, rank

    def size(self):
        return self.ranks

    def rank(self):
        return self.own


def append_isend(ops, values, peer, group):
    (value,) = values
    kind, stage, mb, lane = value.name
    ops.append([f"S{kind}", stage, mb, lane, peer])


def append_irecv(ops, peer, group):
    value = Value()
    value.receive = ["R?", None, None, None, peer]
    ops.append(value.receive)
    return [value]


def batch(ops):
    SLOTS.append(ops)
    return []


def taken(values, kind, stage, mb, lane):
    """Note what a received value turned out to be."""
    for value in values:
        if isinstance(value, Value) and value.receive is not None:
            value.receive[:4] = f"R{kind}", stage, mb, lane


def recorder(upstream):
    """Their class with a computation that only writes down what is computed."""

    class Recorded(upstream.DualPipe):
        def lane_of(self, phase):
            """Their phase, turned round on the second half of the ranks, is a direction of travel."""
            direction = phase ^ self.is_in_second_half
            lane = "<" if direction else ">"
            return direction, lane, self.num_ranks - 1 - self.rank if direction else self.rank

        def forward_op(self, phase):
            direction, lane, stage = self.lane_of(phase)
            mb = self.current_f_chunk_id[direction]
            self.current_f_chunk_id[direction] += 1
            taken(self.input_chunks[direction][mb], "F", stage, mb, lane)
            if stage == self.num_ranks - 1:
                self.loss_chunks.append(torch.zeros(()))
            else:
                self.output_chunks[direction].append([Value(("F", stage, mb, lane))])
            return ["F", stage, mb, lane, None]

        def backward_op(self, phase):
            direction, lane, stage = self.lane_of(phase)
            mb = self.current_b_chunk_id[direction]
            self.current_b_chunk_id[direction] += 1
            if stage < self.num_ranks - 1:
                taken(self.output_grad_chunks[direction][mb], "B", stage, mb, lane)
            self.input_grad_chunks[direction].append([Value(("B", stage, mb, lane))])
            return ["B", stage, mb, lane, None]

        def _forward_compute_chunk(self, phase):
            SLOTS.append([self.forward_op(phase)])

        def _backward_compute_chunk(self, phase, enable_zb=False):
            backward = self.backward_op(phase)
            weights = ["W", *backward[1:]]
            if enable_zb:
                upstream.WeightGradStore.put(lambda: SLOTS.append([weights]))
                upstream.WeightGradStore.flush()
                SLOTS.append([backward])
            else:
                SLOTS.append([backward, weights])

        def _forward_backward_compute_chunk(self, phase0, phase1):
            forward, backward = self.forward_op(phase0), self.backward_op(phase1)
            SLOTS.append([forward, backward, ["W", *backward[1:]]])

    return Recorded


def record(recorded, ranks, microbatches, rank):
    """The slots of one rank."""
    SLOTS.clear()
    pipe = recorded((torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)), process_group=Group(ranks, rank))
    ends = rank in (0, ranks - 1)
    data = [torch.zeros(microbatches // 2, 1)] if ends else []
    pipe.step(*data, num_chunks=microbatches, criterion=abs if ends else None, labels=data)
    return " ".join("+".join(map(show, slot)) for slot in SLOTS)


def show(op):
    kind, stage, mb, lane, peer = op
    return f"{stage}{kind}{mb}{lane}" + ("" if peer is None else f"@{peer}")


def main():
    import dualpipe.dualpipe as upstream

    from dualpipe import comm

    comm.set_p2p_tensor_shapes([(1,)])
    comm.set_p2p_tensor_dtype(torch.float32)
    with (
        mock.patch.object(comm, "append_isend", append_isend),
        mock.patch.object(comm, "append_irecv", append_irecv),
        mock.patch.object(upstream.dist, "batch_isend_irecv", batch),
        mock.patch.object(torch.cuda, "current_device", return_value="cpu"),
    ):
        recorded = recorder(upstream)
        for size in sys.argv[1:]:
            ranks, microbatches = map(int, size.split(":"))
            for rank in range(ranks):
                print(f"{ranks} {microbatches} {rank}: {record(recorded, ranks, microbatches, rank)}")
    print("from", Path(upstream.__file__).parent, file=sys.stderr)


if __name__ == "__main__":
    main()
