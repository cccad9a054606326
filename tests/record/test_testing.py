"""``dualpipe.testing``: recordings made inside the ranks, and recordings of our own runtime."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import P2POp, batch_isend_irecv, irecv, isend

from dualpipe.schedule import show_slot
from dualpipe.schedule.generate import dualpipe
from dualpipe.schedule.text import dumps
from dualpipe.testing import record
from dualpipe.testing.launch import launch
from proofs.prove import prove
from tests.record.run import forked
from tests.record.two_ranks import PLAIN, SHAPE, text, train


def test_record_covers_the_with_block_and_gather_returns_it_on_every_rank():
    def body(context) -> list[str]:
        stage = nn.Linear(4, 4)
        train(context.rank, stage)
        with record() as recording:
            train(context.rank, stage)
        train(context.rank, stage)
        gathered = recording.gather(lanes=["0 1"])
        assert gathered.schedule == recording.gather().schedule
        return [" ".join(map(show_slot, program)) for program in gathered.schedule.programs]

    assert launch(2, body, timeout=60).values() == [list(PLAIN)] * 2


def test_torch_is_restored_afterwards():
    def state() -> list[object]:
        engine = torch.autograd.Variable._execution_engine
        messages = [call.__code__ for call in (dist.isend, dist.irecv, dist.batch_isend_irecv)]
        return [nn.Module.__call__, torch.Tensor.grad, engine, *messages]

    before = state()
    with record():
        assert all(now is not then for now, then in zip(state(), before, strict=True))
        with pytest.raises(RuntimeError, match="one recording at a time"), record():
            pass
    assert all(now is then for now, then in zip(state(), before, strict=True))
    assert "__init_subclass__" not in vars(nn.Module)
    assert not [name for name in vars(dist.distributed_c10d) if "record" in name and "isend" in name]


def test_functions_bound_before_the_recording_are_watched_and_work_afterwards():
    def exchange(ops, tensors):
        for op, tensor in zip(ops, tensors, strict=True):
            op.tensor = tensor
        for work in batch_isend_irecv(ops):
            work.wait()

    def body(context) -> list[str]:
        rank, stage = context.rank, nn.Linear(4, 4)
        before = P2POp(isend, torch.empty(SHAPE), 1 - rank)

        def send(tensor, peer):
            exchange([before], [tensor])

        with record() as recording:
            train(rank, stage, microbatches=1, send=send)
            within = P2POp(irecv if rank else isend, torch.empty(SHAPE), 1 - rank)
            train(rank, stage, microbatches=1, send=lambda tensor, peer: isend(tensor, peer).wait())
        exchange([within], [torch.ones(SHAPE)])
        return [text(recording.gather(), rank) for rank in range(2)]

    assert launch(2, body, timeout=60).values() == [list(PLAIN)] * 2


def test_our_own_runtime_runs_the_schedule_with_its_pairs_overlapped_by_the_modules():
    recorded = forked(4, "deepseek.py", 4, 8).schedule
    bare = [" ".join(show_slot(tuple(op.bare for op in slot)) for slot in program) for program in recorded.programs]
    assert bare == [" ".join(map(show_slot, program)) for program in dualpipe(4, 8).programs]
    assert dumps(recorded).count("@") == dumps(recorded).count("S") + dumps(recorded).count("R")


def test_an_activation_and_a_gradient_sent_in_the_wrong_order_are_refuted():
    def swapped(ops):
        """Exchange two sends to rank 2 in the first batch of rank 1 that has them."""
        sends = [n for n, op in enumerate(ops) if op.op is dist.isend and op.peer == 2]
        if dist.get_rank() == 1 and len(sends) > 1 and not done:
            done.append(True)
            one, other = sends[:2]
            ops[one], ops[other] = ops[other], ops[one]
        return watched(ops)

    done: list[bool] = []
    watched = None

    def change() -> None:
        nonlocal watched
        watched = dist.batch_isend_irecv
        dist.batch_isend_irecv = swapped

    recording = forked(4, "deepseek.py", 4, 8, before=change)
    report = prove(recording.schedule).as_json()["checks"]
    assert report["messages"]["verdict"] == "refuted"
    assert "rank 2" in report["messages"]["story"]
    assert "does not take the activation of stage" in " ".join(recording.notes)
