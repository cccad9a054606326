"""Mutants: what is drawn, what becomes of them, and that the work tree is never touched."""

import json

import pytest

from ci.git import git
from ci.mutants.__main__ import main
from ci.mutants.mutation import Mutant, sample, sources
from ci.mutants.runner import Runner, Suite, near_tests
from ci.repository import Repository
from tests.ci.conftest import ROOT

SOURCE = """LIMIT = None


def total(one, other):
    return one + other


def more(value):
    return value + LIMIT
"""
TEST = """from dualpipe.adding import total

def test_total():
    assert total(2, 3) == 5
"""
EXCLUDED = '''"""1 + 1."""
from __future__ import annotations
from typing import TYPE_CHECKING, Protocol, overload

if TYPE_CHECKING:
    LIMIT = 1 + 1

ANNOTATED: int | None = None


def total(values: list[int] | None, *more: int | float) -> int | None:
    """1 + 1."""
    print(f"{1 + 1} ä {1 + 1}") if values else more[0] + 1


class Text(Protocol):
    def __str__(self):
        return 1 + 1


def __repr__(number):
    return number + 1
'''


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A work tree with one source and one test, which calls only one of its functions."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take longer to import than this takes to run
    files = {"dualpipe/__init__.py": "", "dualpipe/adding.py": SOURCE, "tests/test_adding.py": TEST}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    long: long\n")
    git(tmp_path, "init", "--quiet")
    return tmp_path


def test_a_mutant_is_caught_by_a_test_or_survives_and_is_printed(tree, monkeypatch, capsys):
    monkeypatch.chdir(tree)
    assert main(["--count", "99", "--output", "mutants.json", "--tests", "tests", "--"]) == 1
    report = json.loads((tree / "mutants.json").read_text())
    outcomes = {trial["diff"]: trial["outcome"] for trial in report["trials"]}
    assert sorted(outcomes.values()) == ["caught", "survived"]
    (survivor,) = [trial for trial in report["trials"] if trial["outcome"] == "survived"]
    assert (survivor["file"], survivor["line"]) == ("dualpipe/adding.py", 9)
    out = capsys.readouterr().out
    assert f"survived: dualpipe/adding.py:9  {survivor['operator']}\n-    return value + LIMIT\n" in out
    assert out.splitlines()[-1].split() == ["all", "2", "1", "1", "0"]
    assert (tree / "dualpipe/adding.py").read_text() == SOURCE


def test_a_mutant_that_hangs_times_out_and_leaves_no_process(tree):
    mutant = Mutant("dualpipe/adding.py", 5, "a loop", SOURCE.replace("    return one + other", "    while True: pass"))
    runner = Runner(tree, ("tests",), {("tests",): Suite(("tests",), 0.5, least=1.0)})
    assert runner.run(mutant).outcome == "timed out"
    assert (tree / "dualpipe/adding.py").read_text() == SOURCE


def test_annotations_docstrings_and_texts_are_left_out_and_a_seed_repeats_its_draw():
    drawn = sample({"source.py": EXCLUDED}, 100, 1)
    assert {mutant.line for mutant in drawn} == {13}
    assert drawn == sample({"source.py": EXCLUDED}, 100, 1)
    assert drawn != sample({"source.py": EXCLUDED}, 100, 2)


def test_a_mutant_meets_the_tests_near_its_source():
    assert near_tests("proofs/theorems/order.py") == ("tests/proofs/theorems",)
    assert "tests/production" in near_tests("dualpipe/runtime/transport.py")
    for path in sources(ROOT, Repository(ROOT).files(), []):
        assert near_tests(path), path
