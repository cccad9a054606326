"""Planted faults: each finds its text, the gate's report is compared with what is expected, and one really runs."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ci import GateError
from ci.faults.__main__ import chosen, row
from ci.faults.clone import changed_names, make_template, update_records
from ci.faults.collection import FAULTS, HARMLESS, PLANTED
from ci.faults.fault import Edit
from ci.faults.fault import fault as make_fault
from ci.faults.fault import harmless as make_harmless
from ci.faults.gate_run import compare, run_gate
from ci.process import environment
from tests.ci.conftest import ROOT

FAULT = make_fault(4, "a fault", "a.py", "x", "y", check="prove", rule="deadlock", says="waits")
UNHARMED = make_harmless("nothing", "a.py", "x", "y")


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.title)
def test_a_planted_fault_finds_the_text_that_it_replaces_and_leaves_python(fault, tmp_path):
    for edit in fault.plant.edits:
        (tmp_path / edit.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / edit.path, tmp_path / edit.path)
    fault.plant(tmp_path)
    for edit in fault.plant.edits:
        if edit.path.endswith(".py"):
            compile((tmp_path / edit.path).read_text(), edit.path, "exec")


def test_every_known_fault_is_planted_and_so_are_harmless_changes():
    assert len(FAULTS) >= 60
    assert {fault.number for fault in FAULTS} - {0} == set(range(1, 39))
    assert len(HARMLESS) >= 4
    assert not any(fault.harmless for fault in FAULTS)
    assert all(fault.harmless for fault in HARMLESS)


def test_no_two_faults_are_the_same_edit():
    """The gate answers both alike, so that two records of one edit cannot both be right."""
    assert len({fault.plant for fault in PLANTED}) == len(PLANTED)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_the_expected_message_is_specific_and_of_a_test_begins_with_its_name(fault):
    assert len(fault.says) >= 12
    assert not fault.matches("rank 0 waits; the gradient of a loss differs; never computed")
    if fault.checks == ("tests/test",):
        for test in fault.says.split("|"):
            name = re.match(r"test_\w+", test)[0]
            assert any(f"def {name}(" in file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))


def test_an_edit_whose_text_does_not_occur_once_is_an_error():
    with pytest.raises(GateError, match=r"a.py has it 2 times: 'x'; update the record"):
        Edit("a.py", "x", "y").apply("x x")


def check_report(check: str, verdict: str, rule: str = "deadlock", message: str = "rank 0 waits\nfor ever") -> dict:
    findings = [{"rule": rule, "message": message}] if verdict == "refused" else []
    return {"check": check, "verdict": verdict, "told": "no answer", "findings": findings}


@pytest.mark.parametrize(
    ("checks", "right"),
    [
        ([check_report("golden", "passed"), check_report("prove", "refused")], True),
        ([check_report("tests", "refused")], False),
        ([check_report("prove", "refused", rule="order")], False),
        ([check_report("prove", "refused", message="other")], False),
        ([check_report("prove", "passed")], False),
        ([check_report("prove", "unknown")], False),
        ([check_report("prove", "refused"), check_report("trial", "unknown")], False),
    ],
)
def test_a_fault_must_be_refused_by_the_expected_check(checks, right):
    verdict = "refused" if any(check["verdict"] == "refused" for check in checks) else "passed"
    gate_run = compare(FAULT, {"verdict": verdict, "checks": checks}, 1.0)
    assert gate_run.right is right
    assert row(gate_run).startswith("ok" if right else "WRONG")


def test_a_harmless_change_must_pass():
    assert compare(UNHARMED, {"verdict": "passed", "checks": [check_report("prove", "passed")]}, 1.0).right
    assert not compare(UNHARMED, {"verdict": "refused", "checks": [check_report("prove", "refused")]}, 1.0).right
    assert not compare(UNHARMED, {"verdict": "unknown", "checks": [check_report("prove", "unknown")]}, 1.0).right


def test_faults_are_chosen_by_number_title_or_file():
    assert {fault.number for fault in chosen("4")} == {4}
    assert {fault.path for fault in chosen("weightgrad.py")} == {"dualpipe/runtime/weightgrad.py"}
    assert len(chosen(None)) == len(PLANTED)
    assert chosen("nothing like it") == []


def test_the_changed_schedules_are_read_from_a_diff_of_the_goldens():
    diff = (
        "diff --git a/tests/golden/a-P2-M4.txt b/tests/golden/a-P2-M4.txt\n+rank 0: 0F0>\n"
        "diff --git a/tests/golden/digests.txt b/tests/golden/digests.txt\n"
        "--- a/tests/golden/digests.txt\n+++ b/tests/golden/digests.txt\n-a-P9-M9 0\n+a-P9-M9 1\n-b-P9-M9 0\n"
        "diff --git a/tests/golden/x.csv b/tests/golden/x.csv\n+0F0\n"
        "diff --git a/tests/golden/c-P2-M4.txt b/tests/golden/c-P2-M4.txt\n+++ /dev/null\n-rank 0: 0F0>\n"
    )
    assert changed_names(diff) == ["a-P2-M4", "a-P9-M9", "b-P9-M9", "c-P2-M4"]


def test_a_clone_is_made_in_its_own_folder_even_within_a_hook(scratch, tmp_path, monkeypatch):
    scratch.write(a="1")
    before = scratch.commit()
    monkeypatch.setenv("GIT_DIR", str(scratch.root / ".git"))
    (tmp_path / "template").mkdir()
    make_template(scratch.root, tmp_path / "template")
    assert (tmp_path / "template" / ".git").is_dir()
    monkeypatch.delenv("GIT_DIR")
    assert scratch.git("rev-parse", "HEAD").strip() == before


def test_a_clone_lacks_the_tests_that_would_refuse_any_fault(template):
    assert (template / "tests" / "production").is_dir()
    assert not (template / "tests" / "ci").exists()


@pytest.mark.long
def test_without_a_changed_schedule_no_record_changes(clone):
    update_records(clone.root)
    assert clone.git("status", "--porcelain") == ""


def planted(title: str):
    return next(fault for fault in PLANTED if fault.title == title)


def test_a_planted_fault_is_refused(template, tmp_path):
    """By the generator; test_gate.py has one that ``prove`` refuses, among the long tests."""
    gate_run = run_gate(planted("W taken from an empty queue"), template, tmp_path / "planted")
    assert gate_run.right, gate_run
    assert not (tmp_path / "planted").exists()


def test_a_run_that_is_terminated_leaves_no_process_and_no_folder(tmp_path):
    env = {**os.environ, **environment(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "ci.faults", "--only", "two sends of one slot swapped"]
    command_run = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert eventually(lambda: processes_in(tmp_path, "clone-"))
        for _ in range(100):  # an impatient user, or a shell and `timeout` together
            command_run.terminate()
            time.sleep(0.01)
        _, stderr = command_run.communicate(timeout=20)
    finally:
        command_run.kill()
    assert command_run.returncode == 128 + signal.SIGTERM, stderr
    assert eventually(lambda: not processes_in(tmp_path, ""))
    assert list(tmp_path.iterdir()) == []


def processes_in(folder, part: str) -> list[str]:
    """The processes that work under a folder, in a path with this part."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            where = os.readlink(process / "cwd")
            found += [process.name] * (where.startswith(str(folder)) and part in where)
    return found


def eventually(holds, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(holds())


@pytest.mark.long
def test_a_comment_passes(template, tmp_path):
    assert run_gate(planted("a comment"), template, tmp_path / "planted").right
