"""The oracle sums in the order of Megatron's buckets and gloo's ring."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.megatron.on_cpu import install_cpu_standins
from dualpipe.testing.launch import launch
from reference.megatron.case import Case, Model
from reference.megatron.importing import expected_warnings
from reference.megatron.model import bucket_limit, build_gpt, ddp_config, seed, transformer_config
from reference.megatron.reduction import Bucket, Span, buckets, ring_sum

SIZES = (1, 2, 3, 5, 8, 16, 17, 1000, 10_001)


def numbers(rank: int, size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(100 * rank + size))


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
def test_the_ring_sums_as_gloo_does(ranks):
    def body(context):
        summed = [numbers(context.rank, size) for size in SIZES]
        for tensor in summed:
            dist.all_reduce(tensor)
        return summed

    for size, found in zip(SIZES, launch(ranks, body).values()[0], strict=True):
        assert torch.equal(ring_sum([numbers(rank, size) for rank in range(ranks)]), found), size


def test_the_order_of_four_numbers_matters():
    parts = [numbers(rank, 1000) for rank in range(4)]
    assert not torch.equal(ring_sum(parts), ring_sum(parts[::-1]))


def test_buckets_are_filled_from_the_last_parameter_to_the_first():
    sizes = [("embedding", 100), ("norm", 10), ("output", 60)]
    assert buckets(sizes, 64, None) == [
        Bucket((Span("output", 0, 60), Span("norm", 60, 10)), 70),
        Bucket((Span("embedding", 0, 100),), 100),
    ]
    assert buckets(sizes, None, 4) == [
        Bucket((Span("output", 0, 60), Span("norm", 64, 10), Span("embedding", 128, 100)), 256)
    ]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_buckets_are_those_of_megatron(overlap, sharded):
    case = Case(Model.MOE, overlap_grad_reduce=overlap, distributed_optimizer=sharded)

    @expected_warnings()
    def body(context):
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel
        from megatron.core.process_groups_config import ProcessGroupCollection

        install_cpu_standins()
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        seed(case, 0)
        config = transformer_config(case)
        model = build_gpt(case, config, True, False, ProcessGroupCollection.use_mpu_process_groups())
        chunk = DistributedDataParallel(config, ddp_config(case), model)
        names = {parameter: name for name, parameter in model.named_parameters()}
        found = []
        for bucket in chunk.buffers[0].buckets:
            first = bucket.grad_data.storage_offset()
            spans = [(p, p.main_grad.storage_offset() - first, p.numel()) for p in bucket.params_list]
            found.append(Bucket(tuple(Span(names[p], *rest) for p, *rest in spans), bucket.grad_data.numel()))
        return found, [(name, parameter.numel()) for name, parameter in model.named_parameters()]

    found, sizes = launch(2, body).values()[0]
    assert buckets(sizes, bucket_limit(case), 2 if sharded else None) == found
    assert (len(found) > 1) == overlap
