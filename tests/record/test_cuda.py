"""CUDA calls are answered on the CPU."""

import inspect
import warnings
from contextlib import contextmanager
from datetime import timedelta
from types import FunctionType
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.distributed import distributed_c10d as c10d

from dualpipe.record.child import cuda, torch_cuda
from dualpipe.record.child.patches import Patches
from dualpipe.testing import record_ranks
from dualpipe.testing.launch import launch
from tests.record.two_ranks import train


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


class Doubled(torch.autograd.Function):
    """A function of the program whose backward names a GPU, as those of tensor parallelism do."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        factor = torch.full((2,), 2.0, device=torch.cuda.current_device())
        assert factor.type() == "torch.cuda.FloatTensor"
        return gradient * factor


def through(run) -> list[float]:
    x = torch.ones(2, requires_grad=True)
    run(Doubled.apply(x).sum(), x)
    return x.grad.tolist()


def engine(y) -> None:
    """Megatron's way to run a backward of an output whose memory is freed."""
    options = {"create_graph": False, "keep_graph": False, "allow_unreachable": True, "accumulate_grad": True}
    Variable._execution_engine.run_backward((y,), (torch.ones_like(y),), **options, inputs=())


CALLS = {
    "backward": lambda tmp_path: through(lambda y, x: torch.autograd.backward(y)) == [2, 2],
    "backward of a tensor": lambda tmp_path: through(lambda y, x: y.backward()) == [2, 2],
    "engine": lambda tmp_path: through(lambda y, x: engine(y)) == [2, 2],
    "gradient": lambda tmp_path: through(lambda y, x: setattr(x, "grad", torch.autograd.grad(y, x)[0])) == [2, 2],
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
    "type of a tensor": lambda tmp_path: torch.ones(2, device="cuda").type() == "torch.cuda.FloatTensor",
    "type of a half tensor": lambda tmp_path: torch.ones(2).half().type() == "torch.cuda.HalfTensor",
    "conversion by type": lambda tmp_path: torch.ones(2).type("torch.cuda.IntTensor").dtype == torch.int32,
    "conversion by class": lambda tmp_path: torch.ones(2).type(torch.cuda.LongTensor).dtype == torch.int64,
    "tensor of a class": lambda tmp_path: torch.cuda.FloatTensor([1, 2]).sum() == 3,
    "random state of a fork": lambda tmp_path: forked_random_state(),
    "random state by generator": lambda tmp_path: random_state_by_generator(),
    "random state by name": lambda tmp_path: torch.cuda.random.get_rng_state("cuda:0").dtype == torch.uint8,
    "fork_rng": lambda tmp_path: unchanged_by(torch.random.fork_rng(devices=[0]), lambda: torch.cuda.manual_seed(5)),
    "module of a device": lambda tmp_path: torch.get_device_module("cuda:0") is torch.cuda,
    "current stream": lambda tmp_path: streams_in_turn(),
    "events": lambda tmp_path: timed() >= 0,
    "memory of a device": lambda tmp_path: torch.cuda.mem_get_info()[1] > 0,
    "statistics of memory": lambda tmp_path: torch.cuda.memory_stats()["allocated_bytes.all.peak"] == 0,
    "memory by module": lambda tmp_path: torch.cuda.memory.max_memory_reserved() == 0,
    "snapshots": lambda tmp_path: torch.cuda.memory._record_memory_history(max_entries=1) is None,
    "pinned memory": lambda tmp_path: torch.ones(2).pin_memory().is_pinned() and not torch.ones(2).is_pinned(),
    "made in pinned memory": lambda tmp_path: torch.empty(2, pin_memory=True).is_pinned(),
    "factories": lambda tmp_path: all(make(device="cuda").device.type == "cpu" for make in FACTORIES),
    "default type": lambda tmp_path: default_type(),
    "profiler ranges": lambda tmp_path: in_a_range(torch.cuda.nvtx.range("x")),
    "profiler": lambda tmp_path: torch.cuda.cudart().cudaProfilerStart() is not None,
    "capture": lambda tmp_path: torch.cuda.is_current_stream_capturing() is False,
    "deterministic": lambda tmp_path: setattr(torch.backends.cudnn, "deterministic", True) is None,
}

