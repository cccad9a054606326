"""B computes no gradient of a linear layer's parameters, and W computes nothing else."""

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from dualpipe.schedule import UP, B, F, Op, W
from dualpipe.schedule.generate import PLANS, generate
from dualpipe.schedule.text import loads
from tests.reference.trials import change_slot, decoder, same, toy, where, without


def linear_gradients(module):
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return [p.grad for layer in layers for p in (layer.weight, layer.bias)]


def other_gradients(module):
    linear = {p for layer in module.modules() if isinstance(layer, nn.Linear) for p in layer.parameters()}
    return [p.grad for p in module.parameters() if p not in linear]


def copies(gradients):
    return [None if g is None else g.clone() for g in gradients]


def equal(a, b):
    return all(
        x is y is None or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", PLANS)
def test_after_every_b_and_before_any_w_no_linear_layer_has_a_gradient(name):
    schedule = generate(name, 2, 6)
    with_w, checked = set(), []

    def observe(op, module):
        if op.kind is W:
            with_w.add(op.chunk)
        elif op.chunk not in with_w:
            assert all(gradient is None for gradient in linear_gradients(module)), op
            checked.append(op.kind)

    decoder(schedule, steps=1).run(schedule, observe=observe)
    assert checked.count(B) >= len(with_w)


@pytest.mark.parametrize("name", PLANS)
def test_w_changes_only_the_gradients_of_linear_layers_and_b_only_the_others(name):
    schedule = generate(name, 2, 6)
    last, changes = {}, {kind: set() for kind in (F, B, W)}

    def observe(op, module):
        now = copies(linear_gradients(module)), copies(other_gradients(module))
        before = last.get(op.chunk, ([None] * len(now[0]), [None] * len(now[1])))
        changes[op.kind].add(tuple(equal(a, b) for a, b in zip(before, now, strict=True)))
        last[op.chunk] = now

    decoder(schedule, steps=1).run(schedule, observe=observe)
    #                  linear layers unchanged, others unchanged
    assert changes == {F: {(True, True)}, B: {(True, False)}, W: {(False, True)}}


def test_after_b_the_input_of_the_stage_is_freed():
    # 1F1B on its last rank: F, then B at once.  The norm saved the received activation, which W does not need.
    schedule = generate("1f1b", 2, 3)
    trial = toy(schedule)
    inputs, checked = [], []
    trial.stages[1].register_forward_pre_hook(
        lambda module, args: inputs.append(StorageWeakRef(args[0].untyped_storage()))
    )

    def observe(op, module):
        if op.stage == 1 and op.kind in (F, B):
            checked.append((op.kind, inputs[-1].expired()))

    trial.run(schedule, observe=observe)
    assert checked == [(F, False), (B, True)] * 3


def test_a_dropped_w_leaves_out_exactly_its_share():
    schedule = loads("lane > 0 0\nrank 0: 0F0> 1F0> 1B0>+1W0> 0B0>+0W0> 0F1> 1F1> 1B1>+1W1> 0B1>+0W1>")
    trial = decoder(schedule, steps=1)
    (truth,), (found,) = trial.truth(), trial.run(without(schedule, Op(W, UP, 0, 0)))
    assert same(truth.gradients[1], found.gradients[UP, 1])
    linear = {n for n in truth.gradients[0] if ".attention." in n or ".mlp." in n}
    for name, gradient in truth.gradients[0].items():
        assert torch.equal(gradient, found.gradients[UP, 0][name]) == (name not in linear), name


def test_without_any_w_linear_layers_have_no_gradient():
    schedule = loads("lane > 0\nrank 0: 0F0> 0B0>")
    (step,) = decoder(schedule, steps=1).run(schedule)
    assert {name.rpartition(".")[0] for name in step.gradients[UP, 0]} == {
        "embedding.token", "embedding.position", "block0.attention_norm", "block0.mlp_norm", "norm"
    }  # fmt: skip


def test_a_w_that_runs_twice_adds_its_share_twice():
    schedule = loads("lane > 0\nrank 0: 0F0> 0B0> 0W0>")
    trial = decoder(schedule, steps=1)
    (once,) = trial.run(schedule)
    rank, number = where(schedule, Op(W, UP, 0, 0))
    slot = schedule.programs[rank][number]
    for spoiled in (change_slot(schedule, rank, number, slot, slot), change_slot(schedule, rank, number, slot + slot)):
        (twice,) = trial.run(spoiled)
        for name, gradient in once.gradients[UP, 0].items():
            doubled = "output" in name or ".attention." in name or ".mlp." in name
            assert torch.equal(twice.gradients[UP, 0][name], 2 * gradient if doubled else gradient), name


@pytest.mark.parametrize("op", [Op(W, UP, 1, 2), Op(W, UP, 0, 5)], ids=str)
@pytest.mark.parametrize("times", [0, 2])
def test_a_missing_or_extra_w_changes_the_gradient_of_its_stage_alone(op, times):
    schedule = generate("dualpipev", 2, 6)
    trial = decoder(schedule, steps=1)
    rank, number = where(schedule, op)
    rest = tuple(other for other in schedule.programs[rank][number] if other != op)
    (found,) = trial.run(change_slot(schedule, rank, number, rest + (op,) * times))
    (truth,) = trial.truth()
    spoiled = [stage for stage in range(4) if not same(truth.gradients[stage], found.gradients[UP, stage])]
    assert spoiled == [op.stage]


def test_the_order_of_w_changes_only_rounding():
    early = loads("lane > 0\nrank 0: 0F0> 0B0>+0W0> 0F1> 0B1>+0W1> 0F2> 0B2>+0W2>")
    late = loads("lane > 0\nrank 0: 0F0> 0B0> 0F1> 0B1> 0F2> 0B2> 0W2> 0W1> 0W0>")
    trial = decoder(early, dtype=torch.float64, steps=1)
    (a,), (b,) = trial.run(early), trial.run(late)
    a, b = (copy.copy(step.gradients[UP, 0]) for step in (a, b))
    assert not same(a, b)
    for name in a:
        # tolerance: three numbers added in the opposite order in fp64
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-12)
