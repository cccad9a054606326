"""The F&B pairs of a schedule as one unit of work: ``overlapped_forward_backward`` of the stages' class.

One rank alone, in this process: every receive gives ones.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from dualpipe.errors import StageError
from dualpipe.pipeline import Feed, Pipeline
from dualpipe.runtime.executor import StepError
from dualpipe.runtime.overlap import NAMES
from dualpipe.runtime.program import Pair, compile_program
from dualpipe.runtime.transport import MessageError, TensorSpec
from dualpipe.schedule import DOWN, RB, UP, B, F, Op, Schedule, W, overlapped_pairs
from dualpipe.schedule.generate import generate
from dualpipe.schedule.text import dumps
from reference.verify import verify
from tests.production.cases import Alone, tiny

SCHEDULE = generate("dualpipe", 2, 8)
LATE = generate("dualpipe-late-all", 2, 8)


class Stage(nn.Linear):
    """``calls`` are what the method was given."""

    calls: list[tuple]

    def __init__(self, number: int) -> None:
        super().__init__(4, 4)
        torch.manual_seed(number)
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)


def overlapped(cls, module0, inputs0, criterion0, labels0, module1, loss1, outputs1, output_grads1):
    cls.calls.append((module0, inputs0, criterion0, labels0, module1, loss1, outputs1, output_grads1))
    outputs0 = [module0(*inputs0)]
    loss0 = None if criterion0 is None else criterion0(*outputs0, *labels0)
    if loss1 is not None:
        loss1.backward()
        loss1.detach_()
    else:
        torch.autograd.backward(outputs1, output_grads1)
    return outputs0, loss0


def stage_class(method=overlapped, name: str = NAMES[0]) -> type[Stage]:
    return type("Overlapped", (Stage,), {name: classmethod(method), "calls": []})


def step(schedule: Schedule, kind: type[Stage], transport: Alone | None = None, rank: int = 0, **options):
    """One step of a rank; returns its losses, gradients and transport."""
    transport = transport or Alone(rank, 2)
    stages = {(UP, rank): kind(rank), (DOWN, 1 - rank): kind(1 - rank)}
    generator = torch.Generator().manual_seed(3)
    data = {lane: [torch.randn(2, 4, generator=generator) for _ in range(4)] for lane in (UP, DOWN)}
    spec = TensorSpec((2, 4), torch.float32)
    pipeline = Pipeline(schedule, stages, functional.mse_loss, [spec], transport, **options)
    result = pipeline.step(Feed(data, data), reduce_gradients=False)
    gradients = [p.grad for module in stages.values() for p in module.parameters()]
    return [*result.losses.get(DOWN, {}).values()], gradients, transport


def pairs_of(schedule: Schedule, rank: int) -> list[tuple[Op, Op]]:
    return [pair for slot in schedule.programs[rank] for pair in overlapped_pairs(slot)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", [SCHEDULE, LATE], ids=["full", "late W"])
def test_the_method_gets_every_pair_and_the_gradients_are_those_of_f_then_b(schedule, name):
    kind = stage_class(name=name)
    losses, gradients, _ = step(schedule, kind)
    plain_losses, plain_gradients, _ = step(schedule, kind, overlap=False)
    assert all(map(torch.equal, [*losses, *gradients], [*plain_losses, *plain_gradients]))
    pairs = pairs_of(schedule, 0)
    assert len(kind.calls) == len(pairs) > 1
    for (f, b), call in zip(pairs, kind.calls, strict=True):
        module0, inputs0, criterion0, labels0, module1, loss1, outputs1, output_grads1 = call
        assert module0 is not module1
        assert len(inputs0) == 1
        assert (criterion0 is not None) == (len(labels0) == 1) == (f.lane is DOWN)
        assert (loss1 is not None) == (b.lane is DOWN)
        assert len(outputs1) == len(output_grads1) == (b.lane is UP)


def test_modules_of_two_types_and_classes_without_the_method_run_f_then_b():
    kinds = iter([stage_class(), stage_class()])
    one = stage_class()
    step(SCHEDULE, lambda number: next(kinds)(number))
    step(SCHEDULE, type("Plain", (Stage,), {}))
    assert not one.calls


def test_both_receives_of_a_pair_are_waited_for_before_the_method_runs():
    transport = Alone(1, 2)

    def method(cls, *arguments):
        transport.calls.append(("pair", ""))
        return overlapped(cls, *arguments)

    step(SCHEDULE, stage_class(method), transport, rank=1)
    waits = [label for call, label in transport.calls if call in ("wait", "pair")]
    f, b = pairs_of(SCHEDULE, 1)[0]
    needs = [str(need) for op in (f, b) for need in SCHEDULE.needs(op) if need.kind in ("RF", "RB")]
    before = waits[: waits.index("")]
    assert needs
    assert before[-len(needs) :] == needs


def test_an_observer_sees_the_two_ops_of_a_pair_at_the_same_time():
    seen = []
    step(SCHEDULE, stage_class(), observe=lambda slot, op, began, ended: seen.append((op, began, ended)))
    times = {op: (began, ended) for op, began, ended in seen}
    assert [op for op, *_ in seen] == [op for slot in SCHEDULE.programs[0] for op in slot]
    assert all(times[f] == times[b] for f, b in pairs_of(SCHEDULE, 0))


def no_backward(cls, module0, inputs0, criterion0, labels0, *rest):
    outputs0 = [module0(*inputs0)]
    return outputs0, None if criterion0 is None else criterion0(*outputs0, *labels0)


def outputs_alone(cls, *arguments):
    return overlapped(cls, *arguments)[0]


def no_loss(cls, *arguments):
    return overlapped(cls, *arguments)[0], None


def raises(cls, *arguments):
    raise KeyError("theirs")


WRONG = {
    "no backward": (no_backward, StageError, "ran no backward from "),
    "one value": (outputs_alone, StageError, "must return its outputs and loss"),
    "no loss": (no_loss, StageError, "criterion must return a scalar"),
    "an error": (raises, KeyError, "theirs"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_method_that_breaks_the_contract_ends_the_step_with_the_reason_and_the_pair(fault):
    method, kind, text = WRONG[fault]
    with pytest.raises(kind, match=text) as error:
        step(SCHEDULE, stage_class(method))
    (note,) = error.value.__notes__
    assert any(f" at {f} beside {b}" in note for f, b in pairs_of(SCHEDULE, 0))


def test_a_message_that_does_not_arrive_names_the_op_of_the_pair_that_needs_it():
    b, lost = next((b, need) for _, b in pairs_of(SCHEDULE, 0) for need in SCHEDULE.needs(b) if need.kind is RB)

    class Losing(Alone):
        def wait(self, message):
            if message.label == str(lost):
                raise MessageError(message, 1.0, None)
            return super().wait(message)

    with pytest.raises(StepError, match=rf"at {b}: receive {lost} .* timed out") as error:
        step(SCHEDULE, stage_class(), Losing(0, 2))
    assert error.value.op == b


@pytest.mark.parametrize("name", ["dualpipe-late-tail", "dualpipev"])
def test_a_compiled_program_with_pairs_printed_back_is_the_same_file(name):
    schedule = generate(name, 4, 8)
    chunks = {op.chunk for slot in schedule.programs[1] for op in slot if op.kind is F}
    overlaps = frozenset((a, b) for a in chunks for b in chunks if a != b)
    program = compile_program(schedule, 1, overlaps=overlaps)
    slots = [*schedule.programs]
    slots[1] = program.slots
    assert dumps(Schedule(schedule.routes, slots, schedule.name)) == dumps(schedule)
    found = [step.ops for step in program.steps if isinstance(step, Pair)]
    assert found == pairs_of(schedule, 1)
    assert not any(isinstance(step, Pair) for step in compile_program(schedule, 1, True, overlaps).steps)


def test_a_pair_is_an_f_directly_before_a_b_of_another_chunk():
    f, b, w = Op(F, UP, 0, 3), Op(B, DOWN, 1, 1), Op(W, DOWN, 1, 1)
    assert overlapped_pairs((f, b, w)) == ((f, b),)
    assert overlapped_pairs((b, f)) == ()
    assert overlapped_pairs((f, f._replace(kind=B))) == ()
    assert overlapped_pairs((f, w, b)) == ()


@pytest.mark.parametrize("name", ["dualpipe-late-all", pytest.param("dualpipev", marks=pytest.mark.long)])
def test_processes_whose_b_runs_within_f_give_the_bits_of_plain_pytorch(name):
    report = verify(tiny(name, overlap=True))
    assert report.equal, report.complaints
    assert report.as_json()["overlap"] is True


def test_a_verification_of_overlaps_needs_a_schedule_with_pairs():
    with pytest.raises(ValueError, match=r"1f1b has none; use dualpipe"):
        tiny("1f1b", overlap=True)
