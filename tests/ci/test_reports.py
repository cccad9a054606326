"""The reports of an evaluation with every kind of verdict."""

import importlib
import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from ci.change import ScheduleChange
from ci.child import page as child_page
from ci.evaluation import Evaluation
from ci.report.grouping import grouped
from ci.report.junit import junit
from ci.report.markdown import markdown
from ci.report.page import page
from ci.report.publish import NAMES, prepare, publish
from ci.report.sarif import RULES, sarif
from ci.report.terminal import terminal
from ci.repository import Base, Changed
from ci.result import CheckResult, Finding, Verdict
from ci.selector import Selection
from dualpipe.page.model import Table
from tests.ci.conftest import ROOT

TEXT = (ROOT / "tests" / "golden" / "1f1b-P2-M4.txt").read_text()
LATER = TEXT.replace("0F1> 0SF1>+0RB0>", "0RB0> 0F1> 0SF1>", 1)
BASE = Base("0" * 40, "where HEAD left main")
STORY = "1f1b-P2-M4: rank 0 waits | forever\nmade by row '2 last' of ONE_F_ONE_B"


@pytest.fixture
def refused():
    finding = Finding("deadlock", STORY, "dualpipe/schedule/generate.py", 42, "1f1b-P2-M4", {"fault": "circle"})
    results = (
        CheckResult("golden", Verdict.PASSED, "always", "20 files are up to date"),
        CheckResult("prove", Verdict.REFUSED, "1 schedules changed", "1 of 1 refuted", (finding,), 2.0),
        CheckResult("theorems", Verdict.UNKNOWN, "the phase tables changed", "no answer within 400 s", (), 400.0),
        CheckResult("tests", Verdict.SKIPPED, "2 files", "another check has refused already"),
    )
    figures = {"makespan": 12.0, "bubble": 2.0, "peak_activations": [2, 1], "peak_pending_w": [0, 0], "messages": 8}
    change = ScheduleChange("1f1b-P2-M4", TEXT, LATER, figures, {"stuck": "every rank reaches its end: no"})
    changed = (Changed("dualpipe/schedule/generate.py", b"a", b"b"),)
    return Evaluation(BASE, changed, (change,), Selection(), results, 405.0)


def test_the_summary_has_verdicts_stories_and_the_diff(refused):
    text = markdown(refused)
    assert text.startswith("# Schedule gate: ❌ Refused\n")
    assert "| ❔ | theorems | unknown: no answer within 400 s | 400.0 | the phase tables changed |" in text
    assert "**deadlock** at `dualpipe/schedule/generate.py:42`" in text
    assert "```text\n1f1b-P2-M4: rank 0 waits | forever\n" in text
    assert "| 1f1b-P2-M4 | changed | cannot finish: every rank reaches its end: no |" in text
    assert "```diff\n-rank 0:" in text


def test_the_summary_names_the_base_and_the_changed_files_that_check_the_rest(refused):
    golden = Changed("tests/golden/1f1b-P2-M4.txt", b"a", b"b")
    changed = (Changed("ci/selection.py", b"a", b"b"), Changed("dualpipe/schedule/generate.py", b"a", b"b"), golden)
    mine = replace(refused, changed=changed)
    assert "differ from `000000000000` (where HEAD left main)" in markdown(mine)
    for text in (markdown(mine), terminal(mine, as_json=False)):
        assert "The change edits files that check it, ci/selection.py: read that yourself" in text
    assert "read that yourself" not in markdown(refused)


def test_the_summary_stays_below_the_size_limit_and_escapes_markup():
    many = [Finding("order", f"<script>{number}\n{'x' * 4000}", f"tests/test_{number}.py") for number in range(700)]
    many.insert(0, Finding("order", f"too long\n{'x' * 950_000}"))
    many.append(Finding("order", "a <b>bold</b> | claim"))
    text = markdown(
        Evaluation(BASE, (), (), Selection(), (CheckResult("prove", Verdict.REFUSED, "", "", tuple(many)),), 1.0)
    )
    assert len(text.encode()) < 2**20
    assert "more findings and diffs are in gate.json" in text
    assert "## prove refuses" in text
    assert "&lt;script&gt;" not in text
    assert "\n<script>0\n" in text, "what is small has its place though something before it is too large"
    assert text.count("```") % 2 == 0
    assert "* a &lt;b&gt;bold&lt;/b&gt; \\| claim" in text


def test_junit_counts_failures_errors_and_skipped_apart(refused):
    suite = ET.fromstring(junit(refused)).find("testsuite")
    assert [suite.get(key) for key in ("tests", "failures", "errors", "skipped")] == ["4", "1", "1", "1"]
    case = next(case for case in suite if case.find("failure") is not None)
    assert (case.get("file"), case.get("line")) == ("dualpipe/schedule/generate.py", "42")
    assert case.find("failure").get("message") == "1f1b-P2-M4: rank 0 waits | forever"


def test_junit_holds_any_message():
    result = CheckResult("tests", Verdict.REFUSED, "", "", (Finding("test", "esc \x1b[31m and \x00 and <tag> & more"),))
    evaluation = Evaluation(BASE, (), (), Selection(), (result,), 1.0)
    case = ET.fromstring(junit(evaluation)).find("testsuite/testcase/failure")
    assert case.text == "esc ?[31m and ? and <tag> & more"


def test_sarif_has_the_shape_of_version_2_1_0(refused):
    log = json.loads(sarif(refused))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in {"none", "note", "warning", "error"}
        assert result["message"]["text"]
        assert result["locations"], "a log with a result that has no place is not taken at all"
        for location in result["locations"]:
            physical = location["physicalLocation"]
            assert not physical["artifactLocation"]["uri"].startswith(("/", "file:"))
            assert physical["region"]["startLine"] >= 1
    assert run["invocations"] == [{"executionSuccessful": True, "exitCode": 1}]


