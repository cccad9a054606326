"""Tied embeddings and multi-token prediction: each part of what makes them exact is needed; a test fails without it.

Both use the embedding on the first and on the last stage.  ``test_verify`` shows that they are exact.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.errors import RuleError
from dualpipe.megatron.schedule import forward_backward_dualpipe as step
from dualpipe.testing.launch import launch
from reference.megatron import production
from reference.megatron.case import Case
from tests.megatron.ranks import on_each_rank
from tests.megatron.test_planted_faults import complaint

BOTH = Case(pp=2, mtp=1, tied=True, late_w="all", clip=0.0, microbatches=4, steps=1, timeout=10)
MTP = replace(BOTH, tied=False)


def norm_counts_both_ends():
    from dualpipe.megatron import model

    real = model._mark_shared

    def mark(module, chunk):
        for parameter in module.parameters():
            parameter.shared = False
        real(module, chunk)

    model._mark_shared = mark


def copies_of_lane_down_not_summed():
    from dualpipe.megatron import model

    model.embedding_sum = lambda groups, built: None


def copies_on_a_rank_added_to_each_other():
    from dualpipe.megatron import embedding, model

    def on_rank(groups, built):
        weights = [module.shared_embedding_or_output_weight() for module in built.values()]
        return embedding.SumOnRank(*weights)

    model.embedding_sum = on_rank


def two_uses_of_a_layer_accumulated_one_by_one():
    from itertools import count

    from dualpipe.runtime import weightgrad

    number = count()
    weightgrad._sum_of = lambda run, parameter: (next(number), id(parameter))


def weight_that_is_also_looked_up_split():
    from dualpipe.runtime.split_stage import SplitStage

    SplitStage.learn = lambda self, roots: setattr(self, "learned", True)


NEEDED = [
    (norm_counts_both_ends, BOTH, "gradient norm"),
    (copies_of_lane_down_not_summed, BOTH, "gradient of embedding.word_embeddings.weight"),
    (copies_on_a_rank_added_to_each_other, replace(BOTH, distributed_optimizer=True), "gradient of embedding"),
    (two_uses_of_a_layer_accumulated_one_by_one, MTP, "gradient of output_layer.weight"),
    (weight_that_is_also_looked_up_split, BOTH, "uses outside their layer the weights of output_layer"),
]


@pytest.mark.parametrize(("plant", "case", "says"), NEEDED, ids=[plant.__name__ for plant, _, _ in NEEDED])
def test_each_part_of_a_shared_embedding_is_needed(plant, case, says):
    found = complaint(case, plant)
    assert says in found, found or "nothing was found"


def test_each_end_of_the_pipeline_enters_the_embeddings_all_reduce_once_when_building():
    """If both chunks of the first rank entered it, the second time it would wait for the last rank forever."""

    def rank(context):
        real, calls = dist.all_reduce, []

        def all_reduce(tensor, *args, group=None, **options):
            embedding = ProcessGroupCollection.use_mpu_process_groups().embd
            calls.append(group is embedding)
            assert sum(calls) < 2, "the embedding's all-reduce is entered again"
            return real(tensor, *args, group=group, **options)

        def stop(*args):
            raise KeyError(sum(calls))

        dist.all_reduce, production.build_dualpipe_optimizer = all_reduce, stop
        with pytest.raises(KeyError) as caught:
            production.run_rank(BOTH, context)
        return caught.value.args[0]

    assert launch(2, rank, BOTH.limit).values() == [1, 1]


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_the_losses_of_multi_token_prediction_are_logged_on_the_last_rank(schedule):
    """Megatron's loop divides what the last rank has tracked by the number of microbatches of all lanes."""

    def body(**keywords):
        from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

        real, mine = MTPLossLoggingHelper.save_loss_to_tracker, []

        def save_loss_to_tracker(loss, *args, **options):
            mine.append(loss.item())
            real(loss, *args, **options)

        MTPLossLoggingHelper.save_loss_to_tracker = save_loss_to_tracker
        step(**keywords)
        tracked = MTPLossLoggingHelper.tracker.get("values")
        return mine, tracked if tracked is None else tracked.item()

    (first, on_first), (last, on_last) = on_each_rank(body, replace(MTP, schedule=schedule))
    assert on_first is None
    assert len(first + last) == BOTH.count
    assert on_last == pytest.approx(sum(first + last), rel=1e-6)  # float32, added lane by lane


def test_multi_token_prediction_layers_on_an_earlier_stage_are_refused():
    def rank(context):
        real = production.build_gpt

        def build(*args):
            module = real(*args)
            module.mtp_process = True
            return module

        production.build_gpt = build
        with pytest.raises(RuleError, match=r"must be on the last stage, with the loss: .* built them in stage 0"):
            production.run_rank(replace(MTP, mtp=0), context)

    launch(2, rank, BOTH.limit).values()


def test_a_checkpoint_that_megatron_cannot_write_is_refused():
    def body(model, **keywords):
        with pytest.raises(RuleError, match="tied embeddings and multi-token prediction cannot be saved"):
            model[0].module.sharded_state_dict()

    on_each_rank(body, BOTH)
