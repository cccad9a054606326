"""A run that is saved and resumed equals the uninterrupted run bitwise, with every layout of the optimizer's buckets.

step        1   2   save   3   4        the uninterrupted run, which also saves; some cases have half as many steps
                    load   3   4        the resumed run

test_checkpoint.py has the quick tests of this.
The buckets are small and padded, where megatron-core 0.16.1 writes the state of one parameter for another.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.megatron import optimizer_state
from reference.megatron.case import Case, Model
from tests.megatron.resumption import Interruption, train, weights_that_differ

CASE = Case(pp=2, distributed_optimizer=True, overlap_grad_reduce=True, dtype="bf16", steps=2, microbatches=4)
SIX = replace(CASE, dp=3)


class Wide(Case):
    """Wide enough for every replica to own a part of buckets that are padded to 65,536 elements."""

    hidden = 64


PADDED = Wide(pp=2, distributed_optimizer=True, overlap_grad_reduce=True, steps=2, microbatches=4)
MTP = replace(CASE, mtp=1, layout="Et|ttmL", steps=4)
V = replace(MTP, schedule="dualpipev", layout="Et|t|t|tmL", clip=0.1, dropout=0.1)
DEEPSEEK = Case(Model.DEEPSEEK, microbatches=4, steps=4)
EVERY = {
    "multi-token prediction": (MTP, {}),
    "tied": (replace(CASE, tied=True, steps=4), {"bucket_size": 500}),
    "v, tied, plain optimizer": (Case(schedule="dualpipev", tied=True, microbatches=4, steps=4), {}),
    "deepseek": (DEEPSEEK, {}),
    "v, weights gathered in the forward": (replace(V, dp=2, mtp=0, layout=None), {"overlap_param_gather": True}),
    "deepseek, sharded, v": (replace(DEEPSEEK, schedule="dualpipev", distributed_optimizer=True, dtype="bf16"), {}),
    "six replicas, fp32": (replace(SIX, dtype="fp32"), {}),
    "six replicas, three optimizer instances, small buckets": (replace(SIX, instances=3), {"bucket_size": 500}),
    "two replicas, fp32": (replace(CASE, steps=4, dtype="fp32"), {}),
    "buckets padded for NCCL": (PADDED, {"pad_buckets_for_high_nccl_busbw": True, "bucket_size": 66_000}),
    "weights gathered in the forward": (replace(SIX, steps=4), {"overlap_param_gather": True}),
    "plain optimizer": (replace(SIX, steps=4, distributed_optimizer=False), {}),
}


def whole(folder, schedule, case=CASE, buckets=None):
    """The last step of an uninterrupted run that is saved half-way."""
    return train(case, schedule, Interruption(folder, case.steps // 2, False), buckets)[-1]


def resumed(folder, schedule, case=CASE, buckets=None):
    return train(case, schedule, Interruption(folder, case.steps // 2, True), buckets)[-1]


@pytest.mark.long
def test_a_resumed_run_of_dualpipev_equals_the_uninterrupted_one_and_1f1b_at_twice_the_ranks(tmp_path):
    """With dropout: the checkpoint has the random states of both stages of a rank."""
    last = whole(tmp_path, "dualpipe", V)
    assert weights_that_differ(last, resumed(tmp_path, "dualpipe", V)) == []
    assert weights_that_differ(last, resumed(tmp_path, "1f1b", V)) == []


def test_loading_refuses_state_that_belongs_to_other_weights(tmp_path, monkeypatch):
    gathered = optimizer_state._gathered

    def misplaced(part):
        for parameter, state in gathered(part):
            yield parameter, {key: value.roll(64) for key, value in state.items()}

    monkeypatch.setattr(optimizer_state, "_gathered", misplaced)
    whole(tmp_path, "dualpipe", replace(CASE, dtype="fp32"))
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"the optimizer's copy of each weight equals the weight.*of \d+ differ"):
        resumed(tmp_path, "dualpipe", replace(CASE, dtype="fp32"))


@pytest.mark.long
def test_a_checkpoint_with_megatrons_bug_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizer_state, "save_parameters", lambda part: ())
    whole(tmp_path, "1f1b")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"the optimizer's copy of each weight equals the weight.*of \d+ differ"):
        resumed(tmp_path, "dualpipe")


def lay_out_with_padding():
    """Stand-in for a Megatron without the bug: it gathers whole buffers, including the padding."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def fixed(part, use_gloo_comm=True, empty_data=False, return_on_all_ranks=False):
        state = {"buckets_coalesced": True}
        for index, (ranges, buffer) in enumerate(zip(part.gbuf_ranges, part.buffers, strict=True)):
            room = {key: torch.zeros(buffer.numel) for key in ("param", "exp_avg", "exp_avg_sq")}
            if not empty_data:
                for parameter, state_of in optimizer_state._gathered(part):
                    if parameter in buffer.param_index_map:
                        start, end, _ = buffer.param_index_map[parameter]
                        for key, value in state_of.items():
                            room[key][start:end] = value
            state[index] = {dtype: {**room, "numel_unpadded": buffer.numel} for dtype in ranges}
        return state

    DistributedOptimizer.get_parameter_state_dp_zero = fixed


@pytest.mark.long
@pytest.mark.parametrize("fixed", [False, True], ids=["0.16.1", "fixed"])
@pytest.mark.parametrize(("saver", "loader"), [("dualpipe", "1f1b"), ("1f1b", "dualpipe"), ("1f1b", "1f1b")])
def test_a_run_resumes_bitwise_with_the_other_schedule(saver, loader, fixed, tmp_path):
    prepare = lay_out_with_padding if fixed else None
    last = train(CASE, saver, Interruption(tmp_path, 1, False), prepare=prepare)[-1]
    assert weights_that_differ(last, train(CASE, loader, Interruption(tmp_path, 1, True), prepare=prepare)[-1]) == []


@pytest.mark.long
@pytest.mark.parametrize(("saver", "loader"), [("dualpipe", "1f1b"), ("1f1b", "dualpipe")])
def test_a_run_of_deepseek_v3_resumes_bitwise_with_the_other_schedule(saver, loader, tmp_path):
    last = whole(tmp_path, saver, DEEPSEEK)
    assert weights_that_differ(last, resumed(tmp_path, loader, DEEPSEEK)) == []


@pytest.mark.long
@pytest.mark.parametrize("kind", EVERY)
def test_a_run_resumes_bitwise_with_every_bucket_layout(kind, tmp_path):
    case, buckets = EVERY[kind]
    last = whole(tmp_path, "dualpipe", case, buckets)
    assert weights_that_differ(last, resumed(tmp_path, "dualpipe", case, buckets)) == []
