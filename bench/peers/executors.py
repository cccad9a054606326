"""What runs a model: our pipeline, DeepSeek's package, and the schedules of torch.

Each has ``modules``, whose layers it trains, and ``step()``, which returns the losses of this rank by microbatch.
"""

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining

from dualpipe.pipeline import Feed, Pipeline, ProcessGroupTransport, TensorSpec
from dualpipe.schedule.generate import generate
from tests.record import upstream

Defer = Callable[[Callable[[], None]], bool]
"""Takes a weight gradient that is to be computed later; returns false if it has to be computed at once."""


class Case(Protocol):
    """A model and its data."""

    ranks: int
    microbatches: int
    shape: tuple[int, int]
    """Of a microbatch at every boundary; float32."""
    defers: bool
    """Whether its layers give their weight gradients to ``defer``; otherwise an executor splits stock layers itself."""

    def stage(self, number: int, stages: int, defer: Defer | None) -> nn.Sequential:
        """Stage ``number`` of so many; each layer has the ``number`` that it has in the model."""

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels of all microbatches, joined along the first dimension."""

    def criterion(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor: ...


class Ours:
    def __init__(self, case: Case, schedule: str, transport: Callable[[], Any] | None = None) -> None:
        plan, rank = generate(schedule, case.ranks, case.microbatches), dist.get_rank()
        stages = {
            (lane, number): case.stage(number, plan.stages, self.defer if case.defers else None)
            for lane, route in plan.routes.items()
            for number, holder in enumerate(route)
            if holder == rank
        }
        self.modules = list(stages.values())
        self.transport = transport() if transport else ProcessGroupTransport(timeout=60.0)
        boundary = [TensorSpec(case.shape, torch.float32)]
        self.pipeline = Pipeline(plan, stages, case.criterion, boundary, self.transport)
        counts = [plan.microbatches[lane] for lane in plan.lanes]
        self.first = dict(zip(plan.lanes, (0, counts[0]), strict=False))
        inputs, labels = ([(part,) for part in whole.split(case.shape[0])] for whole in case.data())
        self.feed = Feed(
            *({lane: rows[at : at + counts[0]] for lane, at in self.first.items()} for rows in (inputs, labels))
        )

    def defer(self, closure) -> bool:
        if self.pipeline.store.key is None:
            return False
        self.pipeline.store.put(closure)
        return True

    def step(self):
        result = self.pipeline.step(self.feed, reduce_gradients=False)
        return {self.first[lane] + mb: loss for lane, losses in result.losses.items() for mb, loss in losses.items()}

    def close(self) -> None:
        self.transport.close()


class DeepSeek:
    def __init__(self, case: Case, package, stock: bool = False) -> None:
        self.case, self.package, rank = case, package, dist.get_rank()
        package.set_p2p_tensor_shapes([case.shape])
        package.set_p2p_tensor_dtype(torch.float32)
        numbers = (rank, case.ranks - 1 - rank)  # stages of the lane that comes from rank 0, and of the other lane
        self.modules = [case.stage(number, case.ranks, None if stock else self.defer) for number in numbers]
        self.pipe = package.DualPipe(tuple(self.modules))
        inputs, labels = (whole.chunk(2) for whole in case.data())
        self.lane = {0: 0, case.ranks - 1: 1}.get(rank)  # the half of the data that enters here
        self.inputs = () if self.lane is None else (inputs[self.lane],)
        self.labels = [] if self.lane is None else [labels[1 - self.lane]]  # of the half that ends here

    def defer(self, closure) -> bool:
        if not self.package.store.enabled:
            return False
        self.package.store.put(closure)
        return True

    def step(self):
        ends = self.lane is not None
        microbatches = self.case.microbatches
        found, _ = self.pipe.step(
            *self.inputs, num_chunks=microbatches, criterion=self.case.criterion if ends else None, labels=self.labels
        )
        first = 0 if self.lane == 1 else microbatches // 2
        return {first + mb: loss for mb, loss in enumerate(found)} if ends else {}

    def close(self) -> None:
        pass


class Torch:
    def __init__(self, case: Case, kind: str) -> None:
        rank, ranks = dist.get_rank(), case.ranks
        v = kind != "Schedule1F1B"
        numbers = (rank, 2 * ranks - 1 - rank) if v else (rank,)
        stages, self.modules = [], []
        boundary = torch.empty(*case.shape, requires_grad=True)
        for number in numbers:
            kept: list[Callable[[], None]] = []
            count = ranks * len(numbers)
            defer = (lambda closure, kept=kept: kept.append(closure) or True) if case.defers else None
            self.modules.append(case.stage(number, count, defer))
            stages.append(
                pipelining.PipelineStage(
                    self.modules[-1],
                    number,
                    count,
                    torch.device("cpu"),
                    input_args=boundary if number else boundary.detach(),
                    output_args=boundary,
                    dw_builder=(lambda kept=kept: taken(kept)) if case.defers else None,
                )
            )
        make = getattr(pipelining, kind)
        self.schedule = make(stages if v else stages[0], case.microbatches, loss_fn=case.criterion, scale_grads=False)
        self.x, self.labels = case.data()
        self.begins, self.ends = 0 in numbers, len(numbers) * ranks - 1 in numbers

    def step(self):
        losses: list[torch.Tensor] = []
        arguments = (self.x,) if self.begins else ()
        self.schedule.step(*arguments, **({"target": self.labels, "losses": losses} if self.ends else {}))
        return dict(enumerate(losses))

    def close(self) -> None:
        pass


def taken(kept: list[Callable[[], None]]) -> Callable[[], None]:
    """Runs what was deferred until now."""
    closures = kept.copy()
    kept.clear()
    return lambda: [closure() for closure in closures] and None


def deepseek() -> SimpleNamespace:
    """DeepSeek's package on a CPU.  Its import name is ours, so our modules are set aside while it is imported."""
    folder = upstream.folder()
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if re.match(r"dualpipe(\.|$)", name)}
    sys.path.insert(0, str(folder))
    try:
        theirs, comm, utils = map(importlib.import_module, ("dualpipe", "dualpipe.comm", "dualpipe.utils"))
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if re.match(r"dualpipe(\.|$)", name)]:
            del sys.modules[name]
        sys.modules.update(ours)
    torch.cuda.current_device = lambda: "cpu"  # it asks for the device of the stages, and wants that of the GPU
    comm.build_from_tensor_shapes = lambda: [
        torch.empty(shape, dtype=comm.TENSOR_DTYPE, requires_grad=True) for shape in comm.TENSOR_SHAPES
    ]
    return SimpleNamespace(
        DualPipe=theirs.DualPipe,
        set_p2p_tensor_shapes=theirs.set_p2p_tensor_shapes,
        set_p2p_tensor_dtype=theirs.set_p2p_tensor_dtype,
        store=utils.WeightGradStore,
    )


