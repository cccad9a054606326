"""Imports Megatron without its known warnings, before a test module imports it; and a training loop to install into."""

import sys
import types
from types import SimpleNamespace

import pytest

import reference.megatron  # noqa: F401
from reference.megatron.importing import expected_warnings

with expected_warnings():
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel.schedules as schedules

    from dualpipe.megatron import installation

MEGATRONS = SimpleNamespace(  # not names of this module, or they would be replaced as in any other
    selector=schedules.get_forward_backward_func, optimizer=megatron.core.optimizer.get_megatron_optimizer
)

ON = SimpleNamespace(
    use_dualpipe=True,
    pipeline_model_parallel_size=2,
    accumulate_allreduce_grads_in_fp32=True,
    check_for_nan_in_loss_and_grad=False,
    ddp_bucket_size=1000,
    overlap_grad_reduce=True,
)
OFF = SimpleNamespace(use_dualpipe=False)


@pytest.fixture
def uninstalled():
    """Afterwards everything is Megatron's again."""
    yield
    installation.uninstall()
    assert megatron.core.pipeline_parallel.get_forward_backward_func is MEGATRONS.selector
    assert schedules.get_forward_backward_func is MEGATRONS.selector
    assert megatron.core.optimizer.get_megatron_optimizer is MEGATRONS.optimizer


@pytest.fixture
def training(monkeypatch):
    """A training loop like Megatron-LM's: it imports the functions by name, and defines its own get_model."""
    loop = types.ModuleType("megatron.training.training")

    def get_model(model_provider_func, model_type="any", wrap_with_ddp=True, config=None, pg_collection=None):
        return "Megatron's model", model_provider_func, model_type, wrap_with_ddp, config

    loop.get_model = get_model
    loop.get_forward_backward_func = MEGATRONS.selector
    loop.their_name_for_it = MEGATRONS.selector
    loop.get_megatron_optimizer = MEGATRONS.optimizer
    monkeypatch.setitem(sys.modules, loop.__name__, loop)
    return loop
