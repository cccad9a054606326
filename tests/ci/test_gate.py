"""The gate on copies of this repository: changes that pass, changes that are refused, and bad input."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

from ci import GateError, evaluation, history
from ci.change import ScheduleChange
from ci.evaluation import find_cause
from ci.faults.clone import update_records
from ci.gate import main
from ci.golden import expansion, kept_files
from ci.location import Location
from ci.plan import Options
from ci.process import environment
from ci.report.terminal import as_data
from tests.ci.conftest import ROOT
from tests.docs.snippets import blocks_of, unlike

PAGE = ROOT / "docs" / "how-to" / "gate.md"


def gate(clone, *arguments: str) -> tuple[int, dict, str]:
    command = [sys.executable, "-m", "ci.gate", "--base", "HEAD", "--first", "--json", *arguments]
    env = {**os.environ, **environment(clone.root)}
    done = subprocess.run(command, cwd=clone.root, env=env, capture_output=True, text=True, timeout=240)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def shown(first_words: str) -> str:
    """The block of the gate's page that begins so."""
    (block,) = [b for b in blocks_of(PAGE.read_text(), PAGE.name) if b.text.startswith(first_words)]
    return block.text


def replace(clone, path: str, old: str, new: str) -> None:
    text = (clone.root / path).read_text()
    assert text.count(old) == 1
    clone.put(path, text.replace(old, new))


@pytest.fixture
def called(clone, monkeypatch, capsys):
    """The gate's command called in this process, in the clone: a function that returns what ``gate`` does."""
    monkeypatch.chdir(clone.root)

    def call(*arguments: str) -> tuple[int, dict, str]:
        code = main(["--base", "HEAD", "--first", "--json", *arguments])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return call


@pytest.fixture(scope="session")
def expanded():
    """The schedules of this tree, for tests that do not change the generator: expanding them takes seconds."""
    return expansion(ROOT)


@pytest.fixture
def kept(clone, monkeypatch):
    """A function that runs the gate on the clone without the checks that are processes."""
    monkeypatch.setattr(evaluation, "run_all", lambda *given: [])

    def report() -> tuple[int, dict]:
        found = evaluation.evaluate(clone.root, "HEAD", Options(first=True), lambda line: None)
        return found.exit_code, as_data(found)

    return report


def verdicts(report: dict) -> dict[str, str]:
    return {check["check"]: check["verdict"] for check in report["checks"]}


def test_output_of_the_tree_is_not_part_of_the_answer(clone, expanded):
    text = (clone.root / "dualpipe/schedule/generate.py").read_text()
    clone.put("dualpipe/schedule/generate.py", f"{text}\nprint('debug', '{{}}')\n")
    assert expansion(clone.root) == expanded


def test_a_tree_without_the_package_has_no_schedules_of_another(tmp_path):
    with pytest.raises(GateError, match="has no dualpipe"):
        expansion(ROOT, tmp_path)


def test_sizes_that_a_schedule_no_longer_has_are_a_change(clone, kept, expanded, monkeypatch):
    gone = {"1f1b-P10-M24", "zb1p-P10-M24"}
    now = dataclasses.replace(expanded, digested={k: v for k, v in expanded.digested.items() if k not in gone})
    monkeypatch.setattr(evaluation, "expansion", lambda root: now)
    monkeypatch.setattr(history, "_expansion_at", lambda repository, base: expanded)
    for path, text in now.files(kept_files(clone.root)).items():
        clone.put(path, text)
    code, report = kept()
    assert code == 1
    assert {change["name"] for change in report["schedules"] if change["what"] == "gone"} == gone
    assert verdicts(report)["changelog"] == "refused"


def test_a_finding_without_a_location_points_to_the_first_changed_code(scratch):
    scratch.put("bench/a.py", "x = 1\n")
    scratch.put("dualpipe/b.py", "x = 1\n\ny = 1\n")
    scratch.put("README.md", "one\n")
    base = scratch.commit()
    scratch.put("bench/a.py", "# a remark\nx = 1\n")
    scratch.put("README.md", "two\n")
    assert find_cause(scratch.repository, base, scratch.repository.changes(base)).path == "bench/a.py"
    scratch.put("tests/test_b.py", "x = 1\n")
    scratch.put("dualpipe/b.py", "x = 1\n\ny = 2\n")
    assert find_cause(scratch.repository, base, scratch.repository.changes(base)) == Location("dualpipe/b.py", 3)


def test_a_golden_written_by_hand_is_refused(clone, kept, expanded, monkeypatch):
    monkeypatch.setattr(evaluation, "expansion", lambda root: expanded)
    golden = clone.root / "tests/golden/zb1p-P4-M8.txt"
    golden.write_text(golden.read_text().replace("0F0>", "0F1>", 1))
    code, report = kept()
    assert code == 1
    assert verdicts(report)["golden"] == "refused"


def test_a_changed_table_without_goldens_and_changelog_entry_is_refused_for_both(clone, kept, monkeypatch):
    measure, name = history.measured, "dualpipe-P4-M8"  # to measure all that change, up to 24 ranks, takes long
    monkeypatch.setattr(history, "measured", lambda root, found: measure(root, [c for c in found if c.name == name]))
    replace(clone, "dualpipe/schedule/generate.py", 'N - h - 1, "W RB0 B0 SB0"', 'N - h - 1, "RB0 B0 W SB0"')
    code, report = kept()
    assert code == 1
    assert verdicts(report)["golden"] == "refused"
    assert verdicts(report)["changelog"] == "refused"
    (change,) = report["schedules"]
    assert (change["before"]["makespan"], change["after"]["makespan"]) == (26, 27)
    first, *diff = shown("dualpipe-P4-M8 changed").splitlines()
    assert set(diff) < set(change["diff"])
    moved = ScheduleChange("", "", "", change["before"], change["after"]).moved
    assert first.endswith("changed: " + "; ".join(f"{what} {old} -> {new}" for what, old, new in moved))


