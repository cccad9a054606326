"""Random numbers of a step that Megatron repeats, and of a training loop that resumes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.megatron.schedule import forward_backward_dualpipe as step
from reference.megatron import data
from reference.megatron.case import Case
from tests.megatron.ranks import on_each_rank

CASE = Case(pp=2, steps=1, microbatches=4, dropout=0.1, timeout=10)


def test_a_repeated_step_draws_the_same_dropout_in_both_lanes():
    def body(model, data_iterator, **keywords):
        from megatron.core import rerun_state_machine as rerun

        from dualpipe.megatron.random_streams import capture, restore

        class Machine(rerun.RerunStateMachine):
            """Without the parts of the machine that need a GPU."""

            def _reduce_any(self, value):
                return value

            def _save_state(self):
                self.saved_state = capture()

            def _restore_state(self):
                restore(self.saved_state)

        machine = Machine(mode=rerun.RerunMode.VALIDATE_RESULTS)
        rerun._GLOBAL_RERUN_STATE_MACHINE = machine
        gradients = []
        while machine.should_run_forward_backward(None):
            for chunk in model:
                chunk.zero_grad_buffer()
            step(model=model, data_iterator=data_iterator and data.of_pipeline(CASE, 0, 0), **keywords)
            gradients.append([p.main_grad.clone() for chunk in model for p in chunk.parameters()])
            machine.rerun_requested = len(gradients) == 1
            machine.continue_requested = True
            if machine.state is rerun.RerunState.RERUNNING_IN_PLACE:
                break
        assert len(gradients) == 2
        return all(map(torch.equal, *gradients))

    assert on_each_rank(body, CASE) == [True, True]


def test_a_training_loop_that_saves_the_states_of_a_rank_resumes_the_second_stage_of_a_v():
    """The loop, like Megatron-LM's, saves the CPU's state and the tracker, and knows of one stage on each rank."""

    def body(model, **keywords):
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        from dualpipe.megatron import training_loop
        from dualpipe.megatron.model import setup_of

        saved = {}

        def save_checkpoint(model):
            saved.update(cpu=torch.get_rng_state(), tracker=get_cuda_rng_tracker().get_states())

        def load_checkpoint(ddp_model):
            torch.set_rng_state(saved["cpu"])
            get_cuda_rng_tracker().set_states(dict(saved["tracker"]))

        def switched(stand_in, original):
            return stand_in(original, lambda: SimpleNamespace(use_dualpipev=True))

        def drawn():
            with stream.drawing():
                with get_cuda_rng_tracker().fork():
                    named = torch.rand(3)
                return torch.cat([named, torch.rand(3)])

        stream = setup_of(model[0]).shared.stream
        drawn()
        torch.rand(1)
        names = set(get_cuda_rng_tracker().get_states())
        switched(training_loop.save_checkpoint, save_checkpoint)(model)
        assert set(get_cuda_rng_tracker().get_states()) == names
        expected = drawn()
        drawn()
        switched(training_loop.load_checkpoint, load_checkpoint)(model)
        assert set(get_cuda_rng_tracker().get_states()) == names
        return torch.equal(drawn(), expected)

    assert on_each_rank(body, replace(CASE, schedule="dualpipev")) == [True, True]
