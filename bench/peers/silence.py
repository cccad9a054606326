"""One rank alone, whose messages go nowhere and arrive at once: what is left is the host time of an executor.

``Floor`` is below that: autograd alone, which every executor needs.
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dualpipe.pipeline import ProcessGroupTransport
from dualpipe.runtime.helper_thread import HelperThread
from peers.executors import Case


@contextmanager
def silent_group(rank: int, ranks: int):
    """A default group of the backend ``fake``, which completes every message without sending it."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class SilentTransport(ProcessGroupTransport):
    """Our transport on such a group: nothing is announced, and there is nobody to compare set-ups with."""

    def _agree(self, record):
        if self._peers is None:
            self._use(SilentPeers(self._parent))


class SilentPeers:
    failure, tag = None, 0

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.data, self.edges, self.helpers = group, {}, []

    def begin(self, phase: str) -> None:
        pass

    def helper(self, name: str) -> HelperThread:
        self.helpers.append(HelperThread(name))
        return self.helpers[-1]

    def close(self) -> None:
        for helper in self.helpers:
            helper.close()


class NoTransport:
    """A transport that does nothing; every receive gives the same tensors."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.arrived: dict[object, list[torch.Tensor]] = {}

    def post(self, messages) -> None:
        pass

    def wait(self, message):
        if message.sends:
            return ()
        specs = tuple(message.specs)
        if specs not in self.arrived:
            self.arrived[specs] = [torch.zeros(spec.shape, dtype=spec.dtype) for spec in specs]
        return self.arrived[specs]

    def drain(self) -> None:
        pass

    def agree(self, record) -> None:
        pass

    def phase(self, kind: str):
        return nullcontext()

    def close(self) -> None:
        pass


class Floor:
    """The F and B of a rank's two stages by autograd, one microbatch after the other; no schedule, message or check."""

    def __init__(self, case: Case) -> None:
        rank = dist.get_rank()
        self.case, self.last = case, case.ranks - 1
        self.numbers = (rank, self.last - rank)
        self.modules = [case.stage(number, case.ranks, None) for number in self.numbers]
        self.inputs, self.labels = (whole.split(case.shape[0]) for whole in case.data())
        self.boundary = torch.zeros(case.shape)

    def step(self):
        for number, module in zip(self.numbers, self.modules, strict=True):
            for mb in range(self.case.microbatches // 2):
                output = module(self.boundary.detach().requires_grad_() if number else self.inputs[mb])
                if number == self.last:
                    self.case.criterion(output, self.labels[mb]).backward()
                else:
                    output.backward(self.boundary)
        return {}

    def close(self) -> None:
        pass
