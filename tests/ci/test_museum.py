"""The museum: every exhibit can be planted, what the gate says is judged, and two exhibits are really tried."""

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

from ci.errors import GateError
from ci.museum.__main__ import chosen, row
from ci.museum.clone import bring_up_to_date, changed_names, make_template
from ci.museum.collection import EXHIBITS
from ci.museum.exhibit import Edit, fault, harmless
from ci.museum.visit import assess, visit
from ci.process import environment
from tests.ci.conftest import ROOT

PLANTED = fault(4, "a fault", "a.py", "x", "y", check="prove", rule="deadlock", says="waits")
UNHARMED = harmless("nothing", "a.py", "x", "y")


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.title)
def test_an_exhibit_finds_the_text_that_it_replaces_and_leaves_python(exhibit, tmp_path):
    for edit in exhibit.edits:
        (tmp_path / edit.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / edit.path, tmp_path / edit.path)
    exhibit.plant(tmp_path)
    for edit in exhibit.edits:
        if edit.path.endswith(".py"):
            compile((tmp_path / edit.path).read_text(), edit.path, "exec")


def test_every_known_fault_is_planted_and_harmless_changes_beside_them():
    faults = [exhibit for exhibit in EXHIBITS if not exhibit.harmless]
    assert len(faults) >= 60
    assert {exhibit.number for exhibit in faults} - {0} == set(range(1, 39))
    assert len(EXHIBITS) - len(faults) >= 4


@pytest.mark.parametrize("exhibit", [e for e in EXHIBITS if not e.harmless], ids=lambda exhibit: exhibit.title)
def test_what_a_finding_must_say_is_more_than_a_word_and_of_a_test_its_name(exhibit):
    assert len(exhibit.says) >= 12
    assert not exhibit.fits("rank 0 waits; the gradient of a loss differs; never computed")
    if exhibit.rule == "test":
        name = re.match(r"test_\w+", exhibit.says)[0]
        assert any(f"def {name}(" in file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))


def test_an_edit_whose_text_is_not_there_once_is_refused():
    with pytest.raises(GateError, match=r"a.py has it 2 times: 'x'; write the exhibit anew"):
        Edit("a.py", "x", "y").applied("x x")


def said(check: str, verdict: str, rule: str = "deadlock", message: str = "rank 0 waits\nfor ever") -> dict:
    findings = [{"rule": rule, "message": message}] if verdict == "refused" else []
    return {"check": check, "verdict": verdict, "told": "no answer", "findings": findings}


@pytest.mark.parametrize(
    ("checks", "right"),
    [
        ([said("golden", "passed"), said("prove", "refused")], True),
        ([said("tests", "refused")], False),
        ([said("prove", "refused", rule="order")], False),
        ([said("prove", "refused", message="other")], False),
        ([said("prove", "passed")], False),
        ([said("prove", "unknown")], False),
        ([said("prove", "refused"), said("trial", "unknown")], False),
    ],
)
def test_a_fault_must_be_refused_by_the_check_that_should(checks, right):
    verdict = "refused" if any(check["verdict"] == "refused" for check in checks) else "passed"
    seen = assess(PLANTED, {"verdict": verdict, "checks": checks}, 1.0)
    assert seen.right is right
    assert row(seen).startswith("ok" if right else "WRONG")


def test_a_harmless_change_must_pass():
    assert assess(UNHARMED, {"verdict": "passed", "checks": [said("prove", "passed")]}, 1.0).right
    assert not assess(UNHARMED, {"verdict": "refused", "checks": [said("prove", "refused")]}, 1.0).right
    assert not assess(UNHARMED, {"verdict": "unknown", "checks": [said("prove", "unknown")]}, 1.0).right


def test_exhibits_are_chosen_by_number_title_or_file():
    assert {exhibit.number for exhibit in chosen("4")} == {4}
    assert {exhibit.path for exhibit in chosen("weightgrad.py")} == {"dualpipe/runtime/weightgrad.py"}
    assert len(chosen(None)) == len(EXHIBITS)
    assert chosen("nothing like it") == []


def test_the_author_names_every_schedule_that_changed():
    diff = (
        "diff --git a/tests/golden/a-P2-M4.txt b/tests/golden/a-P2-M4.txt\n+rank 0: 0F0>\n"
        "diff --git a/tests/golden/digests.txt b/tests/golden/digests.txt\n"
        "--- a/tests/golden/digests.txt\n+++ b/tests/golden/digests.txt\n-a-P9-M9 0\n+a-P9-M9 1\n-b-P9-M9 0\n"
        "diff --git a/tests/golden/x.csv b/tests/golden/x.csv\n+0F0\n"
        "diff --git a/tests/golden/c-P2-M4.txt b/tests/golden/c-P2-M4.txt\n+++ /dev/null\n-rank 0: 0F0>\n"
    )
    assert changed_names(diff) == ["a-P2-M4", "a-P9-M9", "b-P9-M9", "c-P2-M4"]


def test_a_clone_is_made_in_its_own_folder_also_within_a_hook(scratch, tmp_path, monkeypatch):
    scratch.write(a="1")
    before = scratch.commit()
    monkeypatch.setenv("GIT_DIR", str(scratch.root / ".git"))
    (tmp_path / "template").mkdir()
    make_template(scratch.root, tmp_path / "template")
    assert (tmp_path / "template" / ".git").is_dir()
    monkeypatch.delenv("GIT_DIR")
    assert scratch.git("rev-parse", "HEAD").strip() == before


def test_a_clone_has_not_the_tests_that_would_refuse_any_exhibit(template):
    assert (template / "tests" / "production").is_dir()
    assert not (template / "tests" / "ci").exists()


def test_the_author_of_a_harmless_change_has_nothing_to_write(clone):
    bring_up_to_date(clone.root)
    assert clone.git("status", "--porcelain") == ""


def exhibit(title: str):
    return next(exhibit for exhibit in EXHIBITS if exhibit.title == title)


@pytest.mark.parametrize(
    "title",
    [pytest.param("two sends of one batch swapped", marks=pytest.mark.long), "W taken from an empty queue"],
)
def test_a_planted_fault_is_refused(title, template, tmp_path):
    seen = visit(exhibit(title), template, tmp_path / "planted")
    assert seen.right, seen
    assert not (tmp_path / "planted").exists()


def test_a_tour_that_is_ended_leaves_no_process_and_no_folder(tmp_path):
    env = {**os.environ, **environment(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "ci.museum", "--only", "two sends of one batch swapped"]
    tour = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert eventually(lambda: of_tour(tmp_path, "clone-"))
        for _ in range(100):  # an impatient user, or a shell and `timeout` together
            tour.terminate()
            time.sleep(0.01)
        _, told = tour.communicate(timeout=20)
    finally:
        tour.kill()
    assert tour.returncode == 128 + signal.SIGTERM, told
    assert eventually(lambda: not of_tour(tmp_path, ""))
    assert list(tmp_path.iterdir()) == []


def of_tour(folder, part: str) -> list[str]:
    """The processes that work under a folder, in a path with this part."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            where = os.readlink(process / "cwd")
            found += [process.name] * (where.startswith(str(folder)) and part in where)
    return found


def eventually(holds, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(holds())


def test_a_comment_is_let_through(template, tmp_path):
    assert visit(exhibit("a comment"), template, tmp_path / "planted").right
