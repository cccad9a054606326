"""Collectives of a pipeline's ranks are ops of the file: their order, and whether gradients are reduced too early."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe import loads
from dualpipe.record.collectives import clashes
from dualpipe.record.events import read
from dualpipe.schedule.text import dumps
from dualpipe.testing import record_ranks
from proofs.against import compare
from proofs.prove import prove
from proofs.verdict import Refuted
from tests.record.two_ranks import SHAPE, text


def exchange(rank, tensor):
    other = torch.empty(SHAPE)
    ends = [lambda: dist.send(tensor, 1 - rank), lambda: dist.recv(other, 1 - rank)]
    for end in ends if rank == 0 else reversed(ends):
        end()
    return other


def two_lanes(order, late=False, asynchronous=False):
    """Two stages on two ranks, a lane each way; ``order`` gives for each rank the order in which it reduces them."""

    def body(rank):
        group = dist.new_group([0, 1])
        modules = {stage: nn.Linear(4, 4, bias=False) for stage in (rank, 1 - rank)}  # the stage of lane > first
        first, last = modules[0], modules[1]
        y = first(torch.randn(SHAPE))
        x = exchange(rank, y.detach()).requires_grad_()
        last(x).square().mean().backward()
        gradient = exchange(rank, x.grad)
        if not late:
            y.backward(gradient)
        else:
            first.weight.grad = torch.zeros(4, 4)
        works = [dist.all_reduce(modules[s].weight.grad, group=group, async_op=asynchronous) for s in order[rank]]
        for work in reversed(works) if asynchronous else ():
            work.wait()
        if late:
            y.backward(gradient)
        norm = sum(module.weight.grad.square().sum() for module in modules.values())
        dist.all_reduce(norm)

    return body


def proved(*arguments, **options):
    schedule = record_ranks(2, two_lanes(*arguments, **options)).schedule
    return schedule, prove(schedule, smt=False)


def test_reductions_in_one_order_are_proved_and_their_lines_are_in_the_file():
    schedule, report = proved({0: (0, 1), 1: (0, 1)})
    assert report.verdict == "proved"
    assert schedule.groups == ((0, 1), (0, 1))
    shown = dumps(schedule, observed=True)
    assert "0RG>@0 1RG<@0 0AR>@1" in shown
    assert loads(shown).observed == schedule.observed
    assert "test_collectives.py:" in next(
        place for placed, place in schedule.observed.lines.items() if placed.op.kind == "RG"
    )
    assert compare(schedule, schedule.only(frozenset({"F", "B", "W", "SF", "RF", "SB", "RB"}))).verdict == "same"


def test_waits_in_another_order_than_the_launches_are_no_fault():
    _, report = proved({0: (0, 1), 1: (0, 1)}, asynchronous=True)
    assert report.verdict == "proved"


def test_reductions_in_another_order_on_another_rank_are_refuted_with_their_lines():
    _, report = proved({0: (0, 1), 1: (1, 0)})
    assert report.verdict == "refuted"
    shown = report.text()
    assert "collective 1 of group 0 is the reduction of the gradients of stage 0 of lane > for rank 0" in shown
    assert "0RG>@0 in slot " in shown
    assert f"is at {__file__}:" in shown


def test_tied_weights_of_two_stages_are_summed_over_both_lanes():
    """Rank 0 passes the gradient of its last stage and rank 1 that of its first one, as in Megatron with DualPipe."""

    def body(rank):
        tied = nn.Parameter(torch.ones(4, 4).tril())
        modules = {stage: nn.Module() for stage in range(2)}
        for stage, name in enumerate(("embedding", "output")):
            modules[stage].register_parameter(name, nn.Parameter(tied.detach().clone()))
            modules[stage].forward = lambda x, stage=stage, name=name: x @ getattr(modules[stage], name)
        first, last = modules[0], modules[1]
        y = first(torch.randn(SHAPE))
        x = exchange(rank, y.detach()).requires_grad_()
        last(x).square().mean().backward()
        y.backward(exchange(rank, x.grad))
        dist.all_reduce(last.output.grad if rank == 0 else first.embedding.grad)

    recording = record_ranks(2, body)
    assert prove(recording.schedule, smt=False).verdict == "proved"
    assert text(recording, 0).endswith(" 0AR>@0")


@pytest.mark.long
def test_a_weight_gradient_after_its_reduction_is_refuted():
    _, report = proved({0: (0, 1), 1: (0, 1)}, late=True)
    shown = report.text()
    assert "joins the reduction of the gradients of stage 0 of lane > in group 0" in shown
    assert "but this needs the weight gradient of microbatch 0" in shown


def one_lane(rank_order):
    """GPipe of one microbatch on two ranks, and two functions that both ranks call, each in its own order."""

    def body(rank):
        stage, scale = nn.Linear(4, 4), torch.ones(3)
        if rank == 0:
            y = stage(torch.randn(SHAPE))
            dist.send(y.detach(), 1)
            gradient = torch.empty(SHAPE)
            dist.recv(gradient, 1)
            y.backward(gradient)
        else:
            x = torch.empty(SHAPE)
            dist.recv(x, 0)
            stage(x.requires_grad_()).sum().backward()
            dist.send(x.grad, 0)
        calls = {"reduce": lambda: dist.all_reduce(scale), "tied": lambda: dist.all_reduce(stage.weight.grad)}
        for name in rank_order[rank]:
            calls[name]()

    return body


def test_gradients_of_tied_weights_are_no_reduction_of_a_stage():
    schedule = record_ranks(2, one_lane({0: ["reduce", "tied"], 1: ["reduce", "tied"]})).schedule
    assert prove(schedule, smt=False).verdict == "proved"
    assert {op.kind for program in schedule.programs for slot in program for op in slot if op.kind in ("AR", "RG")} == {
        "AR"
    }


def test_members_that_call_other_functions_do_not_meet_and_those_with_other_shapes_do():
    def body(rank):
        one_lane({0: ["reduce"], 1: ["reduce"]})(rank)
        dist.all_reduce(torch.zeros(() if rank == 0 else (1, 1)))  # both of one element
        dist.barrier() if rank == 0 else dist.all_reduce(torch.zeros(1))

    recording = record_ranks(2, body, check=False, stall=2.0)
    proof = prove(recording.schedule, smt=False)
    assert isinstance(proof.checks["messages"].verdict, Refuted)
    (note,) = (note for note in recording.notes if "disagree on their collective" in note)
    assert "disagree on their collective 3" in note
    assert "rank 0 calls barrier at " in note
    assert "rank 1 calls all_reduce on float32[1] at " in note
    assert text(recording, 0).endswith("0AR>@0 0AR>@0 0AR>@0")
    assert "the calls differ in their function, or in the type" in proof.text()


@pytest.mark.parametrize("same", [True, False])
def test_members_that_scatter_the_same_gradients_agree_though_each_gets_another_part(same):
    """The output of a reduce-scatter is a part of its input, on each rank another one."""

    def member(rank, *names):
        holds = {"form": [], "modules": [0], "names": list(names), "marks": [], "context": [], "at": f"{rank}.py:1"}
        called = {"event": "collective", "collective": 0, "name": "reduce_scatter_tensor", "group_name": "1"}
        return read(rank, [called | {"group": [0, 1]} | holds])

    logs = [member(0, "a", "b"), member(1, "b", "a" if same else "c")]
    assert len(clashes(logs, [(0,), (1,)])) == (0 if same else 2)
