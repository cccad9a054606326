"""The drop-in and the single-process oracle equal Megatron's own 1F1B bitwise; a faulty implementation does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dualpipe.errors import UndecidedError
from reference.megatron import production, truth
from reference.megatron.case import Case, Model
from reference.megatron.verify import ORACLE, PRODUCTION, verify

SAMPLE = {
    "two pipelines, two optimizer instances, multi-token prediction, layout": Case(
        dp=2, distributed_optimizer=True, instances=2, mtp=1, layout="Et|ttmL", steps=2, per_token_loss=True
    ),
    "distributed optimizer, tied": Case(
        pp=4, distributed_optimizer=True, overlap_grad_reduce=True, clip=0.1, tied=True, steps=2
    ),
    "deepseek, bf16, overlapped, queries and keys clipped, tensor and sequence parallel, balanced globally": Case(
        Model.DEEPSEEK,
        tp=2,
        sequence_parallel=True,
        global_aux_loss=True,
        dtype="bf16",
        overlap_grad_reduce=True,
        qk_clip=True,
        microbatches=4,
        steps=1,
    ),
    "v, multi-token prediction, tied, dropout": Case(schedule="dualpipev", mtp=1, tied=True, dropout=0.1, steps=2),
    "sequences of different lengths, dropout, recompute, late W in the tail": Case(
        variable_lengths=True, dropout=0.1, recompute=True, steps=2, late_w="tail"
    ),
    "moe, tensor and sequence parallel, balanced over all replicas": Case(
        Model.MOE, tp=2, sequence_parallel=True, global_aux_loss=True, steps=2
    ),
    "moe, expert parallel, routers with a bias, late W": Case(
        Model.MOE, dp=2, ep=2, expert_bias=True, steps=2, late_w="all"
    ),
}


LONG = (
    "moe, tensor and sequence parallel, balanced over all replicas",
    "moe, expert parallel, routers with a bias, late W",
)
"""Left to the long tests: of the quick ones, that of DeepSeek-V3 has experts."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=[pytest.mark.long] * (name in LONG)) for name, case in SAMPLE.items()],
)
def test_equal(case):
    report = verify(case)
    assert report.complaints == ()
    assert {party.name: (party.failures, party.differences) for party in report.comparisons} == (
        {PRODUCTION: ((), ())} | ({ORACLE: ((), ())} if case.has_oracle else {})
    )
    assert case.steps == 1 or report.losses[-1] < report.losses[0]
    assert all(party.norm_difference <= case.norm_rounding for party in report.comparisons)


@pytest.mark.long
def test_equal_with_the_stages_in_a_v_and_sharded_experts():
    options = {"overlap_grad_reduce": True, "distributed_optimizer": True, "clip": 0.1, "per_token_loss": True}
    case = Case(Model.MOE, dp=2, ep=2, schedule="dualpipev", expert_bias=True, layout="Et|t|tt|tmL", mtp=1, **options)
    assert verify(replace(case, steps=2, late_w="tail")).equal


@pytest.mark.long
def test_equal_with_every_part_of_deepseek_v3():
    options = {"overlap_grad_reduce": True, "distributed_optimizer": True, "clip": 0.1, "recompute": True}
    assert verify(Case(Model.DEEPSEEK, dp=2, ep=2, dtype="bf16", steps=2, **options)).equal


@pytest.mark.long
def test_equal_with_sequences_split_over_two_ranks_which_train_as_one_does():
    case = Case(Model.DEEPSEEK, cp=2, per_token_loss=True, steps=1)
    report = verify(case)
    assert report.equal
    whole = verify(replace(case, cp=1))
    assert report.norms == pytest.approx(whole.norms, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("model", [Model.GPT, Model.MOE])
def test_equal_with_everything_at_once(model):
    case = Case(model, 4, 2, overlap_grad_reduce=True, distributed_optimizer=True, recompute=True, dtype="bf16")
    assert verify(case).equal


def test_a_gradient_off_by_one_unit_and_a_loss_that_does_not_reach_the_last_rank_are_reported():
    def faulty(case, context):
        def step(**keywords):
            losses = production.forward_backward_dualpipe(**keywords)
            if context.rank == 1:
                gradient = next(keywords["model"][1].module.decoder.layers[0].mlp.linear_fc2.parameters()).main_grad
                gradient.view(-1)[0] = torch.nextafter(gradient.view(-1)[0], torch.tensor(9.0))
            return losses[1:]

        return production.run_rank(case, context, step)

    report = verify(Case(steps=1), production_body=faulty)
    assert report.exit_code == 1
    wrong, oracle = report.comparisons
    assert [str(difference) for difference in wrong.differences[:2]] == [
        "step 0, stage 1: loss of microbatch 0 of replica 0 is missing",
        "step 0, stage 1: gradient of decoder.layers.0.mlp.linear_fc2.weight (replica 0, tensor rank 0) differs, "
        "by up to 1 units in the last place",
    ]
    assert oracle.equal


def test_a_run_that_fails_is_reported_with_its_error():
    def faulty(case, context):
        raise ValueError("a planted fault")

    report = verify(Case(steps=1), production_body=faulty)
    assert report.as_json()["parties"][PRODUCTION]["verdict"] == "failed"
    assert str(report.comparisons[0].failures[0]).endswith("ValueError: a planted fault")


def test_a_failure_of_megatron_itself_is_undecided(monkeypatch):
    def broken(case, context):
        raise ValueError("the truth failed")

    monkeypatch.setattr(truth, "run_rank", broken)
    with pytest.raises(UndecidedError, match="the truth failed"):
        verify(Case(steps=1))
