"""The records that a change must keep: goldens, changelog, counts."""

import json

import pytest

from ci import GateError, golden
from ci.change import ScheduleChange
from ci.checks.records import check_changelog, check_generator, check_goldens
from ci.checks.theorems import fallen_counts, stale_counts
from ci.golden import (
    COUNTS,
    DIGESTS,
    Count,
    Expansion,
    count_theorems,
    digest,
    path_of,
    read_counts,
    read_digests,
    show_counts,
    write,
)
from ci.process import Completed
from ci.result import Verdict
from tests.ci.conftest import ROOT

NOW = Expansion({"a-P2-M4": "rank 0: x\n"}, {"a-P9-M9": "rank 0: y\n"})
CHANGE = ScheduleChange("a-P2-M4", "rank 0: w\n", "rank 0: x\n")


def test_goldens_that_are_what_the_generator_gives_pass():
    assert check_goldens(NOW, NOW.files({})).verdict is Verdict.PASSED


@pytest.mark.parametrize(
    ("path", "text", "message", "line"),
    [
        (path_of("a-P2-M4"), "head\nrank 0: x\n", "is not what the generator gives", 1),
        (path_of("a-P2-M4"), None, "is missing; run make golden", 1),
        (path_of("b-P2-M4"), "rank 0:\n", "belongs to a schedule that no longer exists", 1),
        (DIGESTS, f"a-P9-M9 {digest('z')}\n", "is not what the generator gives", 1),
    ],
)
def test_a_stale_golden_is_refused(path, text, message, line):
    kept = {**NOW.files({}), path: text}
    result = check_goldens(NOW, {path: text for path, text in kept.items() if text is not None})
    (finding,) = result.findings
    assert result.verdict is Verdict.REFUSED
    assert message in finding.message
    assert (finding.path, finding.line) == (path, line)


def test_a_schedule_that_fails_keeps_its_golden_and_is_refused_by_name():
    failing = Expansion({}, {}, failed={"a-P2-M4": "AssertionError: no", "a-P9-M9": "AssertionError: no"})
    kept = NOW.files({})
    assert failing.files(kept) == kept
    result = check_generator(failing)
    assert result.verdict is Verdict.REFUSED
    assert result.findings[0].message == "a-P2-M4: AssertionError: no"


def test_a_schedule_change_without_an_entry_is_refused_with_the_text_to_write():
    result = check_changelog([CHANGE], "# Changelog\n", "# Changelog\n- Other.\n")
    assert result.verdict is Verdict.REFUSED
    assert "- a-P2-M4: ...\n\n      -rank 0: w\n      +rank 0: x" in result.findings[0].message


def test_an_entry_that_was_there_before_does_not_count():
    assert check_changelog([CHANGE], "- a-P2-M4\n", "- a-P2-M4\n").verdict is Verdict.REFUSED
    assert check_changelog([CHANGE], "", "- a-P2-M4\n").verdict is Verdict.PASSED


def test_one_entry_is_enough_for_all_sizes_and_the_lowered_form_of_a_schedule():
    changed = [CHANGE, ScheduleChange("a-P9-M9", "x", "y"), ScheduleChange("a-lowered-P2-M4", "x", "y")]
    assert check_changelog(changed, "", "- a-P2-M4\n").verdict is Verdict.PASSED
    assert check_changelog([ScheduleChange("a-lowered-P2-M4", "x", "y")], "", "- a\n").verdict is Verdict.REFUSED


def test_without_a_schedule_change_no_entry_is_needed():
    assert check_changelog([], "", "").verdict is Verdict.PASSED


def test_a_count_that_is_not_the_recorded_one_is_stale():
    (finding,) = stale_counts({"a: order": Count(9, 4)}, {"a: order": Count(9, 5)})
    assert finding.rule == "counts"
    assert "9 obligations of which 5 arise" in finding.message
    assert finding.path == COUNTS
    assert stale_counts({"a: order": Count(9, 4)}, {"a: order": Count(9, 4)}) == []


def test_a_count_that_falls_needs_an_explanation_even_where_the_record_is_up_to_date():
    (finding,) = fallen_counts({"a: order": Count(9, 4)}, {"a: order": Count(9, 3)}, lambda name: False)
    assert "3 obligations arise, 4 before" in finding.message
    assert fallen_counts({"a: order": Count(9, 4)}, {"a: order": Count(9, 3)}, lambda name: name == "a: order") == []
    assert fallen_counts({"a: order": Count(9, 4)}, {}, lambda name: False) != []


def test_records_read_back_as_they_were_written():
    counts = {"1f1b: makespan": Count(24, 24, "3M + 3P - 3"), "dualpipe: W in order": Count(3, 0)}
    assert read_counts(show_counts(counts)) == counts
    assert read_digests(NOW.files({})[DIGESTS]) == {"a-P9-M9": digest("rank 0: y\n")}


def test_a_theorem_that_is_not_proved_keeps_the_count_that_is_recorded(monkeypatch):
    """Its obligations were not all looked at, so their number says nothing."""
    rows = [
        {"name": "a: order", "verdict": "proved", "obligations": 9, "non_vacuous": 5, "reason": "", "bound": None},
        {"name": "a: makespan", "verdict": "unknown", "obligations": 0, "non_vacuous": 0, "reason": "no times"},
        {"name": "a: new", "verdict": "refuted", "obligations": 1, "non_vacuous": 1, "reason": "no"},
    ]
    out = "".join(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setattr(golden, "run", lambda *_: Completed(1, out, "", 1.0))
    counts, unproved = count_theorems(ROOT, {"a: makespan": Count(3, 2, "3M"), "a: gone": Count(1, 1)})
    assert counts == {"a: order": Count(9, 5), "a: makespan": Count(3, 2, "3M")}
    assert unproved == {"a: makespan": "no times", "a: new": "no"}


@pytest.mark.parametrize("text", ["order 1 2\n", "a: order  1\n", "a: order  x y\n"])
def test_a_record_that_cannot_be_read_is_bad_input(text):
    with pytest.raises(GateError, match="make golden"):
        read_counts(text)
    with pytest.raises(GateError, match="make golden"):
        read_digests(text)


def test_writing_goldens_says_what_changed_and_leaves_the_counts_alone(tmp_path):
    write(tmp_path, {**NOW.files({}), COUNTS: "a: order  1 1\n"})
    assert write(tmp_path, NOW.files({})) == []
    changed = write(tmp_path, {path_of("b"): "rank 0:\n", DIGESTS: ""})
    assert changed == [path_of("a-P2-M4"), path_of("b"), DIGESTS]
    assert not (tmp_path / path_of("a-P2-M4")).exists()
    assert (tmp_path / COUNTS).exists()
