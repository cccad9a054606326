"""One rank alone, in this process: how the interpreter uses the transport, and which programs it refuses.

The transport is the test's own: every receive gives ones, and every call is noted.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dualpipe.errors import RuleError, StageError
from dualpipe.pipeline import Feed, Pipeline
from dualpipe.runtime.executor import StepError
from dualpipe.runtime.transport import TensorSpec
from dualpipe.schedule import MESSAGES, RB, UP, B, Op, Schedule, Slot, W
from dualpipe.schedule.generate import generate
from tests.production.cases import Alone, rewrite

SPEC = TensorSpec((2, 4), torch.float32)


def step(schedule: Schedule, rank: int, stage: nn.Module, boundary=(SPEC,), **options) -> Alone:
    """Run one step of ``rank``, which holds one stage; returns its transport."""
    transport = Alone(rank, schedule.ranks)
    batches = {UP: [torch.randn(2, 4) for _ in range(schedule.microbatches[UP])]}
    pipeline = Pipeline(schedule, {(UP, rank): stage}, nn.functional.mse_loss, list(boundary), transport, **options)
    pipeline.step(Feed(batches, batches))
    return transport


@pytest.mark.parametrize("blocking", [False, True])
def test_every_message_of_a_slot_is_waited_for_where_slots_block_and_only_receives_otherwise(blocking):
    schedule = generate("1f1b", 2, 3)
    expected = [("agree", "")]
    for slot in schedule.programs[0]:
        if slot[0].kind in MESSAGES:
            expected += [("post", str(op)) for op in slot] + [("wait", str(op)) for op in slot] * blocking
        elif slot[0].kind is B:
            expected.append(("wait", str(slot[0]._replace(kind=RB))))
    expected.append(("drain", ""))
    assert step(schedule, 0, nn.Linear(4, 4), blocking=blocking).calls == expected


def test_an_input_that_a_stage_does_not_use_gets_zeros_and_is_named_once(caplog):
    class First(nn.Linear):
        def forward(self, x, unused):
            return super().forward(x)

    posted = step(generate("1f1b", 2, 3), 1, First(4, 4), [SPEC, SPEC]).messages
    sent = [message.tensors for message in posted if message.sends]
    assert len(sent) == 3
    assert all(used.any() and not unused.any() for used, unused in sent)
    assert [r.getMessage() for r in caplog.records if "does not use its inputs [1] at 1B0>" in r.getMessage()]
    assert sum("does not use its inputs" in r.getMessage() for r in caplog.records) == 1


def test_a_stage_that_writes_to_its_input_and_a_step_in_inference_mode_are_errors_with_the_way_out():
    class Doubling(nn.Linear):
        def forward(self, x):
            return super().forward(x.mul_(2))

    with pytest.raises(RuntimeError, match="leaf Variable") as error:
        step(generate("1f1b", 2, 3), 1, Doubling(4, 4))
    assert any("clone them" in note for note in error.value.__notes__)
    outside = r"training needs autograd: .*inference_mode\(\); call it outside"
    with pytest.raises(StageError, match=outside), torch.inference_mode():
        step(generate("1f1b", 2, 3), 1, nn.Linear(4, 4))


MODULES, DATA = {(UP, 0): nn.Linear(4, 4)}, {UP: [torch.ones(2, 4)]}
ARGUMENTS = {
    "no mapping of stages": ({"stages": [nn.Linear(4, 4)]}, "must be a mapping .*: got a list of Linear"),
    "a key that is no chunk": ({"stages": {UP: nn.Linear(4, 4)}}, "got the key"),
    "a stage that is no module": ({"stages": {(UP, 0): len}}, "the stage of 0> is builtin_function"),
    "a criterion by name": ({"criterion": "mse"}, "a criterion must be a function or a module: got str"),
    "one spec as boundary": ({"boundary": SPEC}, "a boundary must be a list .*: got a TensorSpec"),
    "shapes alone": ({"boundary": [(2, 4)]}, r"a boundary must be a list .*: got \(2, 4\)"),
    "a negative size": ({"boundary": [TensorSpec((-1, 4), torch.float32)]}, "got TensorSpec"),
    "a schedule of another size": ({"schedule": generate("1f1b", 2, 2)}, "the schedule has 2 and the process group 1"),
    "a dict as feed": ({"feed": DATA}, "a step takes a Feed: got dict"),
    "a list as inputs": ({"feed": Feed([torch.ones(2, 4)], DATA)}, "mapping from each lane .*: got a list of Tensor"),
    "a generator of inputs": ({"feed": Feed({UP: iter(())}, DATA)}, "lane > has tuple_iterator"),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_an_argument_of_another_type_is_refused_with_the_rule(what):
    given, text = ARGUMENTS[what]
    options = {"schedule": generate("1f1b", 1, 1), "stages": MODULES, "criterion": None, "boundary": [], **given}
    feed = options.pop("feed", Feed({}, {}))
    with pytest.raises(RuleError, match=text):
        Pipeline(**options, transport=Alone(0, 1)).step(feed)


def twice(slot: Slot) -> list[Slot]:
    return [slot, slot] if slot == (Op(W, UP, 0, 1),) else [slot]


def w_first(slot: Slot) -> list[Slot]:
    return [slot[1:], slot[:1]] if slot[-1].kind is W and len(slot) > 1 else [slot]


WRONG: dict[str, tuple[str, Callable[[Slot], list[Slot]], str]] = {
    "a W twice": ("zb1p", twice, "no weight gradient is deferred to 0W1>"),
    "a W before its B": ("1f1b", w_first, "no weight gradient is deferred to 0W0>: its B has not run"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_w_that_finds_nothing_to_do_is_refused(fault):
    name, change, text = WRONG[fault]
    with pytest.raises(StepError) as error:
        step(rewrite(generate(name, 1, 2), 0, change), 0, nn.Linear(4, 4))
    assert text in str(error.value)