FACTORIES = [
    lambda device: torch.zeros(2, device=device),
    lambda device: torch.arange(3, device=f"{device}:1"),
    lambda device: torch.tensor([1.0], device=torch.device(device, 0)),
    lambda device: torch.ones(1).new_empty(2, device=device),
    lambda device: torch.randn_like(torch.ones(1), device=device),
    lambda device: torch.nn.Linear(2, 2, device=device).weight,
    lambda device: torch.ones(1).to(device, non_blocking=True),
    lambda device: torch.empty(2, device=0),
]


def forked_random_state() -> bool:
    """As Megatron does with the random states of its model parallel ranks."""
    from torch.cuda import _lazy_call

    before = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(7)
    first = torch.rand(2, device="cuda")
    kept = torch.cuda.get_rng_state()
    _lazy_call(lambda: torch.cuda.default_generators[torch.cuda.current_device()].set_state(before))
    torch.cuda.set_rng_state(kept)
    second = torch.rand(2, device="cuda")
    torch.cuda.manual_seed(7)
    return torch.equal(torch.rand(4, device="cuda"), torch.cat([first, second]))


def random_state_by_generator() -> bool:
    state = torch.cuda.default_generators[1].get_state()
    drawn = torch.rand(2, device="cuda:1")
    torch.cuda.set_rng_state(state, device="cuda:1")
    return torch.equal(drawn, torch.rand(2, device="cuda:1"))


def unchanged_by(context, change) -> bool:
    before = torch.cuda.get_rng_state()
    with context:
        change()
    return torch.equal(before, torch.cuda.get_rng_state())


def streams_in_turn() -> bool:
    outer, inner = torch.cuda.current_stream(), torch.cuda.Stream(priority=-1)
    with torch.cuda.stream(inner):
        within = torch.cuda.current_stream()
        with torch.cuda.stream(None):
            again = torch.cuda.current_stream()
    return (within, again, torch.cuda.current_stream()) == (inner, inner, outer) and not isinstance(
        inner, torch.cuda.Event
    )


def timed() -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    torch.cuda.current_stream().record_event(end)
    end.synchronize()
    return start.elapsed_time(end)


def default_type() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that this function is old
        torch.set_default_tensor_type("torch.cuda.FloatTensor")
    return torch.ones(1).dtype == torch.float32


def in_a_range(context) -> bool:
    with context:
        return context(default_type) is default_type


@pytest.mark.parametrize("call", CALLS)
def test_the_call_is_answered_on_the_cpu(call, tmp_path):
    with answered():
        assert CALLS[call](tmp_path)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("CUDAGraph", lambda: torch.cuda.CUDAGraph()),
        ("graph_pool_handle", lambda: torch.cuda.graph_pool_handle()),
        ("current_blas_handle", lambda: torch.cuda.current_blas_handle()),
    ],
)
def test_what_is_not_answered_is_named_with_the_line_of_the_program(name, call):
    with (
        answered(),
        pytest.raises(RuntimeError, match=rf"calls torch.cuda.{name} at \S*test_cuda.py:\d+, which it does"),
    ):
        call()


def test_a_batch_has_one_work_if_the_program_requested_nccl():
    """gloo returns a work for every message, NCCL one for the batch."""

    def body(rank):
        for backend, count in (("nccl", 1), ("gloo", 2), ("cpu:gloo,cuda:nccl", 1)):
            group = dist.new_group([0, 1], backend=backend)
            received = torch.zeros(2)
            ops = [(dist.isend, torch.full((2,), rank + 1.0)), (dist.irecv, received)]
            works = dist.batch_isend_irecv([dist.P2POp(op, tensor, 1 - rank, group) for op, tensor in ops])
            for work in works:
                work.wait()
            assert len(works) == count, backend
            assert works[0].is_completed()
            assert received.tolist() == [2.0 - rank] * 2
        train(rank, nn.Linear(4, 4))

    recording = record_ranks(2, body, cuda_on_cpu=True)
    assert recording.caveats == ("12 message ends are left out as control data",)


