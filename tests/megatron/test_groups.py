"""While a chunk is built or run, Megatron's global state has its stage, since a provider or a loss may read it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.megatron.groups import at_stage
from dualpipe.megatron.schedule import chunks_of, forward_backward_dualpipe
from dualpipe.testing.launch import launch
from reference.megatron import production
from tests.megatron.ranks import CASE, on_each_rank

pipeline_rank = parallel_state.get_pipeline_model_parallel_rank


def test_a_provider_reads_the_stage_that_it_builds_from_global_state():
    def body(context):
        real, seen = production.build_gpt, []

        def build(case, config, pre_process, post_process, pg_collection):
            seen.append((pipeline_rank(), pg_collection.pp.rank()))
            return real(case, config, pre_process, post_process, pg_collection)

        production.build_gpt = build
        production.run_rank(CASE, context)
        return seen

    assert launch(2, body, CASE.limit).values() == [[(0, 0), (1, 1)], [(1, 1), (0, 0)]]


def test_a_forward_step_reads_the_stage_that_it_runs_from_global_state():
    def body(context):
        seen = set()

        def step(forward_step_func, **keywords):
            def observed(iterator, model):
                seen.add((pipeline_rank(), model.module.dualpipe_setup.chunk.stage))
                return forward_step_func(iterator, model)

            return production.forward_backward_dualpipe(forward_step_func=observed, **keywords)

        production.run_rank(CASE, context, step)
        return seen, pipeline_rank()

    assert launch(2, body, CASE.limit).values() == [({(0, 0), (1, 1)}, 0), ({(0, 0), (1, 1)}, 1)]


def test_global_state_has_the_stage_within_the_block_and_the_rank_outside():
    parallel_state.set_pipeline_model_parallel_rank(0)
    try:
        with at_stage(3, 4):
            assert parallel_state.get_pipeline_model_parallel_rank() == 3
            with at_stage(1, 4):
                assert parallel_state.get_pipeline_model_parallel_rank() == 1
            assert parallel_state.get_pipeline_model_parallel_rank() == 3
        assert parallel_state.get_pipeline_model_parallel_rank() == 0
        with pytest.raises(RuntimeError), at_stage(3, 4):
            raise RuntimeError
        assert parallel_state.get_pipeline_model_parallel_rank() == 0
    finally:
        parallel_state.set_pipeline_model_parallel_rank(None)


def config(**changes):
    options = {"num_layers": 8, "hidden_size": 8, "num_attention_heads": 2, "pipeline_model_parallel_size": 4}
    options |= {"pipeline_dtype": torch.float32, "use_cpu_initialization": True, "cuda_graph_scope": []}
    return TransformerConfig(**options | changes)


def kinds(stage):
    """For each layer of a stage, whether it is a mixture of experts; the first three of eight layers are dense."""
    sparse = config(
        num_moe_experts=4, moe_ffn_hidden_size=8, moe_layer_freq=[0, 0, 0, 1, 1, 1, 1, 1], add_bias_linear=False
    )
    with at_stage(stage, 4):
        block = get_gpt_decoder_block_spec(sparse, use_transformer_engine=False)
    return ["MoELayer" in str(layer.submodules.mlp.module) for layer in block.layer_specs]


def test_a_layer_spec_that_reads_global_state_is_that_of_the_chunks_stage():
    assert [kinds(stage) for stage in range(4)] == [[False, False], [False, True], [True, True], [True, True]]


def test_a_recomputed_layer_reads_its_stage_from_global_state():
    def body(model, **keywords):
        seen = []
        for chunk, (_, stage) in zip(model, chunks_of(model), strict=True):
            layer = chunk.module.decoder.layers[0]
            layer.register_forward_pre_hook(lambda *_, stage=stage: seen.append(pipeline_rank() == stage))
        forward_backward_dualpipe(model=model, **keywords)
        return seen

    for seen in on_each_rank(body, replace(CASE, recompute=True)):
        assert len(seen) == 2 * CASE.count  # once in F, once in B
        assert all(seen)
