"""How the answers of checks are read: a command that gives no answer is unknown."""

import json
import sys
import time
from pathlib import Path

import pytest

from ci.checks import prove, tests, theorems, trial
from ci.checks.check import Check, run_check
from ci.golden import Count, Counts
from ci.location import NOWHERE, Location, Locator, bounds_in, lines_of_rows
from ci.process import Completed, python, run
from ci.result import BOOKKEEPING, CheckResult, ExitCode, Finding, Verdict, exit_code
from tests.ci.conftest import ROOT

FILES = [Path("a.txt"), Path("b.txt")]
LOCATOR = Locator({}, {}, frozenset(), NOWHERE)


def done(*lines: object, code: int = 0) -> Completed:
    return Completed(code, "".join(json.dumps(line) + "\n" for line in lines), "", 1.0)


def proved(verdict: str = "proved", **checks: object) -> dict[str, object]:
    return {"verdict": verdict, "checks": checks}


STORY = {"verdict": "refuted", "story": "rank 1 waits", "finding": {"place": {"rank": 1, "slot": 2, "op": "1F0>"}}}


def test_prove_passes_only_if_every_schedule_is_proved():
    read = prove.check(FILES, "", LOCATOR).read
    assert read(done(proved(), proved()))[0] is Verdict.PASSED
    assert read(done(proved(), proved("unknown")))[0] is Verdict.UNKNOWN
    assert read(done(proved()))[0] is Verdict.UNKNOWN
    assert read(Completed(1, "", "Traceback\nKeyError: 3\n", 1.0))[1] == "no answer: it ended with 1 and KeyError: 3"
    assert read(Completed(-9, "", "", 1.0))[1] == "no answer: signal 9 ended it (Killed)"


def test_a_refuted_check_is_a_finding_with_its_story():
    verdict, summary, (finding,) = prove.check(FILES, "", LOCATOR).read(done(proved(), proved("refuted", order=STORY)))
    assert verdict is Verdict.REFUSED
    assert summary == "1 of 2 schedules refuted"
    assert (finding.rule, finding.schedule, finding.first_line) == ("order", "b", "b: rank 1 waits")


def theorem(verdict: str = "proved", arising: int = 3, **result: object) -> dict[str, object]:
    summary = {"name": "a: order", "statement": "s", "reason": "r", "obligations": 5, "non_vacuous": arising}
    return {**summary, "verdict": verdict, **result}


def read_theorems(
    *results: object, recorded: Counts | None = None, base: Counts | None = None, entries: tuple[str, ...] = ()
):
    kept = {"a: order": Count(5, 3)}
    check = theorems.check(recorded or kept, base or kept, "", LOCATOR, entries.__contains__, bound_at)
    return check.read(done(*results))


def bound_at(family: str, bound: str) -> Location:
    return Location(f"{family}.py", 7)


def test_a_refuted_bound_is_named_with_the_line_where_it_is_written():
    verdict, _, (refuted,) = read_theorems(theorem("refuted", name="a: pending"))
    assert verdict is Verdict.REFUSED
    assert refuted.rule == "theorem"
    assert "edit pending and its words in the family's bounds, a.py:7" in refuted.message


@pytest.mark.parametrize("family", ["1f1b", "zb1p", "dualpipe", "dualpipev", "dualpipev-late-all"])
def test_a_bound_of_a_family_is_found_in_its_file(family):
    place = bounds_in(ROOT)(family, "memory")
    lines = (ROOT / place.path).read_text().splitlines()
    assert lines[place.line - 1].strip().startswith("memory=")
    if family in ("1f1b", "zb1p"):  # two families in one file
        assert f'"{family}"' in next(line for line in lines[place.line :] if "_one_lane(" in line)


