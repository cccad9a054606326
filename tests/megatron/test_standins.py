"""The stand-ins replace what a CPU lacks, can be removed completely, and do nothing on a GPU."""

from __future__ import annotations

import copy
import importlib
import warnings

import pytest
import torch

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.megatron.on_cpu import core as standins
from dualpipe.megatron.on_cpu import install_loop_standins
from reference.megatron.importing import expected_warnings


@pytest.fixture
def installed():
    standins.install_cpu_standins()
    yield
    standins.remove_cpu_standins()


def names() -> dict[str, object]:
    """The current values of the names that the stand-ins replace."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    modules = [importlib.import_module(name) for name in standins._LITERAL_CUDA]
    seen = {module.__name__: module.torch for module in modules}
    return seen | {
        "device": torch.cuda.current_device,
        "type": torch.Tensor.type,
        "add": random.CudaRNGStatesTracker.add,
        "fork": random.CudaRNGStatesTracker.fork,
        "get": random._get_cuda_rng_state,
        "norm": WrappedTorchNorm.__new__,
    }


def test_removing_the_stand_ins_restores_everything():
    before = names()
    standins.install_cpu_standins()
    standins.install_cpu_standins()
    assert all(before[name] is not now for name, now in names().items())
    standins.remove_cpu_standins()
    assert names() == before


def test_with_a_gpu_nothing_is_replaced(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = names()
    standins.install_cpu_standins()
    assert names() == before


@pytest.mark.usefixtures("installed")
def test_a_literal_device_is_the_cpu_only_in_megatrons_modules():
    from megatron.core.optimizer import clip_grads

    assert clip_grads.torch.zeros(2, device="cuda").device.type == "cpu"
    assert clip_grads.torch.nn is torch.nn
    with pytest.raises((RuntimeError, AssertionError), match="CUDA"):
        torch.zeros(2, device="cuda")


@pytest.mark.usefixtures("installed")
def test_a_tensor_reports_a_gpu_type_and_still_converts():
    tensor = torch.zeros(2)
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert tensor.type(torch.float64).dtype is torch.float64


@pytest.mark.usefixtures("installed")
def test_a_forked_random_state_continues_and_leaves_the_running_one_alone():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 5)
    torch.manual_seed(1)
    apart = torch.rand(4)
    torch.manual_seed(1)
    drawn = []
    for _ in range(2):
        with tracker.fork():
            drawn.append(torch.rand(3))
    assert torch.equal(torch.rand(4), apart)
    assert torch.equal(torch.cat(drawn), torch.rand(6, generator=torch.Generator().manual_seed(5)))
    with pytest.raises(ValueError, match="already"):
        tracker.add("other", 5)


@pytest.mark.usefixtures("installed")
def test_norms_are_marked_for_the_reduction_of_sequence_parallelism():
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from reference.megatron.case import Case
    from reference.megatron.model import transformer_config

    config = transformer_config(Case(tp=2, sequence_parallel=True))
    with expected_warnings():
        norm = WrappedTorchNorm(config=config, hidden_size=8)
    assert all(parameter.sequence_parallel for parameter in norm.parameters())
    assert config.sequence_parallel
    other = copy.copy(config)
    other.persist_layer_norm = True
    with pytest.raises(AssertionError, match="persist"):
        WrappedTorchNorm(config=other, hidden_size=8)


def test_an_unexpected_warning_is_still_raised():
    with expected_warnings(), pytest.warns(UserWarning, match="something else"):
        warnings.warn("something else", UserWarning, stacklevel=1)
    with warnings.catch_warnings(record=True) as seen, expected_warnings():
        warnings.warn("Apex is not installed. Falling back to Torch Norm", UserWarning, stacklevel=1)
    assert not seen


def test_legacy_types_of_the_gpu_make_tensors_and_have_no_instances():
    install_loop_standins()
    try:
        assert torch.equal(torch.cuda.LongTensor([1, 2]), torch.tensor([1, 2]))
        assert not isinstance(torch.ones(1), (torch.cuda.FloatTensor, torch.cuda.DoubleTensor))
    finally:
        standins.remove_cpu_standins()