@dataclass(frozen=True)
class Entrant:
    """An executor: how it is made for a case, and which simulation its runtime is like.

    ``make_alone`` makes it for one rank without the others; an executor that is ``alone`` is made only so.
    """

    make: Callable[[Case], Ours | DeepSeek | Torch]
    schedule: str
    blocking: bool = False
    make_alone: Callable[[Case], Ours | DeepSeek | Torch] | None = None
    alone: bool = False

    def stages(self, case: Case) -> int:
        """The number of stages of its schedule."""
        return generate(self.schedule, case.ranks, case.microbatches).stages


def entrants(package: SimpleNamespace | None) -> dict[str, Entrant]:
    found = {
        f"ours {late}": Entrant(lambda case, name=name: Ours(case, name), name)
        for late, name in (("none", "dualpipe"), ("tail", "dualpipe-late-tail"), ("all", "dualpipe-late-all"))
    }
    if package is not None:
        found["deepseek"] = Entrant(lambda case: DeepSeek(case, package), "dualpipe", blocking=True)
    for name, kind, schedule in (
        ("torch 1f1b", "Schedule1F1B", "1f1b"),
        ("torch zbv", "ScheduleZBVZeroBubble", "zbv"),
        ("torch dualpipev", "ScheduleDualPipeV", "dualpipev"),
    ):
        found[name] = Entrant(lambda case, kind=kind: Torch(case, kind), schedule)
    return found
