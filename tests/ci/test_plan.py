"""The plan of checks: every changed schedule is proved, and of each name one is trained with."""

import json

import pytest

from ci.change import ScheduleChange
from ci.checks.check import Check
from ci.evaluation import run_all
from ci.golden import Expansion
from ci.location import NOWHERE, Locator
from ci.plan import Options, Plan
from ci.process import Completed, python
from ci.result import CheckResult, Finding, Verdict
from ci.selector import Selection
from tests.ci.conftest import ROOT


def text(ranks: int, length: int = 0) -> str:
    return "".join(f"rank {rank}: 0F0>\n" for rank in range(ranks)) + "#" * length


SHOWN = {"a-P2-M4": text(2), "a-P4-M8": text(4), "a-P6-M14": text(6), "b-P2-M4": text(2), "b-P8-M20": text(8)}
DIGESTED = {"a-P1-M1": text(1), "a-P16-M64": text(16, 30_000), "a-lowered-P2-M4": text(2), "b-P10-M24": text(10)}
NOW = Expansion(SHOWN, DIGESTED)


@pytest.fixture
def asked(tmp_path):
    """The checks that are asked for where these schedules changed, by name."""

    def of(*names: str):
        changes = [ScheduleChange(name, "before", NOW.texts[name]) for name in names]
        plan = Plan(None, "", NOW, changes, Selection(), Locator({}, {}, frozenset(), NOWHERE), Options(), tmp_path)
        return {check.name: check for check in plan.checks()}

    return of


def files(check) -> list[str]:
    return [word.rpartition("/")[2].removesuffix(".txt") for word in check.command if word.endswith(".txt")]


def test_every_changed_schedule_is_proved_and_large_ones_apart(asked):
    found = asked("a-P2-M4", "a-P6-M14", "a-P16-M64")
    assert files(found["prove"]) == ["a-P2-M4", "a-P6-M14"]
    assert files(found["prove, large"]) == ["a-P16-M64"]
    assert found["prove, large"].why == "1 of 3 changed schedules are large"


def test_a_change_of_large_ones_alone_is_proved_too(asked):
    assert list(asked("a-P16-M64")) == ["prove, large"]


@pytest.mark.parametrize(
    ("changed", "tried"),
    [
        (["a-P1-M1", "a-P2-M4", "a-P4-M8", "a-P6-M14", "a-P16-M64"], ["a-P2-M4", "a-P4-M8"]),
        (["a-P6-M14", "a-P16-M64"], ["a-P6-M14"]),
        (["a-P1-M1", "a-P6-M14"], ["a-P6-M14"]),
        (["a-P1-M1"], ["a-P1-M1"]),
        (["a-lowered-P2-M4"], ["a-lowered-P2-M4"]),
        (["a-P2-M4", "b-P8-M20", "b-P10-M24"], ["a-P2-M4", "b-P8-M20"]),
    ],
)
def test_of_every_changed_name_one_schedule_is_trained_with(asked, changed, tried):
    assert files(asked(*changed)["trial"]) == tried


def test_schedules_too_large_to_train_with_are_named(asked):
    alone = asked("b-P10-M24")
    assert "trial" not in alone
    proved = Completed(0, json.dumps({"verdict": "proved", "checks": {}}), "", 1.0)
    assert alone["prove"].read(proved)[1] == "1 schedule proved; changed but not tried: b-P10-M24"
    report = {"name": "a-P2-M4", "verdict": "equal", "tensors": 7}
    done = Completed(0, json.dumps(report), "", 1.0)
    verdict, summary, _ = asked("a-P2-M4", "a-P6-M14", "a-P16-M64")["trial"].read(done)
    assert verdict is Verdict.PASSED
    assert summary.endswith("equal to plain PyTorch; changed but not tried: a-P6-M14, a-P16-M64")
    assert asked("a-P2-M4")["trial"].read(done)[1].endswith("equal to plain PyTorch")


def ran(options: Options, *before: tuple[str, str], checks: tuple[str, ...] = ("trial", "tests")) -> list[Verdict]:
    """What becomes of checks that would pass, after outcomes of a name that a rule refuses."""
    passing = [Check(name, "", python("-c", ""), 60.0, lambda done: (Verdict.PASSED, "", ())) for name in checks]
    refused = [CheckResult(name, Verdict.REFUSED, "", "", (Finding(rule, "m"),)) for name, rule in before]
    return [result.verdict for result in run_all(passing, ROOT, options, lambda line: None, refused)]


PASSED, SKIPPED = Verdict.PASSED, Verdict.SKIPPED


@pytest.mark.parametrize(
    ("options", "before", "verdicts"),
    [
        (Options(), [], [PASSED, PASSED]),
        (Options(), [("prove", "deadlock")], [PASSED, SKIPPED]),
        (Options(), [("generator", "schedule")], [PASSED, SKIPPED]),
        (Options(all=True), [("prove", "deadlock")], [PASSED, PASSED]),
        (Options(tested=True), [], [PASSED, SKIPPED]),
        (Options(), [("trial", "bitwise")], [PASSED, PASSED]),
        (Options(first=True), [("trial", "bitwise")], [SKIPPED, SKIPPED]),
        (Options(first=True), [("golden", "golden"), ("theorems", "counts")], [PASSED, PASSED]),
    ],
)
def test_tests_are_skipped_after_a_refuted_schedule_and_after_the_whole_suite_and_with_first_after_any_fault(
    options, before, verdicts
):
    assert ran(options, *before) == verdicts
