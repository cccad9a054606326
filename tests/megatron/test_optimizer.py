"""What the optimizer does across ranks, in settings that the court has no option for.

Half precision skips a step where any gradient overflowed; gathering parameters waits in the next forward.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.testing.launch import launch
from reference.megatron import production, truth
from reference.megatron.case import Case
from reference.megatron.comparison import differences
from reference.megatron.trace import merge

HALF = Case(pp=2, steps=4, dtype="bf16", clip=0.0, timeout=20)  # of which fp16 is made below
GATHERED = Case(pp=2, steps=2, distributed_optimizer=True, overlap_grad_reduce=True, timeout=20)


def in_fp16(party, power):
    """Let a party, in its own processes, train in fp16 with an initial loss scale of 2 to this power."""
    config_of, optimizer_of = party.transformer_config, party.optimizer_config

    def transformer_config(case):
        config = config_of(case)
        config.bf16, config.fp16 = False, True
        config.params_dtype = config.pipeline_dtype = torch.float16
        return config

    def optimizer_config(case):
        scale = {"initial_loss_scale": 2.0**power, "min_loss_scale": 1.0, "hysteresis": 1}
        return replace(optimizer_of(case), bf16=False, fp16=True, params_dtype=torch.float16, **scale)

    def build_gpt(case, config, *place):
        model = build(case, config, *place)
        return model if config.bf16 else party.Float16Module(config, model)

    party.transformer_config, party.optimizer_config = transformer_config, optimizer_config
    if party is truth:  # it asks for bf16 by name; production asks for either
        build, party.build_gpt = party.build_gpt, build_gpt


def trained(case, party, prepare, step=production.forward_backward_dualpipe):
    def body(context):
        prepare()
        return party.run_rank(case, context, *([step] if party is production else []))

    return merge(launch(party.ranks(case), body, case.limit).values())


def made(traces):
    """For each step, whether the ranks made it: one answer, or several where they part."""
    return [set(trace.done.values()) for trace in traces]


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_in_fp16_the_same_steps_are_skipped_as_under_1f1b_and_the_weights_are_equal(distributed_optimizer):
    case = replace(HALF, distributed_optimizer=distributed_optimizer)
    true, found = (trained(case, party, lambda party=party: in_fp16(party, 20)) for party in (truth, production))
    assert made(found) == made(true)
    assert {False} in made(true), "no step overflowed, so nothing was tested"
    assert {True} in made(true), "every step overflowed, so nothing was trained"
    told = map(str, differences(case, true, found, ("weights", "main_weights")))
    assert [d for d in told if "optimizer's step" not in d and "gradient norm" not in d] == []


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_an_overflow_on_one_rank_alone_lets_every_rank_skip_the_step(distributed_optimizer):
    case = replace(HALF, distributed_optimizer=distributed_optimizer, steps=1)

    def step(model, **keywords):
        losses = production.forward_backward_dualpipe(model=model, **keywords)
        if dist.get_rank() == 1:
            layer = model[0].module.module.decoder.layers[0]
            layer.mlp.linear_fc1.weight.main_grad.fill_(float("inf"))
        return losses

    assert made(trained(case, production, lambda: in_fp16(production, 10))) == [{True}]
    assert made(trained(case, production, lambda: in_fp16(production, 10), step)) == [{False}]


def gathering(hooks):
    """Losses and gradients of production whose parameters are gathered in the next forward, against the truth's."""

    def prepare():
        ddp_of, optimizer_of = production.ddp_config, production.optimizer_config
        production.ddp_config = lambda case: replace(ddp_of(case), overlap_param_gather=True)
        production.optimizer_config = lambda case: replace(optimizer_of(case), overlap_param_gather=True)

    def step(model, **keywords):
        for chunk in model:
            if not hooks and chunk.remove_forward_pre_hook_handles:
                chunk.disable_forward_pre_hook(param_sync=False)
        return production.forward_backward_dualpipe(model=model, **keywords)

    found = trained(GATHERED, production, prepare, step)
    told = differences(GATHERED, trained(GATHERED, truth, lambda: None), found, ("gradients",))
    return [d for d in map(str, told) if "weight against" not in d]  # right after a step they are not gathered yet


def test_parameters_gathered_in_the_forward_are_there_when_it_needs_them():
    assert gathering(hooks=True) == []


def test_parameters_that_were_not_gathered_are_noticed():
    with pytest.raises(RuntimeError, match=r"embedding.word_embeddings.weight of stage 0 and \d+ more differs between"):
        gathering(hooks=False)