def test_theorems_pass_with_the_recorded_counts_and_no_others():
    assert read_theorems(theorem())[0] is Verdict.PASSED
    verdict, summary, findings = read_theorems(theorem("unknown", reason="no times found"))
    assert (verdict, summary, findings) == (Verdict.UNKNOWN, "1 of 1 not proved; a: order: no times found", ())
    verdict, _, (finding,) = read_theorems(theorem("refuted"))
    assert (verdict, finding.rule) == (Verdict.REFUSED, "theorem")
    verdict, _, findings = read_theorems(theorem(arising=2))
    assert verdict is Verdict.REFUSED
    assert [finding.rule for finding in findings] == ["counts", "counts"]
    assert read_theorems()[0] is Verdict.UNKNOWN


def test_a_slower_schedule_passes_once_its_makespan_is_recorded_and_the_changelog_names_the_theorem():
    name, before = "a: makespan", {"a: makespan": Count(5, 3, "3M + P - 2")}
    slower = theorem(name=name, bound="3M + P - 1")
    now = {name: Count(5, 3, "3M + P - 1")}
    verdict, _, findings = read_theorems(slower, recorded=before, base=before)
    assert verdict is Verdict.REFUSED
    assert [finding.first_line.partition(",")[0] for finding in findings] == [
        "a: makespan: 5 obligations of which 3 arise and the bound 3M + P - 1",
        "a: makespan 3M + P - 1; was 3M + P - 2: say why in CHANGELOG.md",
    ]
    assert {finding.rule for finding in findings} <= BOOKKEEPING
    assert len(read_theorems(slower, recorded=now, base=before)[2]) == 1
    verdict, summary, _ = read_theorems(slower, recorded=now, base=before, entries=(name,))
    assert verdict is Verdict.PASSED
    assert summary == "1 theorems proved for every size; a: makespan 3M + P - 1; was 3M + P - 2"
    page = (ROOT / "docs/how-to/gate.md").read_text()
    assert summary.replace("1 theorems", "95 theorems").replace("a:", "dualpipe:") in page
    assert read_theorems(slower, recorded=now, base={name: Count(5, 3)})[0] is Verdict.PASSED  # no bound recorded there


def tried(verdict: str = "equal", **result: object) -> dict[str, object]:
    how = {"failures": [], "differences": 0, "first_difference": None, **result}
    return {"name": "a", "verdict": verdict, "tensors": 7, "complaints": [], "parties": {"processes": how}}


@pytest.mark.parametrize(
    ("report", "verdict", "rule"),
    [
        (tried(), Verdict.PASSED, None),
        (tried("different", differences=2, first_difference="loss"), Verdict.REFUSED, "bitwise"),
        (tried("different", failures=["rank 0: hung"]), Verdict.REFUSED, "run"),
        ({"name": "a", "verdict": "bad input", "error": "e"}, Verdict.REFUSED, "schedule"),
        ({"name": "a", "verdict": "unknown", "error": "e"}, Verdict.UNKNOWN, None),
        ({"name": "z", "verdict": "equal"}, Verdict.UNKNOWN, None),
    ],
)
def test_a_trial_is_read(report, verdict, rule):
    found, _, findings = trial.check(FILES[:1], "", LOCATOR).read(done(report))
    assert found is verdict
    assert [finding.rule for finding in findings] == ([] if rule is None else [rule])


def test_with_first_a_trial_may_end_at_a_difference():
    stopped = done(tried("different", differences=2, first_difference="loss"))
    names = ["a", "b"]
    verdict, summary, _ = trial.check_megatron(names, "", LOCATOR, first=True).read(stopped)
    assert (verdict, summary) == (Verdict.REFUSED, "1 of 1 differ from Megatron's 1F1B")
    assert trial.check_megatron(names, "", LOCATOR).read(stopped)[0] is Verdict.UNKNOWN
    assert trial.check_megatron(names, "", LOCATOR, first=True).read(done(tried()))[0] is Verdict.UNKNOWN


