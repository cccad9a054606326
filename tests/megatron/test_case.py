"""Cases that cannot be verified are refused; a pipeline reads the data of its two replicas in turn."""

from __future__ import annotations

import pytest
import torch

from dualpipe.errors import RuleError
from reference.megatron import data
from reference.megatron.case import Case, Model


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"pp": 3}, "an even number of ranks: got 3"),
        ({"pp": 4, "microbatches": 6}, "at least twice the ranks of a pipeline: got 6 for 4 ranks; use 8"),
        ({"microbatches": 7}, "microbatches must be even"),
        ({"dp": 0}, "sizes must be positive: got 0 and 1"),
        ({"tp": 3}, "got 4 heads for 3 ranks"),
        ({"sequence_parallel": True}, "needs tensor parallelism"),
        ({"model": Model.MOE, "tp": 2}, "only with sequence parallelism"),
        ({"dtype": "fp64"}, "fp32 or bf16: got fp64"),
        ({"steps": 0}, "at least one step"),
        ({"dropout": 1.0}, "below 1"),
        ({"clip": -1.0}, "not be negative"),
        ({"schedule": "1f1b"}, "dualpipe or dualpipev: got 1f1b"),
        ({"schedule": "dualpipev", "microbatches": 3}, "at least twice the ranks"),
        ({"layout": "Et|tL", "schedule": "dualpipev"}, "got Et|tL for 4 stages"),
        ({"mtp": -1}, "must not be negative: got -1"),
        ({"mtp": 1, "tied": True, "overlap_grad_reduce": True}, "cannot overlap the reduction of gradients with tied"),
        ({"timeout": 0}, "positive number of seconds"),
    ],
)
def test_cases_that_cannot_be_verified_are_refused(options, error):
    with pytest.raises(RuleError, match=error):
        Case(**options)


def test_gradients_are_clipped_unless_the_optimizer_is_distributed():
    assert Case().clip_norm > 0
    assert Case(distributed_optimizer=True).clip_norm == 0
    assert Case(clip=0).clip_norm == 0


def test_a_pipeline_reads_the_microbatches_of_its_two_replicas_in_turn():
    case = Case(pp=2, dp=2, microbatches=6)
    for pipeline in (0, 1):
        read = list(data.of_pipeline(case, 3, pipeline))
        up, down = list(data.of_replica(case, 3, pipeline)), list(data.of_replica(case, 3, case.dp + pipeline))
        for item, replica in zip(read, [x for pair in zip(up, down, strict=True) for x in pair], strict=True):
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(item, replica, strict=True))


def test_microbatches_all_differ_and_are_reproducible():
    case = Case(dp=2)
    everything = [b for step in (0, 1) for replica in range(4) for b in data.of_replica(case, step, replica)]
    assert len({tuple(b.tokens.flatten().tolist()) for b in everything}) == len(everything)
    again = data.batch(case, 1, 2, 0)
    assert torch.equal(again.tokens, next(data.of_replica(case, 1, 2)).tokens)
    assert torch.equal(again.labels[:, :-1], again.tokens[:, 1:])
    assert 0 < again.mask.sum() < again.mask.numel()