def test_sarif_points_to_the_row_and_lists_checks_without_an_answer(refused):
    deadlock, unanswered = json.loads(sarif(refused))["runs"][0]["results"]
    assert deadlock["locations"][0]["physicalLocation"]["region"]["startLine"] == 42
    assert unanswered["ruleId"] == "unknown"
    assert unanswered["message"]["text"] == "theorems: no answer within 400 s"


def test_every_rule_that_a_finding_names_is_described():
    from proofs.prove import CHECKS

    assert set(CHECKS) <= RULES.keys()


def test_the_text_begins_a_finding_with_its_location(refused):
    lines = terminal(refused, as_json=False).splitlines()
    assert "dualpipe/schedule/generate.py:42: prove/deadlock" in lines
    assert lines[-1] == "REFUSED in 405.0 s, against 000000000000, where HEAD left main"
    assert json.loads(terminal(refused, as_json=True))["verdict"] == "refused"


def test_the_page_draws_the_schedules_with_findings_first(refused):
    data = page(refused)
    assert data["verdict"] == "refused"
    assert [schedule["name"] for schedule in data["schedules"]] == ["1f1b-P2-M4"]
    assert data["findings"][0][1] == "dualpipe/schedule/generate.py:42"
    assert data["first"] == "1f1b-P2-M4"


def test_the_page_begins_with_the_schedule_of_the_first_finding_whether_it_changed_or_not(refused, monkeypatch):
    other = Finding("bitwise", "other-P2-M4: differs", schedule="other-P2-M4")
    trial = CheckResult("trial", Verdict.REFUSED, "", "", (other,))
    data = page(replace(refused, results=(trial, *refused.results), texts={"other-P2-M4": LATER}))
    assert data["first"] == "other-P2-M4"
    assert data["schedules"][0] == {"name": "other-P2-M4", "what": "unchanged", "before": None, "after": LATER}
    assert [finding[0] for finding in data["findings"]] == ["bitwise", "deadlock"]
    assert page(replace(refused, results=()))["first"] == ""
    drawn = []
    module = importlib.import_module("dualpipe.page.render")  # the package has a function of this name
    monkeypatch.setattr(module, "render", lambda made: drawn.extend(made.sections) or "")
    child_page.page({**data, "schedules": data["schedules"][::-1]})
    titles = [section.title if isinstance(section, Table) else section.name for section in drawn]
    assert titles == ["other-P2-M4", "Findings", "Checks", "1f1b-P2-M4"]


def test_of_many_failed_tests_five_are_shown_and_all_are_in_the_data(refused):
    failed = tuple(Finding("test", f"test_{number}: no\nbody", f"tests/t{number}.py", 3) for number in range(12))
    many = replace(refused, results=(CheckResult("tests", Verdict.REFUSED, "", "0 passed, 12 failed", failed),))
    for text in (markdown(many), terminal(many, as_json=False), json.dumps(page(many))):
        assert ("test_4: no" in text, "test_5: no" in text) == (True, False)
        assert "and 7 failed tests more" in text
    assert len(json.loads(terminal(many, as_json=True))["checks"][0]["findings"]) == 12
    assert ET.fromstring(junit(many)).get("failures") == "12"


def test_missing_figures_do_not_read_as_unchanged(refused):
    change = replace(refused.schedules[0], figures_after=None)
    text = terminal(replace(refused, schedules=(change,)), as_json=False)
    assert "no figure moves" not in text


def test_one_fault_in_several_schedules_is_one_finding():
    one, two = (Finding("order", f"{name}: s", "g.py", 3, name) for name in ("a", "b"))
    test = Finding("test", "t", "t.py", 3)
    assert [finding.message for finding in grouped([one, two, test, test])] == ["a: s\nlikewise in b", "t", "t"]


def test_everything_is_written_and_the_jobs_summary_is_added_to(refused, tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert publish(refused, ROOT, tmp_path / "out", tmp_path / "mine.html") == []
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"gate.md", "gate.xml", "gate.sarif", "gate.json", "gate.html"}
    assert written == set(NAMES)  # which the next run clears
    assert summary.read_text() == "before\n" + markdown(refused)
    html = (tmp_path / "mine.html").read_text()
    assert html == (tmp_path / "out" / "gate.html").read_text()
    assert "1f1b-P2-M4" in html


def test_a_page_that_cannot_be_drawn_is_reported(refused, tmp_path):
    (tmp_path / "ci.py").touch()  # shadows the package wherever it is installed
    (problem,) = publish(refused, tmp_path, None, tmp_path / "mine.html")
    assert problem.startswith("mine.html: ")
    assert not (tmp_path / "mine.html").exists()


def test_the_reports_of_another_run_are_removed_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("of another step")
    for name in (*NAMES, "mine.html", "other.txt"):
        (tmp_path / name).write_text("of another run")
    prepare(tmp_path, tmp_path / "mine.html")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "summary.md": "of another step",
        "other.txt": "of another run",
    }
    prepare(tmp_path / "new", Path("/dev/null"))
    assert list((tmp_path / "new").iterdir()) == []
    assert Path("/dev/null").is_char_device()


def test_reports_that_cannot_be_written_are_listed_and_the_others_written(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "nowhere" / ".." / "summary.md" / "below"))
    (tmp_path / "summary.md").touch()
    (tmp_path / "gate.sarif").mkdir()
    problems = publish(refused, ROOT, tmp_path, None)
    assert [problem.partition(":")[0] for problem in problems] == ["below", "gate.sarif"]
    assert {"gate.md", "gate.xml", "gate.json", "gate.html"} < {file.name for file in tmp_path.iterdir()}
