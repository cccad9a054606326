"""Synthetic text for every implementation: a microbatch depends only on its numbers, so it is the same everywhere.

DualPipe gives its microbatches to the lanes in turn, 0 to lane ``>``, 1 to lane ``<``, 2 to ``>``, ...  Each lane of
each pipeline is one replica; replicas are numbered lane by lane:

    replica   0 .. d-1    lane ``>`` of pipeline 0 .. d-1    microbatches 0, 2, 4, ... of that pipeline
    replica   d .. 2d-1   lane ``<`` of pipeline 0 .. d-1    microbatches 1, 3, 5, ... of that pipeline

DualPipeV has one lane, so each pipeline is one replica with all of its microbatches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from reference.megatron.case import Case

_MASKED = 0.25


class Batch(NamedTuple):
    """Microbatch ``number`` of a replica: int64 ``tokens`` and ``labels``, float32 ``mask``; all ``[batch, seq]``."""

    replica: int
    number: int
    tokens: Tensor
    labels: Tensor
    mask: Tensor


def replica_of(case: Case, lane: int, pipeline: int) -> int:
    """The number of the replica in ``lane`` (0 for ``>``, 1 for ``<``) of a pipeline."""
    return lane * case.dp + pipeline


def batch(case: Case, step: int, replica: int, number: int) -> Batch:
    """Microbatch ``number`` of a replica: arithmetic progressions of random start and stride, a quarter masked.

    The text can be learned in a few steps; the number of unmasked tokens differs between microbatches, and so may the
    length of the sequences.
    """
    generator = torch.Generator().manual_seed(hash((case.seed, step, replica, number)) % 2**63)
    start = torch.randint(case.vocabulary, (case.batch, 1), generator=generator)
    stride = torch.randint(1, 4, (case.batch, 1), generator=generator)
    length = case.sequence
    if case.variable_lengths:  # a multiple of the tensor parallel ranks, for sequence parallelism
        length -= case.tp * int(torch.randint(case.sequence // case.tp // 2, (1,), generator=generator))
    text = (start + stride * torch.arange(length + 1)) % case.vocabulary
    mask = (torch.rand(case.batch, length, generator=generator) > _MASKED).float()
    return Batch(replica, number, text[:, :-1].contiguous(), text[:, 1:].contiguous(), mask)


def of_replica(case: Case, step: int, replica: int) -> Iterator[Batch]:
    """A replica's microbatches of a step, in order."""
    return iter([batch(case, step, replica, number) for number in range(case.per_lane)])


def of_pipeline(case: Case, step: int, pipeline: int) -> Iterator[Batch]:
    """A pipeline's microbatches of a step, as its data iterator yields them: lanes in turn."""
    return iter(
        [
            batch(case, step, replica_of(case, number % case.lanes, pipeline), number // case.lanes)
            for number in range(case.count)
        ]
    )
