"""While a chunk is built or run, Megatron's global state has its stage, since a provider or a loss may read it."""

from __future__ import annotations

from megatron.core import parallel_state

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from reference.launch import launch
from reference.megatron import production
from reference.megatron.case import Case

CASE = Case(pp=2, steps=1, timeout=10)
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