class Asked(NamedTuple):
    """The answers that a program gets about a process group."""

    backend: str
    config: str
    name: str


def asked(group=None) -> Asked:
    return Asked(dist.get_backend(group), dist.get_backend_config(group), (group or dist.group.WORLD).name())


def asked_by_torch(group=None) -> Asked:
    names = {"__name__": "torch.somewhere", "dist": dist, "Asked": Asked}
    exec(inspect.getsource(asked).replace(" -> Asked", ""), names)
    return names["asked"](group)


OF_GLOO = Asked("gloo", "cpu:gloo,cuda:gloo", "gloo")
OF_NCCL = Asked("nccl", "cpu:nccl,cuda:nccl", "nccl")
OF_BOTH = Asked("cpu:gloo,cuda:nccl", "cpu:gloo,cuda:nccl", "nccl")


def test_a_group_for_nccl_answers_as_one_of_nccl_except_to_torch():
    requests = {"nccl": OF_NCCL, "NCCL": OF_NCCL, "cpu:gloo,cuda:nccl": OF_BOTH, "gloo": OF_GLOO}

    def body(context):
        answers = []
        with answered():
            for default in requests:
                dist.init_process_group(default, rank=0, world_size=1, store=dist.HashStore())
                groups = [None, dist.new_group(), *(dist.new_group([0], backend=backend) for backend in requests)]
                groups += [dist.init_device_mesh("cuda", (1, 1)).get_group(1)]
                named, _ = c10d._new_process_group_helper(
                    1, 0, [0], dist.Backend("nccl"), c10d._get_default_store(), "named", timeout=timedelta(seconds=60)
                )
                c10d._world.pg_group_ranks[named] = {0: 0}
                groups.append(named)
                answers.append((list(map(asked, groups)), set(map(asked_by_torch, groups))))
                dist.destroy_process_group()
        return answers

    (answers,) = launch(1, body, backend=None).values()
    for default, (found, found_by_torch) in zip(requests.values(), answers, strict=True):
        assert found == [default, default, *requests.values(), default, OF_NCCL]
        assert found_by_torch == {OF_GLOO}


def nccl_questions() -> tuple[bool, bool, bool, bool]:
    available = dist.is_backend_available
    return dist.is_nccl_available(), available("nccl"), available("cpu:gloo,cuda:nccl"), available("hccl")


def test_nccl_is_available_except_to_torch():
    names = {"__name__": "torch.somewhere", "dist": dist}
    exec(inspect.getsource(nccl_questions), names)
    true = nccl_questions()
    with answered():
        assert nccl_questions() == (True, True, True, False)
        assert names["nccl_questions"]() == true
        assert torch.cuda.nccl.version() >= (2, 10)
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.min_ctas = 1
    assert nccl_questions() == true


def test_undo_restores_torch():
    def changed():
        functions = (
            torch.Generator,
            torch.load,
            torch.cuda.device,
            torch.accelerator.synchronize,
            torch.cuda.nccl.version,
        )
        return *functions, vars(dist.ProcessGroup)["name"], dist.get_backend.__code__

    before = changed()
    with answered():
        assert all(new is not old for new, old in zip(changed(), before, strict=True))
    assert changed() == before


def test_every_answer_is_a_separate_function():
    """torch._dynamo has a table of torch's functions and rejects a function with two names."""
    with answered():
        for module in (torch.cuda, torch.accelerator):
            answers = [
                v for v in vars(module).values() if isinstance(v, FunctionType) and v.__module__ == torch_cuda.__name__
            ]
            assert len(answers) > 5
            assert len(set(map(id, answers))) == len(answers)
