"""Checks on the model that a provider builds, and on its configs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.errors import RuleError
from dualpipe.megatron.arguments import validate_dualpipe_config
from dualpipe.testing.launch import launch
from reference.megatron import production
from reference.megatron.case import Case, Model
from tests.megatron.ranks import on_each_rank
from tests.megatron.test_groups import config

CASE = Case(pp=2, steps=1, timeout=10)


def test_megatrons_default_configs_break_no_rule():
    validate_dualpipe_config(config(), DistributedDataParallelConfig())


def test_a_real_config_that_defers_is_refused():
    deferring = config(defer_embedding_wgrad_compute=True, gradient_accumulation_fusion=True)
    with pytest.raises(RuleError, match="defer_embedding_wgrad_compute is True"):
        validate_dualpipe_config(deferring, DistributedDataParallelConfig(num_distributed_optimizer_instances=2))


def test_a_provider_that_returns_one_parameter_twice_is_refused():
    def rank(context):
        kept = {}

        def build_gpt(*args):
            model = real(*args)
            model.decoder.final = kept.setdefault("one", torch.nn.Linear(2, 2))
            return model

        real, production.build_gpt = production.build_gpt, build_gpt
        with pytest.raises(ValueError, match=r"the same decoder\.final\.weight and more; build new parameters"):
            production.run_rank(CASE, context)

    launch(production.ranks(CASE), rank, CASE.limit).values()


def test_more_optimizer_instances_than_groups_were_made_for_are_refused():
    def rank(context):
        of_case = production.ddp_config
        production.ddp_config = lambda case: replace(of_case(case), num_distributed_optimizer_instances=2)
        with pytest.raises(RuleError, match="got 2 in the DistributedDataParallelConfig, and groups for 1"):
            production.run_rank(replace(CASE, distributed_optimizer=True), context)

    launch(production.ranks(CASE), rank, CASE.limit).values()


def test_the_layer_of_multi_token_prediction_has_the_number_and_the_groups_of_its_stage():
    def found(model, **keywords):
        return [
            (chunk.module.dualpipe_setup.chunk.stage, layer.layer_number, layer.mlp.router.tp_dp_cp_group.size())
            for chunk in model
            for layer in chunk.modules()
            if isinstance(layer, TransformerLayer)
        ]

    first, second = on_each_rank(found, replace(CASE, model=Model.MOE, mtp=1, layout="Et|ttmL"))
    assert first == second == [(0, 1, 2), (1, 2, 2), (1, 3, 2), (1, 4, 2)]