REPORT = """<testsuites><testsuite>
<testcase classname="tests.t" name="test_a" file="tests/t.py" line="4" time="0.1"/>
<testcase classname="tests.t" name="test_b" file="tests/t.py" line="9" time="0.1">
<failure message="assert 1 == 2&#10;more">the body</failure></testcase>
<testcase classname="tests.t" name="test_c" file="tests/t.py" line="14"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_a_failed_test_is_a_finding_at_its_line_and_a_skipped_one_has_not_passed():
    passed, skipped, (finding,) = tests.read_report(REPORT)
    assert (passed, skipped) == (1, 1)
    assert (finding.path, finding.line, finding.first_line) == ("tests/t.py", 10, "test_b: assert 1 == 2")
    assert finding.message.splitlines() == ["test_b: assert 1 == 2", "more", "", "the body"]


def test_the_story_of_a_failed_test_begins_with_its_whole_error():
    """A terminal shows a story's first lines only, and of an error many lines long the cause may be the last."""
    many = REPORT.replace("more", "&#10;".join(f"rank {rank}: waits" for rank in range(9)))
    _, _, (finding,) = tests.read_report(many)
    assert finding.message.splitlines()[9] == "rank 8: waits"
    endless = REPORT.replace("more", "m" * 10_000).replace("the body", "t" * 10_000 + "at the end")
    _, _, (finding,) = tests.read_report(endless)
    assert len(finding.message) < 7_000
    assert finding.message.endswith("at the end")


def test_tests_that_were_all_skipped_have_not_passed(tmp_path):
    report = tmp_path / "tests.xml"
    check = tests.check(["tests/t.py"], "", report, 0, False, ())
    report.write_text('<testsuites><testsuite><testcase name="t"><skipped/></testcase></testsuite></testsuites>')
    assert check.read(Completed(0, "", "", 1.0))[0] is Verdict.SKIPPED
    assert check.read(Completed(5, "", "", 1.0))[0] is Verdict.UNKNOWN
    report.with_suffix(".long").write_text("2")
    assert check.read(Completed(5, "", "", 1.0))[0] is Verdict.SKIPPED
    report.write_text('<testsuites><testsuite><testcase name="t"/></testsuite></testsuites>')
    assert check.read(Completed(0, "", "", 1.0))[0] is Verdict.PASSED
    assert check.read(Completed(3, "", "INTERNALERROR", 1.0))[0] is Verdict.UNKNOWN


MARKED = "import pytest\n\n@pytest.mark.long\ndef test_long():\n    assert {}\n"


@pytest.fixture
def marked(tmp_path):
    """Two files of tests with a long one each; the one in a.py fails, and b.py has one that is not long."""
    (tmp_path / "ci").symlink_to(ROOT / "ci")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    long: takes long\n")
    (tmp_path / "test_a.py").write_text(MARKED.format(0))
    (tmp_path / "test_b.py").write_text(MARKED.format(1) + "\ndef test_short():\n    pass\n")
    return tmp_path


def test_long_tests_of_changed_files_run_and_the_others_are_counted(marked, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # others take longer to import than this takes to run
    monkeypatch.setenv("PYTEST_PLUGINS", "xdist.plugin")

    def run_tests(*files: str, long: tuple[str, ...] = (), workers: int = 0) -> tuple[Verdict, str]:
        outcome = run_check(tests.check(files, "", marked / "tests.xml", workers, False, long), marked)
        return outcome.verdict, outcome.summary

    both = ("test_a.py", "test_b.py")
    one = (Verdict.REFUSED, "1 passed, 1 failed, 0 skipped, 1 long test not run")
    assert run_tests(*both, long=both[:1]) == run_tests(*both, long=both[:1], workers=1) == one
    alone = "all tests of the selected files are long, 1 long test not run"
    assert run_tests("test_a.py") == (Verdict.SKIPPED, alone)


def answer(code: str, limit: float = 20.0) -> CheckResult:
    return run_check(Check("c", "", python("-c", code), limit, prove.check(FILES[:1], "", LOCATOR).read), Path.cwd())


def test_a_check_that_exceeds_its_time_limit_is_unknown_and_leaves_no_process():
    started = time.monotonic()
    outcome = answer(
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])", 0.5
    )
    assert outcome.verdict is Verdict.UNKNOWN
    assert outcome.summary == "no answer within 0.5 s"
    assert time.monotonic() - started < 20


