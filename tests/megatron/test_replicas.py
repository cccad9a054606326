"""A step after which the replicas of a stage would differ is refused, or detected at the next step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.errors import RuleError
from dualpipe.megatron import build_dualpipe_optimizer, save_checkpoint
from dualpipe.megatron.checkpoint import require_equal_replicas
from dualpipe.megatron.model import setup_of
from dualpipe.megatron.replicas import checksum
from dualpipe.megatron.schedule import forward_backward_dualpipe as step
from dualpipe.testing.launch import launch
from reference.megatron import data, production
from reference.megatron.case import Case
from reference.megatron.training import forward_step
from tests.megatron.ranks import on_each_rank

CASE = Case(pp=2, steps=2, microbatches=4, timeout=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_a_checksum_depends_on_each_bit_and_each_index(dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    same = checksum(tensor)
    assert checksum(tensor.t().contiguous().t()) == same
    swapped = tensor.clone()
    swapped[0, 0], swapped[2, 3] = tensor[2, 3], tensor[0, 0]
    if not torch.equal(swapped, tensor):
        assert checksum(swapped) != same
    changed = tensor.clone()
    changed[1, 1] = 0
    assert checksum(changed) != same


def test_a_checksum_distinguishes_signed_zeros_and_nans():
    zero = torch.zeros(2)
    assert checksum(zero) != checksum(-zero)
    one, other = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert checksum(one) != checksum(other)
    assert checksum(one) == checksum(one.clone())


# Before the first message of a step


def refusals(model, keywords):
    """The error that the step raises for each mistake in a program.  It sends no message for any of them."""
    config = model[0].config

    def raised(chunks=model, **settings):
        before = {name: getattr(config, name) for name in settings}
        for name, value in settings.items():
            setattr(config, name, value)
        try:
            step(model=chunks, **keywords)
        except RuleError as error:
            return str(error)
        finally:
            for name, value in before.items():
                setattr(config, name, value)
        return "nothing"

    found = {
        "no finalize": raised(finalize_model_grads_func=None),
        "no_sync of three": raised(no_sync_func=[model[0].no_sync] * 3),
        "no_sync of none": raised(no_sync_func=[]),
        "no_sync of strings": raised(no_sync_func=["a", "b"]),
        "grad_sync of one": raised(grad_sync_func=[print]),
        "param_sync of an int": raised(param_sync_func=3),
        "grad_sync without overlap": raised(grad_sync_func=print),
        "per token after building": raised(calculate_per_token_loss=True),
        "a flag after building": raised(cpu_offloading=True),
        "swapped": raised(model[::-1]),
        "one chunk": raised(model[:1]),
        "one chunk twice": raised([model[0], model[0]]),
        "unwrapped": raised([chunk.module for chunk in model]),
    }
    for name, part in (("optimizer of one", model[:1]), ("optimizer swapped", model[::-1])):
        with pytest.raises(RuleError) as caught:
            build_dualpipe_optimizer(production.optimizer_config(CASE), part)
        found[name] = str(caught.value)
    layer = model[1].module.decoder.layers[0]
    layer.added = nn.Parameter(torch.ones(2))
    found["added"] = raised()
    del layer.added
    return found


def test_mistakes_that_would_make_replicas_differ_are_refused_before_any_message():
    first, second = on_each_rank(lambda model, **keywords: refusals(model, keywords), replace(CASE, steps=1))
    assert first == second
    expected = {
        "no finalize": "training needs it: got None; use megatron.core.distributed.finalize_model_grads, and set it on",
        "no_sync of three": "no_sync_func must be None, one function, or a list of 2",
        "no_sync of none": "got 0 of []",
        "no_sync of strings": "set [chunk.no_sync for chunk in model]",
        "grad_sync of one": "set [chunk.start_grad_sync for chunk in model]",
        "param_sync of an int": "got 3; set [chunk.start_param_sync for chunk in model]",
        "grad_sync without overlap": "gradients must be reduced once per step",
        "per token after building": "set it before building the model",
        "a flag after building": "cpu_offloading is True",
        "swapped": "got stages [1, 0]",
        "one chunk": "got stages [0]",
        "one chunk twice": "got stages [0, 0]",
        "unwrapped": "got a chunk without it",
        "optimizer of one": "got stages [0]",
        "optimizer swapped": "got stages [1, 0]",
        "added": "decoder.layers.0.added did not",
    }
    assert {name: text for name, text in expected.items() if text not in first[name]} == {}


def test_a_distributed_optimizer_that_dualpipe_did_not_build_is_refused():
    def body(model, **keywords):
        setup_of(model[0]).shared.optimizer = lambda: None
        with pytest.raises(RuleError, match="a model without an optimizer from build_dualpipe_optimizer"):
            step(model=model, **keywords)

    on_each_rank(body, replace(CASE, steps=1, distributed_optimizer=True))


# During the step


@pytest.mark.parametrize("times", [0, 2])
def test_gradients_not_reduced_exactly_once_fail_the_step_and_an_evaluation_reduces_none(times):
    def body(model, data_iterator, **keywords):
        config = model[0].config
        real = config.finalize_model_grads_func

        def batches():
            return data_iterator and data.of_pipeline(CASE, 0, 0)

        def finalize(chunks, *args, **options):
            for _ in range(times):
                real(chunks, *args, **options)

        step(model=model, data_iterator=batches(), **keywords)
        gradients = [p.main_grad.clone() for chunk in model for p in chunk.parameters()]
        reductions = [chunk.reductions for chunk in model]
        step(model=model, data_iterator=batches(), **{**keywords, "forward_only": True})
        assert [chunk.reductions for chunk in model] == reductions
        for parameter, before in zip((p for chunk in model for p in chunk.parameters()), gradients, strict=True):
            assert torch.equal(parameter.main_grad, before)
            assert before.any() or parameter.dim() < 2
        config.finalize_model_grads_func = finalize
        with pytest.raises(RuleError) as caught:
            step(model=model, data_iterator=batches(), **keywords)
        return str(caught.value)

    for error in on_each_rank(body, replace(CASE, steps=1)):
        assert f"those of stage 0 were reduced {times} times" in error


def test_with_grad_sync_func_no_bucket_is_reduced_before_it():
    def body(model, **keywords):
        config, events = model[0].config, []
        for chunk in model:
            for group in chunk.bucket_groups:
                group.is_first_batch = False  # from the second batch on, a bucket starts as soon as it is ready
                group.golden_per_param_grad_ready_counts = dict.fromkeys(group.params, 1)
                start = group.start_grad_sync
                group.start_grad_sync = lambda *a, start=start, **k: (events.append("bucket"), start(*a, **k))
        calls = [lambda _, chunk=chunk: (events.append("called"), chunk.start_grad_sync()) for chunk in model]
        config.grad_sync_func = calls
        step(model=model, **keywords)
        return events

    for events in on_each_rank(body, replace(CASE, steps=1, overlap_grad_reduce=True)):
        assert events[0] == "called"
        assert events.count("called") == 2


def test_returned_losses_of_both_lanes_have_no_graph():
    def attached(iterator, model):
        output, loss = forward_step(iterator, model)

        def undetached(output):
            total, tokens, reported = loss(output)
            return total, tokens, {"lm loss": total, "more": [output.mean()], **reported, "again": (total,)}

        return output, undetached

    def body(model, forward_step_func, **keywords):
        found = step(model=model, forward_step_func=attached, **keywords)
        return [tensor.requires_grad for each in found for tensor in (each["again"][0], *each["more"], each["lm loss"])]

    assert on_each_rank(body, replace(CASE, steps=1))[1] == [False] * 3 * CASE.count


def test_under_a_loss_per_token_a_loss_function_that_counts_none_is_refused():
    def uncounted(iterator, model):
        output, loss = forward_step(iterator, model)
        return output, lambda output: (lambda total, _, reported: (total, reported))(*loss(output))

    def body(model, forward_step_func, **keywords):
        with pytest.raises(RuleError, match="it counted no token in any microbatch"):
            step(model=model, forward_step_func=uncounted, **keywords)

    on_each_rank(body, replace(CASE, steps=1, per_token_loss=True))


# After the first update, and at a save


def second_step(disturb, case=CASE):
    """The error of each rank in the second step, before which ``disturb(model)`` has run."""

    def rank(context):
        count = []

        def disturbed(model, **keywords):
            count.append(1)
            if len(count) < 2:
                return step(model=model, **keywords)
            disturb(model)
            with pytest.raises(RuleError) as caught:
                step(model=model, **keywords)
            raise AssertionError(str(caught.value))

        with pytest.raises(AssertionError) as caught:
            production.run_rank(case, context, disturbed)
        return str(caught.value)

    return launch(production.ranks(case), rank, case.limit).values()


def one_weight(model):
    """Flip the last bit of one weight, on one rank."""
    if dist.get_rank() == 1:
        weight = model[1].module.decoder.layers[1].mlp.linear_fc1.weight
        weight.data.view(torch.int32)[3, 5] ^= 1


def test_replicas_that_differ_in_one_bit_raise_on_every_rank_and_name_the_parameter():
    for error in second_step(one_weight):
        assert "decoder.layers.1.mlp.linear_fc1.weight of stage 1 differs between ranks 0 and 1" in error


def test_an_optimizer_that_updates_only_one_chunk_is_detected():
    def rank(context):
        real = production.build_dualpipe_optimizer

        def build(config, model):
            built = real(config, model)
            stage = [p for p in model[0].parameters() if p.requires_grad]
            for part in built.chained_optimizers if hasattr(built, "chained_optimizers") else [built]:
                for group in part.optimizer.param_groups:
                    group["params"] = [p for p in group["params"] if any(p is q for q in stage)]
            return built

        production.build_dualpipe_optimizer = build
        production.run_rank(CASE, context)

    with pytest.raises(RuntimeError, match="updates one chunk of a rank and leaves stage 1 unchanged"):
        launch(production.ranks(CASE), rank, CASE.limit).values()


class Counted(nn.Module):
    """A norm that keeps a statistic of its inputs, as BatchNorm does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("seen", torch.rand(1))  # differs between the ranks that build it

    def forward(self, x):
        self.seen += x.detach().abs().mean()
        return self.inner(x)


