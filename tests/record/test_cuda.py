"""CUDA calls are answered on the CPU."""

from contextlib import contextmanager
from types import FunctionType

import pytest
import torch

from dualpipe.record.child import cuda
from dualpipe.record.child.patches import Patches


@contextmanager
def answered():
    patches = Patches()
    try:
        with cuda.answer(patches, 2):
            yield
    finally:
        patches.undo()


def chosen(device) -> list[int]:
    with torch.cuda.device(device):
        within = torch.cuda.current_device()
    return [within, torch.cuda.current_device()]


def streamed() -> torch.Tensor:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        tensor = torch.ones(2, device="cuda") * 2
    torch.cuda.current_stream().wait_stream(side)
    tensor.record_stream(side)
    return tensor


def saved(tmp_path, **where) -> torch.Tensor:
    torch.save(torch.ones(2), tmp_path / "x.pt")
    return torch.load(tmp_path / "x.pt", **where)


CALLS = {
    "device by number": lambda tmp_path: chosen(1) == [1, 0],
    "device by name": lambda tmp_path: chosen("cuda:1") == [1, 0],
    "device itself": lambda tmp_path: chosen(0) == [0, 0],
    "properties": lambda tmp_path: torch.cuda.get_device_properties(0).total_memory > 0,
    "generator": lambda tmp_path: torch.rand(2, generator=torch.Generator("cuda").manual_seed(1)).shape == (2,),
    "generator by keyword": lambda tmp_path: isinstance(torch.Generator(device="cuda:1"), torch.Generator),
    "random state": lambda tmp_path: torch.cuda.set_rng_state(torch.cuda.get_rng_state()) is None,
    "random states": lambda tmp_path: len(torch.cuda.get_rng_state_all()) == 2,
    "seed": lambda tmp_path: torch.cuda.initial_seed() == torch.initial_seed(),
    "load": lambda tmp_path: saved(tmp_path, map_location="cuda:0").device.type == "cpu",
    "load by a table": lambda tmp_path: saved(tmp_path, map_location={"cuda:1": "cuda:0"}).device.type == "cpu",
    "streams": lambda tmp_path: streamed().tolist() == [2, 2],
    "memory": lambda tmp_path: (torch.cuda.memory_summary(), torch.cuda.reset_max_memory_allocated()) == ("", None),
    "accelerator": lambda tmp_path: (torch.accelerator.set_device_index(1), torch.cuda.current_device()) == (None, 1),
    "synchronize": lambda tmp_path: torch.accelerator.synchronize() is None,
    "tensor on it": lambda tmp_path: torch.ones(2, device=torch.accelerator.current_accelerator()).sum() == 2,
    "initialized": lambda tmp_path: torch.cuda.is_initialized(),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_call_is_answered_on_the_cpu(call, tmp_path):
    with answered():
        assert CALLS[call](tmp_path)


def test_undo_restores_torch():
    before = torch.Generator, torch.load, torch.cuda.device, torch.accelerator.synchronize
    with answered():
        assert torch.Generator is not before[0]
    assert (torch.Generator, torch.load, torch.cuda.device, torch.accelerator.synchronize) == before


def test_every_answer_is_a_separate_function():
    """torch._dynamo has a table of torch's functions and rejects a function with two names."""
    with answered():
        for module in (torch.cuda, torch.accelerator):
            answers = [
                v for v in vars(module).values() if isinstance(v, FunctionType) and v.__module__ == cuda.__name__
            ]
            assert len(answers) > 5
            assert len(set(map(id, answers))) == len(answers)
