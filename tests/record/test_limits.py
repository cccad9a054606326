"""Ops are named by the origin of their tensors; an op that cannot be named is an error with the line of the program."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from dualpipe.record import RecordError
from dualpipe.testing.pytest_plugin import record_ranks
from tests.record.two_ranks import SHAPE, assert_plain, receive, train

__all__ = ["record_ranks"]  # the fixture, as a conftest gets it with pytest_plugins


def test_a_stage_of_one_module(record_ranks):
    assert_plain(record_ranks(2, lambda rank: train(rank, nn.Linear(4, 4))))


def test_a_stage_of_several_modules_and_functions_between_them(record_ranks):
    def body(rank):
        first, second, position = nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(2, 4)

        def stage(x):
            where = position(torch.arange(2))
            return second(torch.relu(first(x) + where)) * 2

        train(rank, stage)

    assert_plain(record_ranks(2, body))


def test_a_stage_whose_output_is_freed_once_it_is_sent(record_ranks):
    def body(rank):
        stage = nn.Linear(4, 4)
        for _ in range(2):
            if rank == 0:
                y = stage(torch.randn(SHAPE))
                dist.send(y, 1)
                y.data = torch.empty(1)
                gradient = receive(1)
                torch.autograd.Variable._execution_engine.run_backward(
                    (y,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
            else:
                x = receive(0).requires_grad_()
                stage(x).square().sum().backward()
                dist.send(x.grad, 0)

    assert_plain(record_ranks(2, body))


def test_a_stage_that_recomputes_its_forward(record_ranks):
    def body(rank):
        class Stage(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

            def forward(self, x):
                return checkpoint(self.layer, x, use_reentrant=False)

        train(rank, Stage())

    assert_plain(record_ranks(2, body))


def test_messages_of_two_tensors_are_one_message_of_the_schedule(record_ranks):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, y):
            return self.layer(x), self.layer(y)

    def both(op, tensors, peer):
        for work in dist.batch_isend_irecv([dist.P2POp(op, t, peer) for t in tensors]):
            work.wait()
        return tensors

    def body(rank):
        stage = Pair()
        for _ in range(2):
            if rank == 0:
                outputs = stage(torch.randn(SHAPE), torch.randn(SHAPE))
                both(dist.isend, [y.detach() for y in outputs], 1)
                torch.autograd.backward(outputs, both(dist.irecv, [torch.empty(SHAPE) for _ in range(2)], 1))
            else:
                inputs = [x.requires_grad_() for x in both(dist.irecv, [torch.empty(SHAPE) for _ in range(2)], 0)]
                sum(y.sum() for y in stage(*inputs)).backward()
                both(dist.isend, [x.grad for x in inputs], 0)

    assert_plain(record_ranks(2, body))


def test_a_module_whose_attributes_hide_methods_of_its_base_class(record_ranks):
    """As Megatron's ``DistributedDataParallel``, whose ``buffers`` is a list."""

    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.buffers, self.parameters, self.modules = [], [], []

        def forward(self, x):
            return self.layer(x)

    assert_plain(record_ranks(2, lambda rank: train(rank, Hiding())))


def test_metrics_and_clipping_afterwards_change_nothing(record_ranks):
    def body(rank):
        stage = nn.Linear(4, 4)
        train(rank, stage)
        norm = nn.utils.clip_grad_norm_(stage.parameters(), 0.1)
        stage.weight.grad.mul_(norm)
        torch.optim.SGD(stage.parameters(), lr=0.1).step()
        dist.all_reduce(norm)

    assert_plain(record_ranks(2, body))


def test_a_module_that_runs_the_pipeline_has_to_be_named(record_ranks):
    class Engine(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = nn.Linear(4, 4)

        def forward(self, rank):
            train(int(rank), self.stage)

    def body(rank):
        Engine()(torch.tensor(rank))

    with pytest.raises(RecordError, match=r"inside .*Engine at .*two_ranks.py:\d+ .*; .* add --container .*Engine"):
        record_ranks(2, body, check=False)
    name = Engine.__qualname__
    assert_plain(record_ranks(2, body, containers=[name]))


def test_a_stage_that_is_not_a_module_is_an_error(record_ranks):
    def body(rank):
        weight = torch.randn(4, 4, requires_grad=True)
        train(rank, (lambda x: x @ weight) if rank == 0 else nn.Linear(4, 4))

    with pytest.raises(
        RecordError, match=r"from what rank 0 sends at .*two_ranks.py:\d+ .*, which is the output of no module call"
    ):
        record_ranks(2, body)


def test_a_program_without_a_pipeline_is_an_error(record_ranks):
    with pytest.raises(RecordError, match="no message has the output of a module call"):
        record_ranks(2, lambda rank: nn.Linear(4, 4)(torch.randn(SHAPE)).sum().backward())


def test_a_message_with_tensors_of_two_microbatches_is_an_error(record_ranks):
    def body(rank):
        stage = nn.Linear(4, 4)
        if rank == 0:
            first = stage(torch.randn(1, 4))
            dist.barrier()
            dist.send(torch.zeros(1), 1)
            second = stage(torch.randn(1, 4))
            dist.send(torch.cat([first, second]), 1)
        else:
            dist.barrier()
            dist.recv(torch.zeros(1), 0)
            stage(receive(0))

    with pytest.raises(RecordError, match=r"rank 0 sends a mixture of 2 at .*test_limits.py:\d+"):
        record_ranks(2, body)


def test_more_than_two_places_where_data_enters_one_pipeline_are_an_error(record_ranks):
    def body(rank):
        stage = nn.Linear(4, 4)
        pair, place = divmod(rank, 2)
        other = 2 * pair + 1 - place
        for _ in range(2):
            if place == 0:
                dist.send(stage(torch.randn(SHAPE)).detach(), other)
            else:
                stage(receive(other))

    with pytest.raises(RecordError, match="data enters at 3 places"):
        record_ranks(6, body, pipeline_ranks=range(6))


def test_a_stage_that_takes_the_outputs_of_two_stages_is_an_error_and_no_message_to_a_wrong_rank(record_ranks):
    def body(rank):
        stage = nn.Linear(4, 4)
        for _ in range(2):
            x = receive(rank - 1) if rank else torch.randn(SHAPE)
            y = stage(x + receive(0) if rank == 2 else x).detach()
            for peer in {0: (1, 2), 1: (2,), 2: ()}[rank]:
                dist.send(y, peer)

    with pytest.raises(RecordError, match="a stage takes the output of one stage"):
        record_ranks(3, body)


def test_an_error_on_a_rank_is_raised_with_its_traceback(record_ranks):
    def body(rank):
        raise LookupError(f"of rank {rank}")

    with pytest.raises(RuntimeError, match="LookupError: of rank"):
        record_ranks(2, body)