@pytest.mark.long
def test_a_refusal_reads_as_the_page_shows(clone):
    replace(
        clone,
        "dualpipe/schedule/generate.py",
        '"F1+B0+W0 SF1 SB0 RF0 RB1 F0+B1+W1 SF0 SB1',
        '"F1+B0+W0 SF1 SB0 RF0 RB1 F0+B1+W1 SB1 SF0',
    )
    update_records(clone.root)
    command = [sys.executable, "-m", "ci.gate", "--base", "HEAD", "--first"]
    env = {**os.environ, **environment(clone.root)}
    done = subprocess.run(command, cwd=clone.root, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    (refusal,) = re.findall(r"^dualpipe/schedule/generate\.py.*\n(?:  .*\n)+", done.stdout, re.M)
    any_line = re.compile(r"(?<=^dualpipe/schedule/generate\.py:)\d+")  # it moves with every edit of that file
    page = any_line.sub("...", shown("dualpipe/schedule/generate.py"))
    assert not unlike(page, refusal)


def test_a_tree_that_does_not_parse_is_refused_and_not_a_crash(clone, kept):
    clone.put("dualpipe/schedule/phase_table.py", "def (\n")
    code, report = kept()
    assert code == 1
    (finding,) = report["checks"][0]["findings"]
    assert "SyntaxError" in finding["message"]
    assert (finding["path"], finding["line"]) == ("dualpipe/schedule/phase_table.py", 1)


def test_a_base_that_does_not_exist_is_bad_input(clone):
    code, report, err = gate(clone, "--base", "nowhere")
    assert code == 2
    assert err.splitlines()[-1].startswith("gate: --base must be a revision of this repository: got nowhere")
    assert report["verdict"] == "bad_input"
    assert report["error"] in err


def test_without_a_change_it_passes_and_bad_input_removes_its_reports(clone, called, tmp_path):
    reports = tmp_path / "reports"
    code, report, _ = gate(clone, "--output", str(reports))
    assert (code, report["verdict"], report["changed"]) == (0, "passed", [])
    assert list(verdicts(report).items()) == [("generator", "passed"), ("golden", "passed"), ("changelog", "passed")]
    assert {file.suffix for file in reports.iterdir()} == {".md", ".xml", ".sarif", ".json", ".html"}
    code, report, _ = called("--output", str(reports), "--base", "nowhere")
    assert code == 2
    assert {file.suffix for file in reports.iterdir()} == {".md", ".json"}
    assert json.loads((reports / "gate.json").read_text()) == report
    assert "Bad input" in (reports / "gate.md").read_text()


LONG = "a" * 300
"""No file system takes it as a name."""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--output", "{}/file"), "--output must be a folder for the reports: "),
        (("--output", "{}/file/below"), "--output must be a folder for the reports: "),
        (("--output", "{}/taken"), "--output must be a folder for the reports: "),
        (("--output", LONG), "--output must be a folder for the reports: "),
        (("--html", "{}/nowhere/page.html"), "--html is a file that can be written: "),
        (("--html", "{}/file/page.html"), "--html is a file that can be written: "),
        (("--html", "{}"), "--html is a file that can be written: "),
        (("--html", "{}/circle"), "--html is a file that can be written: "),
        (("--html", LONG), "--html is a file that can be written: "),
        (("--root", "{}/nowhere"), "--root must be a folder: "),
        (("--root", "{}/circle"), "--root must be a folder: "),
        (("--root", "{}"), "the gate needs a git work tree: "),
    ],
)
def test_what_cannot_be_read_or_written_is_bad_input_before_any_work(called, tmp_path, arguments, said):
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "gate.sarif").mkdir(parents=True)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    code, report, err = called(*(argument.format(tmp_path) for argument in arguments))
    assert (code, report["verdict"]) == (2, "bad_input")
    (line,) = err.splitlines()
    assert line.startswith(f"gate: {said}")


def test_a_summary_of_a_job_that_cannot_be_written_is_bad_input_before_any_work(called, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "nowhere" / "summary.md"))
    code, report, err = called()
    assert (code, report["verdict"]) == (2, "bad_input")
    assert err.startswith("gate: GITHUB_STEP_SUMMARY names a file that can be written: ")


@pytest.mark.parametrize("path", ["tests/golden/theorems.txt", "tests/golden/digests.txt"])
def test_a_record_that_cannot_be_read_is_bad_input(clone, called, expanded, monkeypatch, path):
    monkeypatch.setattr(evaluation, "expansion", lambda root: expanded)
    clone.put(path, "what\n")
    code, _, err = called()
    assert code == 2
    assert "make golden" in err


def test_first_and_all_cannot_be_combined(clone):
    command = [sys.executable, "-m", "ci.gate", "--first", "--all"]
    done = subprocess.run(command, cwd=clone.root, env={**os.environ, **environment(clone.root)}, capture_output=True)
    assert done.returncode == 2
    assert b"--all: not allowed with argument --first" in done.stderr


@pytest.mark.parametrize(("given", "passed"), [("FIRST=1", "--first"), ("ALL=1", "--all"), ("TESTED=1", "--tested")])
def test_make_passes_on_first_all_and_tested(given, passed):
    words = ["make", "--dry-run", "--assume-old=.venv/ready", "gate", given]
    assert passed in subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
