"""The optimizer across ranks, in settings that ``dualpipe verify`` has no option for.

In fp16 a step is skipped if any gradient overflowed; parameters can be gathered in the next forward.
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

HALF = Case(pp=2, steps=4, dtype="bf16", clip=0.0, timeout=20)  # changed to fp16 below
GATHERED = Case(pp=2, steps=2, distributed_optimizer=True, overlap_grad_reduce=True, timeout=20)


def in_fp16(module, power):
    """Make an implementation train in fp16, in its own processes, with an initial loss scale of 2 to this power."""
    config_of, optimizer_of = module.transformer_config, module.optimizer_config

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
        return model if config.bf16 else module.Float16Module(config, model)

    module.transformer_config, module.optimizer_config = transformer_config, optimizer_config
    if module is truth:  # it checks for bf16 only; production checks for both
        build, module.build_gpt = module.build_gpt, build_gpt


def trained(case, module, prepare, step=production.forward_backward_dualpipe):
    def body(context):
        prepare()
        return module.run_rank(case, context, *([step] if module is production else []))

    return merge(launch(module.ranks(case), body, case.limit).values())


def made(traces):
    """For each step, whether the ranks made it: one value, or two if they differ."""
    return [set(trace.done.values()) for trace in traces]


@pytest.mark.parametrize("distributed_optimizer", [pytest.param(False, marks=pytest.mark.long), True])
def test_in_fp16_the_same_steps_are_skipped_as_under_1f1b_and_the_weights_are_equal(distributed_optimizer):
    case = replace(HALF, distributed_optimizer=distributed_optimizer)
    true, found = (trained(case, module, lambda module=module: in_fp16(module, 20)) for module in (truth, production))
    assert made(found) == made(true)
    assert {False} in made(true), "no step overflowed, so nothing was tested"
    assert {True} in made(true), "every step overflowed, so nothing was trained"
    described = map(str, differences(case, true, found, ("weights", "main_weights")))
    assert [d for d in described if "optimizer's step" not in d and "gradient norm" not in d] == []


@pytest.mark.parametrize("distributed_optimizer", [pytest.param(False, marks=pytest.mark.long), True])
def test_after_an_overflow_on_one_rank_every_rank_skips_the_step(distributed_optimizer):
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
    """Differences of losses and gradients if production gathers parameters in the next forward."""

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
    described = map(str, differences(GATHERED, trained(GATHERED, truth, lambda: None), found, ("gradients",)))
    return [d for d in described if "weight against" not in d]  # right after a step they are not gathered yet


def test_parameters_are_gathered_before_the_forward_that_needs_them():
    assert gathering(hooks=True) == []


def test_parameters_that_were_not_gathered_are_detected():
    with pytest.raises(RuntimeError, match=r"embedding.word_embeddings.weight of stage 0 and \d+ more differs between"):
        gathering(hooks=False)