def with_statistics(built=production.build_gpt):
    def build_gpt(*args):
        model = built(*args)
        model.decoder.layers[0].input_layernorm = Counted(model.decoder.layers[0].input_layernorm)
        return model

    production.build_gpt = build_gpt


def test_a_random_buffer_starts_equal_and_one_that_forwards_update_fails_the_first_step():
    def rank(context):
        with_statistics()

        def checked(model, **keywords):
            require_equal_replicas(model)
            return step(model=model, **keywords)

        production.run_rank(CASE, context, checked)

    outcome = launch(production.ranks(CASE), rank, CASE.limit)
    assert len(outcome.failures) == 2
    for failure in outcome.failures:
        assert "input_layernorm.seen of stage 0 and 1 more differs between ranks 0 and 1" in str(failure)
        assert "check_step" in failure.trace, "detected in the step, and not when the chunks were built"


def test_replicas_that_differ_are_not_saved(tmp_path):
    def body(model, **keywords):
        one_weight(model)
        with pytest.raises(RuleError, match=r"linear_fc1\.weight of stage 1 differs"):
            save_checkpoint(tmp_path, model)

    on_each_rank(body, replace(CASE, steps=1))
    assert list(tmp_path.iterdir()) == []


# Statistics that layers collect


def test_statistics_are_combined_over_both_replicas_of_a_stage():
    from dualpipe.megatron.statistics import combine_over_lanes

    def rank(context):
        pairs = [dist.new_group([0, 3]), dist.new_group([1, 2])]
        chunk = nn.Module()
        chunk.router, chunk.attention = nn.Module(), nn.Module()
        chunk.router.local_tokens_per_expert = torch.tensor([10.0**context.rank])
        chunk.attention.current_max_attn_logits = torch.tensor([float(context.rank), -float(context.rank)])
        config = SimpleNamespace(moe_router_enable_expert_bias=True, log_max_attention_logit=True)
        combine_over_lanes([chunk], config, pairs[context.rank in (1, 2)])
        return chunk.router.local_tokens_per_expert.item(), chunk.attention.current_max_attn_logits.tolist()

    assert launch(4, rank, 30.0).values() == [(1001, [3, 0]), (110, [2, -1]), (110, [2, -1]), (1001, [3, 0])]
