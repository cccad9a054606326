"""A chunk is built and run where Megatron's global state tells its stage: a provider or a loss may ask there."""

from __future__ import annotations

from megatron.core import parallel_state

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.testing.launch import launch
from reference.megatron import production
from reference.megatron.case import Case

CASE = Case(pp=2, steps=1, timeout=10)
told = parallel_state.get_pipeline_model_parallel_rank


def test_a_provider_that_asks_global_state_is_told_the_stage_that_it_builds():
    def body(context):
        real, asked = production.build_gpt, []

        def build(case, config, pre_process, post_process, pg_collection):
            asked.append((told(), pg_collection.pp.rank()))
            return real(case, config, pre_process, post_process, pg_collection)

        production.build_gpt = build
        production.run_rank(CASE, context)
        return asked

    assert launch(2, body, CASE.limit).values() == [[(0, 0), (1, 1)], [(1, 1), (0, 0)]]


def test_a_forward_step_that_asks_global_state_is_told_the_stage_that_runs():
    def body(context):
        asked = set()

        def step(forward_step_func, **keywords):
            def asking(iterator, model):
                asked.add((told(), model.module.dualpipe_chunk.place.stage))
                return forward_step_func(iterator, model)

            return production.forward_backward_dualpipe(forward_step_func=asking, **keywords)

        production.run_rank(CASE, context, step)
        return asked, told()

    assert launch(2, body, CASE.limit).values() == [({(0, 0), (1, 1)}, 0), ({(0, 0), (1, 1)}, 1)]