def test_after_end_all_nothing_is_started():
    code = "from ci.process import end_all, python, run; end_all(); run(python('-c', ''), None, 9.0, tree='.')"
    assert answer(code).summary.endswith(f"EndingError: {sys.executable} is not started: the gate is ending")


def test_a_check_that_crashes_or_prints_no_json_is_unknown():
    assert answer("raise KeyError('x')").summary == "no answer: it ended with 1 and KeyError: 'x'"
    assert answer("print('{no json')").verdict is Verdict.UNKNOWN


def test_the_worst_verdict_counts_and_a_skipped_check_has_none():
    def code(*verdicts: Verdict) -> ExitCode:
        return exit_code([CheckResult("c", verdict, "") for verdict in verdicts])

    assert code(Verdict.PASSED, Verdict.SKIPPED) is ExitCode.PASSED
    assert code(Verdict.PASSED, Verdict.UNKNOWN) is ExitCode.UNKNOWN
    assert code(Verdict.UNKNOWN, Verdict.REFUSED) is ExitCode.REFUSED


def test_bookkeeping_alone_is_no_fault():
    def refused(*rules: str) -> bool:
        return CheckResult("c", Verdict.REFUSED, "", "", tuple(Finding(rule, "m") for rule in rules)).is_fault

    assert refused()
    assert refused("counts", "theorem")
    assert not refused("counts")
    assert not CheckResult("c", Verdict.UNKNOWN, "").is_fault


SOURCE = """A: Table = (
    Row("1", 1, "F0"),
    Row("2", N, "B0"),
)
B: Table = vary(
    A,
    Row("2", N - 1, "B0"),
)
C = 3
D: Table = (Row("1", 1, "W"),)
E: Table = vary(B, *D)
"""


def test_a_row_of_a_variant_has_the_line_of_the_table_it_comes_from():
    assert lines_of_rows(SOURCE) == {("A", "1"): 2, ("A", "2"): 3, ("B", "1"): 2, ("B", "2"): 7} | {
        ("D", "1"): 10, ("E", "1"): 10, ("E", "2"): 7,
    }  # fmt: skip


def test_a_finding_is_located_at_a_changed_row_else_at_its_first_row_else_at_the_cause():
    rows = {"s": {"rows": [["A", "1"], ["B", "2"]], "ranks": [[[0], [1, 1]]]}}
    cause = Location("x.py", 5)
    data = {"send": {"rank": 0, "slot": 0, "op": ""}, "receive": {"rank": 0, "slot": 1, "op": ""}}
    assert Locator(rows, lines_of_rows(SOURCE), frozenset(), cause).locate("s", data).line == 2
    touched = Locator(rows, lines_of_rows(SOURCE), frozenset({7}), cause).locate("s", data)
    assert (touched.path, touched.line, touched.what) == ("dualpipe/schedule/generate.py", 7, "row '2' of B")
    assert Locator(rows, {}, frozenset(), cause).locate("unknown", data) == cause


def test_a_finding_has_a_first_line():
    assert Finding("r", "one\ntwo").first_line == "one"
    assert Finding("r", "").first_line == ""


def test_a_command_imports_this_tree_and_reads_its_standard_input(tmp_path):
    (tmp_path / "only_here.py").write_text("X = 4\n")
    code = "import sys, only_here; print(only_here.X, sys.stdin.read())"
    assert run(python("-c", code), tmp_path, 20.0, stdin="in").out == "4 in\n"
