"""Interleaved 1F1B computes in the order of Megatron-core's ``get_schedule_table``, with Megatron-core's warm-up."""

from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel import schedules

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.schedule import COMPUTE
from dualpipe.schedule.generate import interleaved

CHUNKS = 2


def theirs(ranks, microbatches, rank):
    """The order of ``forward_backward_pipelining_with_interleaving``: kind, chunk and microbatch."""
    table = schedules.get_schedule_table(microbatches, CHUNKS, ranks)
    group = SimpleNamespace(size=lambda: ranks, rank=lambda: rank)
    communicator = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=CHUNKS)
    _, _, warm_up, _ = schedules.get_pp_rank_microbatches(microbatches, CHUNKS, ranks, p2p_communicator=communicator)
    forwards = [("F", chunk, mb) for mb, chunk in table]
    backwards = [("B", CHUNKS - 1 - chunk, mb) for mb, chunk in table]
    order = forwards[:warm_up]
    for number in range(warm_up, len(forwards)):
        order += [forwards[number], backwards[number - warm_up]]
    return order + backwards[len(forwards) - warm_up :]


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("groups", [1, 2, 3, 7])
def test_order_is_that_of_megatron(ranks, groups):
    schedule = interleaved(ranks, groups * ranks).only(COMPUTE)
    for rank, program in enumerate(schedule.programs):
        ours = [(slot[0].kind, slot[0].stage // ranks, slot[0].mb) for slot in program]
        assert ours == theirs(ranks, groups * ranks, rank)
        assert {"".join(op.kind for op in slot) for slot in program} == {"F", "BW"}
