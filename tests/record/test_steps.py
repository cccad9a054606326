"""One of several training steps is written, the same one on every rank."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.data import DataLoader, Dataset

from dualpipe.record import RecordError
from dualpipe.testing import record, record_ranks
from dualpipe.testing.launch import launch
from tests.record.two_ranks import PLAIN, SHAPE, assert_plain, receive, text, train


def steps(rank: int, optimizers: int = 1, count: int = 3) -> None:
    """Training steps of two microbatches, with any number of optimizers on a rank."""
    stage = nn.Linear(4, 4)
    parts = list(stage.parameters())[:optimizers]
    made = [torch.optim.SGD([part], lr=0.1) for part in parts]
    for _ in range(count):
        train(rank, stage)
        for optimizer in made:
            optimizer.step()


@pytest.mark.parametrize("step", [1, 3])
def test_ranks_with_one_and_with_two_optimizers_have_the_same_steps(step):
    recording = record_ranks(2, lambda rank: steps(rank, 1 + rank), step=step)
    assert_plain(recording)
    assert recording.steps == 3
    assert recording.notes == (f"step {step} of 3",)


def test_a_rank_without_an_optimizer_is_an_error():
    with pytest.raises(RecordError, match="rank 1 computed in 1 steps and rank 0 in 3"):
        record_ranks(2, lambda rank: steps(rank, 1 - rank))


def test_one_step_needs_no_optimizer():
    assert_plain(record_ranks(2, lambda rank: steps(rank, 1 - rank, count=1)))


def test_a_collective_after_the_optimizers_step_of_some_ranks_comes_after_their_ops():
    def body(rank):
        steps(rank, 1 - rank, count=1)
        dist.barrier()

    recording = record_ranks(2, body)
    assert [text(recording, rank) for rank in range(2)] == [f"{PLAIN[0]} 0AR>@0", f"{PLAIN[1]} 1AR>@0"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_message_from_one_step_to_the_next_is_an_error(step):
    def body(rank):
        stage = nn.Linear(4, 4)
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        early = torch.empty(SHAPE)
        work = dist.irecv(early, 0) if rank else None
        for number in range(2):
            if rank == 0:
                y = stage(torch.randn(SHAPE))
                dist.send(y.detach(), 1)
                gradient = torch.empty(SHAPE)
                dist.recv(gradient, 1)
                y.backward(gradient)
            else:
                work.wait()
                x = early.clone().requires_grad_()
                stage(x).sum().backward()
                dist.send(x.grad, 0)
                if number == 0:
                    work = dist.irecv(early, 0)
            optimizer.step()

    with pytest.raises(RecordError, match=r"rank . \w+ at .* after . optimizer steps, and rank . \w+ at .* after"):
        record_ranks(2, body, step=step)


def test_an_evaluation_after_a_step_and_a_late_reset_of_gradients_belong_to_no_step():
    """The evaluation uses averaged weights for a while, and the gradients are reset between forward and backward."""

    def body(rank):
        torch.manual_seed(rank)
        stage = nn.Linear(4, 4)
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        averaged = {name: weight.clone() for name, weight in stage.state_dict().items()}
        for _ in range(2):
            x = receive(0).requires_grad_() if rank else torch.randn(SHAPE)
            y = stage(x)
            if rank == 0:
                dist.send(y.detach(), 1)
            optimizer.zero_grad()
            if rank == 0:
                y.backward(receive(1))
            else:
                y.square().sum().backward()
                dist.send(x.grad, 0)
            optimizer.step()
            trained = {name: weight.clone() for name, weight in stage.state_dict().items()}
            stage.load_state_dict(averaged)
            with torch.no_grad():
                dist.send(stage(torch.randn(SHAPE)), 1) if rank == 0 else stage(receive(0))
            stage.load_state_dict(trained)

    recording = record_ranks(2, body, compare=True, step=2)
    assert recording.steps == 2
    assert recording.comparison.verdict == "equal", recording.comparison.text()


def test_record_counts_steps_and_leaves_no_hook_behind():
    def body(context) -> tuple[list[str], int, int]:
        with record() as recording:
            steps(context.rank)
        gathered = recording.gather(step=2)
        return [text(gathered, rank) for rank in range(2)], gathered.steps, len(_global_optimizer_post_hooks)

    assert launch(2, body, timeout=60).values() == [(list(PLAIN), 3, 0)] * 2


class Rows(Dataset):
    """Data prepared by a module in a process that the data loader forks."""

    def __init__(self):
        self.prepare = nn.Linear(4, 4)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.prepare(torch.ones(4)).detach()


def test_what_a_forked_child_of_a_rank_does_is_not_recorded():
    def body(rank):
        stage = nn.Linear(4, 4)
        batches = list(DataLoader(Rows(), num_workers=1, multiprocessing_context="fork"))
        child = os.fork()
        if child == 0:
            nn.Linear(4, 4)(batches[0]).sum().backward()
            os._exit(0)
        os.waitpid(child, 0)
        train(rank, stage)

    assert_plain(record_ranks(2, body))
