"""``forward_backward_dualpipe`` as a training loop calls it: its keywords, results and errors.

data        0  1  2  3  4  5  ...      read on both end ranks
lane >      0     1     2              first rank -> last rank
lane <         0     1     2           last rank -> first rank
losses      0  1  2  3  4  5  ...      on the last rank, each once
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.utils import get_model_config

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.errors import StageError
from dualpipe.megatron import computation
from dualpipe.megatron.schedule import forward_backward_dualpipe as step
from dualpipe.megatron.schedule import schedule_for
from dualpipe.runtime.executor import StepError
from dualpipe.schedule import DOWN, UP, Chunk, F, Op
from proofs.prove import prove
from reference.megatron import data
from reference.megatron.data import Batch
from reference.megatron.training import forward_step
from tests.megatron.ranks import CASE, on_each_rank


class Collected(NamedTuple):
    """A nested result of a loss function."""

    mean: torch.Tensor
    shapes: list[tuple[int, ...]]


def numbers(returned: list[dict[str, torch.Tensor]]) -> list[tuple[int, int]]:
    """Replica and number of the microbatch of each returned loss."""
    return [tuple(entry["microbatch"].tolist()) for entry in returned]


V = replace(CASE, schedule="dualpipev")


def test_an_evaluation_of_any_length_works_with_the_stages_in_a_v():
    def body(data_iterator, **keywords):
        found = []
        for keywords["num_microbatches"] in (1, 3):
            found += numbers(step(data_iterator=data_iterator, forward_only=True, **keywords))
        return found

    assert on_each_rank(body, V) == [[], [(0, 0), (0, 1), (0, 2), (0, 3)]]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_an_evaluation_of_any_length_returns_each_microbatch_once_on_the_last_rank(count):
    def body(data_iterator, **keywords):
        keywords["num_microbatches"] = count
        return numbers(step(data_iterator=data_iterator, forward_only=True, **keywords))

    first, last = on_each_rank(body)
    assert first == []
    assert last == [(item % 2, item // 2) for item in range(count)]


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize("ranks", [2, 4, 6])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 13])
def test_the_forwards_of_an_evaluation_pass_the_proofs(name, ranks, count):
    schedule = schedule_for(name, ranks, count, forward_only=True)
    lanes = {UP: (count + 1) // 2, DOWN: count // 2} if name == "dualpipe" else {UP: count}
    assert schedule.microbatches == lanes
    checks = prove(schedule).as_json()["checks"]
    refuted = {name for name, check in checks.items() if check["verdict"] != "proved"}
    assert refuted <= {"complete", "memory"}  # there are no B and W to free activations


def test_training_returns_the_losses_of_both_lanes_in_the_order_of_the_data():
    first, last = on_each_rank(lambda **keywords: numbers(step(**keywords)))
    assert first == []
    assert last == [(item % 2, item // 2) for item in range(CASE.count)]


def test_non_loss_data_is_returned_as_the_loss_function_returned_it():
    def collecting(data_iterator, model):
        output, _ = forward_step(data_iterator, model)

        def collect(output, non_loss_data=False):
            assert non_loss_data
            return Collected(output.mean(), [tuple(output.shape)])

        return output, collect

    def body(forward_step_func, **keywords):
        found = step(forward_step_func=collecting, forward_only=True, collect_non_loss_data=True, **keywords)
        assert all(type(entry) is Collected and isinstance(entry.mean, torch.Tensor) for entry in found)
        return [entry.shapes for entry in found]

    _, last = on_each_rank(body)
    assert last == [[(CASE.batch, CASE.sequence)]] * CASE.count


@pytest.mark.parametrize(("first_val_step", "times"), [(None, 1), (True, 1), (False, 0)])
def test_modules_are_notified_of_the_first_microbatch_of_each_lane(first_val_step, times):
    def body(model, **keywords):
        called = []
        for chunk in model:
            chunk.set_is_first_microbatch = lambda chunk=chunk: called.append(id(chunk))
        step(model=model, forward_only=True, first_val_step=first_val_step, **keywords)
        return [called.count(id(chunk)) for chunk in model]

    assert on_each_rank(body) == [[times, times]] * 2


@pytest.mark.parametrize("as_list", [False, True])
def test_grad_sync_func_gets_each_chunks_parameters_once_after_the_last_w(as_list):
    def body(model, **keywords):
        config, calls = model[0].config, []

        def synchronise(parameters):
            names = {id(p) for p in parameters}
            calls.append([names == {id(p) for p in chunk.parameters()} for chunk in model].index(True))
            model[calls[-1]].start_grad_sync()

        config.grad_sync_func = [synchronise, synchronise] if as_list else synchronise
        step(model=model, **keywords)
        return calls, [bool(p.main_grad.any()) for chunk in model for p in chunk.parameters()]

    for calls, moved in on_each_rank(body, replace(CASE, overlap_grad_reduce=True)):
        assert calls == [0, 1]
        assert all(moved)


def test_one_no_sync_func_for_the_whole_model_works_like_a_list():
    def gradients(single):
        def body(model, **keywords):
            from contextlib import ExitStack, contextmanager

            @contextmanager
            def no_sync():
                with ExitStack() as stack:
                    for chunk in model:
                        stack.enter_context(chunk.no_sync())
                    yield

            if single:
                model[0].config.no_sync_func = no_sync
            step(model=model, **keywords)
            return [p.main_grad.clone() for chunk in model for p in chunk.parameters()]

        return on_each_rank(body, replace(CASE, overlap_grad_reduce=True))

    for one, many in zip(gradients(True), gradients(False), strict=True):
        assert all(map(torch.equal, one, many))


def test_force_all_reduce_and_the_number_of_tokens_reach_finalize_model_grads():
    def body(model, **keywords):
        given = {}

        def finalize(chunks, num_tokens=None, pg_collection=None, force_all_reduce=False):
            given.update(chunks=len(chunks), tokens=int(num_tokens), force=force_all_reduce)
            given["stages"] = [chunk.module.pre_process for chunk in chunks]
            for chunk in chunks:
                chunk.finish_grad_sync()

        model[0].config.finalize_model_grads_func = finalize
        step(model=model, force_all_reduce=True, **keywords)
        return given

    case = replace(CASE, per_token_loss=True)
    tokens = sum(int(batch.mask.sum()) for batch in data.of_pipeline(case, 0, 0))
    for given in on_each_rank(body, case):
        assert given == {"chunks": 2, "tokens": tokens, "force": True, "stages": [True, False]}


def test_the_loss_scale_multiplies_the_gradients_and_not_the_losses():
    def body(model, **keywords):
        step(model=model, **keywords)
        once = [p.main_grad.clone() for chunk in model for p in chunk.parameters()]
        model[0].config.grad_scale_func = lambda loss: loss * 4
        for chunk in model:
            chunk.zero_grad_buffer()
        step(**{**keywords, "data_iterator": None if keywords["data_iterator"] is None else batches()}, model=model)
        return all(torch.equal(4 * a, p.main_grad) for a, p in zip(once, parameters(model), strict=True))

    assert on_each_rank(body) == [True, True]


def batches() -> Any:
    return data.of_pipeline(CASE, 0, 0)


def parameters(model) -> list[torch.nn.Parameter]:
    return [p for chunk in model for p in chunk.parameters()]


def refused(**changed: Any) -> list[str]:
    """The error of each rank with these keywords changed; a list has one value for each rank."""

    def body(model, **keywords):
        import torch.distributed as dist

        for name, value in changed.items():
            keywords[name] = value[dist.get_rank()] if isinstance(value, list) else value
        with pytest.raises(Exception) as caught:  # noqa: PT011 # the caller checks type and text
            step(model=model, **keywords)
        return f"{type(caught.value).__name__}: {caught.value}"

    return on_each_rank(body, replace(CASE, timeout=5))


def test_too_few_or_odd_microbatches_are_refused_before_any_message():
    assert all("at least two microbatches per rank" in error for error in refused(num_microbatches=2))
    assert all("even" in error for error in refused(num_microbatches=7))


def test_different_numbers_of_microbatches_or_shapes_name_the_ranks_that_differ():
    for error in refused(num_microbatches=[4, 6]):
        assert error.startswith("DisagreementError: every rank runs with the same schedule")
        assert "rank 0 has" in error
        assert "rank 1 has" in error
    for error in refused(micro_batch_size=[2, 4]):
        assert "the same boundary between stages" in error


def test_unsupported_arguments_are_refused_by_name():
    assert all("adjust_tensor_shapes_fn" in error for error in refused(adjust_tensor_shapes_fn=print))


def test_a_step_whose_data_ends_early_names_microbatch_and_lane():
    def body(model, data_iterator, **keywords):
        items: list[Batch] = [] if data_iterator is None else [next(data_iterator) for _ in range(3)]
        with pytest.raises(Exception) as caught:  # noqa: PT011 # one rank lacks data, the other waits for it in vain
            step(model=model, data_iterator=iter(items), **keywords)
        return f"{type(caught.value).__name__}: {caught.value}"

    errors = on_each_rank(body, replace(CASE, timeout=3))
    assert any("before microbatch 1 of lane <" in error for error in errors), errors


def test_a_model_that_build_dualpipe_model_did_not_build_is_refused():
    def body(model, **keywords):
        with pytest.raises(ValueError, match="build_dualpipe_model"):
            step(model=[torch.nn.Linear(1, 1)], **keywords)

    on_each_rank(body)


def test_a_step_that_fails_in_a_backward_leaves_no_weight_gradient_to_the_next_one():
    def body(model, **keywords):
        from dualpipe.megatron.model import setup_of

        store, backwards, dropped = setup_of(model[0]).shared.store, [], []
        clear = store.clear
        store.clear = lambda: (dropped.append(len(store._deferred)), clear())

        def fail(gradient):
            backwards.append(1)
            if len(backwards) == CASE.count:
                raise ValueError("planted")

        for chunk in model:  # its gradient is computed after those of all linear layers of the chunk
            chunk.module.decoder.layers[0].input_layernorm.weight.register_hook(fail)
        with pytest.raises((ValueError, StepError)):
            step(model=model, **keywords)
        return dropped, len(store._deferred)

    for dropped, left in on_each_rank(body, replace(CASE, timeout=3)):
        assert dropped == [1]
        assert left == 0


@pytest.mark.parametrize("place", ["loss of rank 1", "data of rank 0", "reduction of rank 0"])
def test_after_an_error_that_the_loop_catches_the_next_call_raises_on_every_rank(place):
    def body(data_iterator, forward_step_func, **keywords):
        rank, calls = torch.distributed.get_rank(), [0]
        config = get_model_config(keywords["model"][0])

        def failing(iterator, model):
            output, loss = forward_step_func(iterator, model)

            def nan(*arguments):
                calls[0] += 1
                if calls[0] == 2:
                    raise FloatingPointError("the loss is nan")
                return loss(*arguments)

            return output, nan

        def finalize(*arguments, **options):
            raise FloatingPointError("a gradient is nan")

        def as_if_reduced(model, *arguments, **options):
            for chunk in model:
                chunk.reductions += 1

        if place == "loss of rank 1" and rank == 1:
            forward_step_func = failing
        if place == "data of rank 0" and rank == 0:
            data_iterator = iter([next(data_iterator)])
        elif data_iterator is not None:
            data_iterator = iter(list(data_iterator) * 3)
        if place == "reduction of rank 0" and rank == 0:
            config.finalize_model_grads_func = finalize
        elif place == "reduction of rank 0":
            config.finalize_model_grads_func = as_if_reduced
        outcomes = []
        for _ in range(3):  # a rank that had done its part may learn of the failure within its next call
            try:
                step(data_iterator=data_iterator, forward_step_func=forward_step_func, **keywords)
                outcomes.append("ok")
            except Exception as error:
                outcomes.append(f"{type(error).__name__}: {error}")
        return outcomes

    for rank, outcomes in enumerate(on_each_rank(body)):
        assert place.endswith(str(rank)) <= (outcomes[0] != "ok")
        assert outcomes[2].startswith("SpoiledError"), outcomes
        assert f"rank {place[-1]} failed in " in outcomes[2]


def test_a_loss_function_that_returns_no_scalar_is_an_error_of_the_stage(monkeypatch):
    def returning_three_losses(*arguments, **options):
        arguments[5].append({})  # the losses of the microbatches before
        return torch.zeros(3), 0

    monkeypatch.setattr(computation, "forward_step", returning_three_losses)
    config = SimpleNamespace(no_sync_func=None)
    call = computation.Call(lambda: None, {Chunk(UP, 1): None}, config, False, False, None, 1)
    model = {Chunk(UP, 1): (torch.nn.Identity(), SimpleNamespace(drawing=nullcontext))}
    with pytest.raises(StageError, match=r"at 1F0> it returned a tensor of shape \[3\]"):
        computation.MegatronComputation(schedule_for("dualpipe", 2, 4), model, call).forward(Op(F, UP, 1, 0), ())
