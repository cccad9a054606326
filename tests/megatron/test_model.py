"""Checks on the model that a provider builds, and on its configs."""

from __future__ import annotations

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.errors import RuleError
from dualpipe.megatron.arguments import validate_dualpipe_config
from dualpipe.testing.launch import launch
from reference.megatron import production
from reference.megatron.case import Case
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
