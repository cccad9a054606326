"""F&B pairs through Megatron's plan: the bits of F, then B, and streams that wait for each other.

comp stream     attention F   experts B   experts F   attention B
comm stream     combine B     dispatch F, dispatch B  combine F
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.errors import RuleError
from dualpipe.megatron import forward_backward_dualpipe, validate_dualpipe_args
from dualpipe.megatron.arguments import validate_overlap
from dualpipe.megatron.on_cpu import install_cpu_standins
from dualpipe.megatron.violations import SettingsError
from dualpipe.schedule import overlapped_pairs
from dualpipe.schedule.generate import generate
from dualpipe.testing.launch import launch
from dualpipe.testing.streams import StreamError, checked_streams
from reference.megatron import data, production
from reference.megatron.case import Case, Model
from reference.megatron.importing import expected_warnings
from reference.megatron.model import build_gpt, seed, transformer_config
from reference.megatron.training import forward_step
from reference.megatron.verify import verify

CASE = Case(Model.MOE, dp=2, ep=2, microbatches=6, steps=1, timeout=20, overlap_moe=True)


@pytest.mark.long
def test_equal_to_megatrons_own_1f1b_in_bf16_with_late_w():
    case = replace(CASE, dtype="bf16", distributed_optimizer=True, overlap_grad_reduce=True, late_w="all")
    report = verify(case)
    assert report.complaints == ()
    assert [(party.failures, party.differences) for party in report.comparisons] == [((), ())]


@pytest.mark.long
def test_every_pair_is_one_run_of_the_plan_whose_streams_wait_and_the_bits_stay():
    from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan as Plan

    runs: list[tuple[bool, bool]] = []
    stock = Plan.run

    def run(forward, backward, **options):
        runs.append((forward is not None, backward is not None))
        return stock(forward, backward, **options)

    def overlapped(context):
        install_cpu_standins()
        Plan.run = staticmethod(run)
        with checked_streams() as checker:
            traces = production.run_rank(CASE, context)
        return traces, runs.count((True, True)), runs.count((True, False)), checker.waited

    def plain(context):
        def step(**options):
            return forward_backward_dualpipe(**{**options, "overlap_moe": False})

        return production.run_rank(CASE, context, step)

    found = launch(4, overlapped, CASE.limit).values()
    wanted = launch(4, plain, CASE.limit).values()
    schedule = generate("dualpipe", 2, 6)
    for rank, ((traces, pairs, alone, waited), expected) in enumerate(zip(found, wanted, strict=True)):
        program = schedule.programs[rank // 2]
        assert pairs == sum(len(overlapped_pairs(slot)) for slot in program) > 0
        assert pairs + alone == 6
        assert waited > 0
        (trace,), (other,) = traces, expected
        for mine, theirs in ((trace.gradients, other.gradients), (trace.weights, other.weights)):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[s][name], theirs[s][name]) for s in mine for name in theirs[s])


def no_wait(patch):
    @contextlib.contextmanager
    def acquired(stream, event):
        yield
        event.record(stream)

    patch("megatron.core.pipeline_parallel.utils.stream_acquire_context", acquired)


def no_record(patch):
    @contextlib.contextmanager
    def acquired(stream, event):
        event.wait(stream)
        yield

    patch("megatron.core.pipeline_parallel.utils.stream_acquire_context", acquired)


PLAN = "megatron.core.models.common.model_chunk_schedule_plan.TransformerModelChunkSchedulePlan"


def no_record_at_the_start(patch):
    patch(f"{PLAN}.record_current_stream", lambda self: None)


def no_wait_at_the_end(patch):
    patch(f"{PLAN}.wait_current_stream", lambda self: None)


FAULTS = {
    "a node does not wait for the event": no_wait,
    "a node does not record the event": no_record,
    "the plan does not record the caller's stream": no_record_at_the_start,
    "the caller's stream does not wait for the plan": no_wait_at_the_end,
}


def test_each_wait_of_the_plan_that_is_left_out_is_refused_with_the_lines():
    @expected_warnings()
    def body(context):
        from megatron.core import parallel_state
        from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan as Plan
        from megatron.core.pipeline_parallel import utils
        from megatron.core.process_groups_config import ProcessGroupCollection

        install_cpu_standins()
        case = replace(CASE, pp=2, layout="Etttt|L")
        found = []
        parallel_state.initialize_model_parallel(1, 1, expert_model_parallel_size=2, create_gloo_process_groups=False)
        for fault in (None, *FAULTS.values()):
            with checked_streams(), pytest.MonkeyPatch.context() as patch:
                caller, comp = torch.cuda.current_stream(), torch.cuda.Stream()
                patch.setattr(utils, "_COMP_STREAM", comp)
                patch.setattr(utils, "_COMM_STREAM", torch.cuda.Stream())
                seed(case, 0)
                config = transformer_config(replace(case, layout=None))
                config.pipeline_model_parallel_size = 1
                groups = ProcessGroupCollection.use_mpu_process_groups()
                gpt = build_gpt(case, config, True, True, groups)
                if fault is not None:
                    fault(patch.setattr)
                try:
                    comp.wait_stream(caller)
                    plan = None
                    for number in range(3):
                        batches = iter([data.batch(case, 0, 0, number)])
                        later, _ = forward_step(batches, gpt, return_schedule_plan=True)
                        later = None if number == 2 else later
                        losses = Plan.run(later, plan, b_grad=None if plan is None else torch.ones(2, 16))
                        if later is not None:
                            losses.sum()  # on the caller's stream
                        plan = later
                    found.append("")
                except StreamError as error:
                    found.append(str(error))
        return found

    for found in launch(2, body, timeout=60).values():
        assert found[0] == ""
        for name, text in zip(FAULTS, found[1:], strict=True):
            assert "with no wait between them" in text, name
            assert text.count(".py:") == 2, name


def given(**options):
    return SimpleNamespace(use_dualpipe=True, pipeline_model_parallel_size=4, **options)


OVERLAP = {"dualpipe_overlap_moe": True, "expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall"}
PLANTED = [
    ({"expert_model_parallel_size": 1}, "expert_model_parallel_size is 1"),
    ({"moe_token_dispatcher_type": "allgather"}, "moe_token_dispatcher_type is 'allgather'"),
    ({"recompute_granularity": "full"}, "recompute_granularity is 'full'"),
    ({"recompute_method": "uniform"}, "recompute_method is 'uniform'"),
    ({"num_layers": 4, "moe_layer_freq": [1, 1, 1, 0]}, "moe_layer_freq is [1, 1, 1, 0] for 4 layers"),
    ({"num_layers": 4, "moe_layer_freq": 2}, "moe_layer_freq is 2 for 4 layers"),
    ({"moe_shared_expert_overlap": True}, "moe_shared_expert_overlap is True"),
    ({"mtp_num_layers": 1, "untie_embeddings_and_output_weights": True}, "mtp_num_layers is 1"),
    ({"fp8": "e4m3", "fp8_recipe": "custom"}, "fp8_recipe is 'custom'"),
]


@pytest.mark.parametrize(("wrong", "text"), PLANTED)
def test_what_the_plan_cannot_do_is_refused_with_the_flag_alone(wrong, text):
    with pytest.raises(SettingsError, match="with --dualpipe-overlap-moe") as error:
        validate_dualpipe_args(given(**{**OVERLAP, **wrong}))
    assert text in str(error.value)
    with pytest.raises(SettingsError, match="with --dualpipe-overlap-moe"):
        validate_overlap(given(**{**OVERLAP, **wrong}))
    validate_dualpipe_args(given(**{**OVERLAP, **wrong, "dualpipe_overlap_moe": False}))


def test_settings_that_the_plan_can_do_are_accepted():
    validate_dualpipe_args(given(**OVERLAP))
    validate_dualpipe_args(given(**{**OVERLAP, "num_layers": 3, "moe_layer_freq": 2}))
    validate_dualpipe_args(given(**{**OVERLAP, "recompute_granularity": "selective"}))


def test_a_forward_step_that_cannot_return_a_plan_is_refused():
    from dualpipe.megatron.expert_overlap import PlannedComputation

    call = SimpleNamespace(forward_step_func=lambda iterator, model: None, config=SimpleNamespace(no_sync_func=None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualpipe.megatron.expert_overlap.set_streams", lambda: None)
        with pytest.raises(RuleError, match="it has no parameter return_schedule_plan"):
            PlannedComputation(None, {}, call)
