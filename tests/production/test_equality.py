"""Real processes give the bits of plain PyTorch."""

import time
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from dualpipe.pipeline import Feed, Pipeline
from dualpipe.runtime.process_group import ProcessGroupTransport
from dualpipe.runtime.transport import TensorSpec
from dualpipe.schedule import UP
from dualpipe.schedule.generate import generate
from dualpipe.testing.launch import launch
from reference.case import DTYPES
from reference.model import ModelConfig
from reference.verify import verify
from tests.production.cases import TINY, processes, tiny

SIZES = [("dualpipe", 4, 8), ("dualpipev", 2, 5), ("1f1b", 3, 4), ("zb1p", 3, 4), ("dualpipe-late-tail", 4, 8)]
LONG = [("dualpipe", 2, 4), ("dualpipev-late-tail", 2, 5), ("dualpipe-late-all", 2, 4)]


BLOCKING = [("dualpipe-late-all", 4, 8), ("zb1p", 3, 4)]


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "blocking"),
    [
        *((*size, False) for size in SIZES),
        *((*size, True) for size in BLOCKING),
        *(pytest.param(*size, False, marks=pytest.mark.long) for size in LONG),
    ],
)
def test_every_loss_gradient_and_weight_is_that_of_plain_pytorch(name, ranks, microbatches, blocking):
    report = verify(tiny(name, ranks, microbatches, blocking=blocking))
    assert report.equal, [*report.complaints, *(str(d) for p in report.comparisons for d in p.differences)]
    assert report.tensors > 100


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_in_every_number_format(dtype):
    config = ModelConfig(hidden=16, heads=2, sequence=8, batch=1, dtype=DTYPES[dtype])
    assert verify(replace(tiny(), model=config)).equal


def test_the_loss_falls():
    losses = verify(replace(tiny(), model=ModelConfig(), steps=4)).losses
    assert losses[-1] < losses[0] - 1


class Odd(nn.Module):
    """A stage whose output is a view that starts in the middle of a larger tensor, and is not contiguous."""

    def __init__(self, inner: nn.Module, last: bool) -> None:
        super().__init__()
        self.inner, self.last = inner, last

    def forward(self, x):
        y = self.inner(x)
        return y if self.last else torch.cat([y, y, y], dim=-1)[..., y.shape[-1] : 2 * y.shape[-1]]


def test_a_stage_may_return_a_view():
    class Viewing(type(tiny())):
        def stage(self, stage):
            return Odd(super().stage(stage), stage == self.schedule.stages - 1)

    case = tiny(ranks=4, microbatches=8)
    viewing = Viewing(case.schedule, case.model, case.steps, timeout=case.timeout)
    report = verify(viewing)
    assert report.equal, str(processes(report).differences[:1] or processes(report).failures)


def test_a_view_that_was_sent_is_freed_with_its_base():
    """Stage 0 returns part of a large tensor, which is freed by the time its gradient arrives."""
    bases = []

    class Slice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            large = self.linear(x)
            bases.append(StorageWeakRef(large.untyped_storage()))
            return large[:3]  # contiguous, so what is sent is the large tensor's own memory

    def freed(base) -> bool:
        for _ in range(200):  # the helper thread that completed the send may need a moment
            if base.expired():
                return True
            time.sleep(0.01)
        return False

    def body(context):
        found = []

        class Watching(ProcessGroupTransport):
            def wait(self, message):
                received = super().wait(message)
                if message.label.startswith("0RB"):
                    found.append(freed(bases[len(found)]))
                return received

        held = {(UP, context.rank): Slice() if context.rank == 0 else nn.Linear(8, 8)}
        boundary = [TensorSpec((3, 8), torch.float32)]
        pipeline = Pipeline(generate("1f1b", 2, 6), held, lambda y: y.sum(), boundary, Watching(timeout=10.0))
        pipeline.step(Feed({UP: [(torch.ones(30, 8),)] * 6}, {UP: [()] * 6}))
        return found

    assert launch(2, body, timeout=40).values()[0] == [True] * 6


def test_evaluation_gives_the_losses_and_leaves_no_gradient():
    def body(context):
        case = tiny(ranks=2, microbatches=4)
        schedule = case.schedule
        held = {
            (lane, s): case.stage(s)
            for lane, route in schedule.routes.items()
            for s, r in enumerate(route)
            if r == context.rank
        }
        transport = ProcessGroupTransport(timeout=10.0)
        pipeline = Pipeline(schedule, held, case.criterion, [TensorSpec((1, 8, 16), torch.float32)], transport)
        lanes = dict(zip(case.lanes, case.data()[0], strict=True))
        feed = Feed(
            {lane: [(batch.tokens,) for batch in lanes[lane]] for lane in lanes},
            {lane: [(batch.targets,) for batch in lanes[lane]] for lane in lanes},
        )
        evaluated = pipeline.step(feed, forward_only=True, keep_outputs=True)
        untouched = all(p.grad is None for module in held.values() for p in module.parameters())
        trained = pipeline.step(feed)
        return untouched, evaluated.losses, trained.losses, evaluated.outputs

    for untouched, evaluated, trained, outputs in launch(2, body, timeout=40).values():
        assert untouched
        assert {lane: list(found) for lane, found in evaluated.items()} == {lane: [0, 1] for lane in evaluated}
        for lane, losses in evaluated.items():
            assert all(torch.equal(loss, trained[lane][mb]) for mb, loss in losses.items())
            assert outputs[lane][0][0].shape == (1, TINY.sequence, TINY.vocab)
