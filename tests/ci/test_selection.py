"""Which checks a change asks for, on this repository as it is."""

from functools import cache

import pytest

from ci.imports import read
from ci.meaning import Meaning, meaning
from ci.repository import Changed, Repository
from ci.selection import (
    BUILD,
    DOCUMENTATION,
    LINKS,
    MUSEUM,
    PAGE_TESTS,
    PAGES_READ,
    PLANTED,
    PLANTING,
    SOURCES_READ,
    Selection,
    choose,
    tree_of,
)
from tests.ci.conftest import ROOT


@cache
def tree():
    files = Repository(ROOT).files()
    sources = {path: read((ROOT / path).read_bytes()) for path in files if path.endswith(".py")}
    return tree_of(sources, files), files


def chosen(path: str, before: bytes | None = b"x = 1\n", after: bytes | None = b"x = 2\n") -> Selection:
    return choose(*tree(), [Changed(path, before, after)])


def test_without_a_change_nothing_is_run():
    assert choose(*tree(), []) == Selection()


COMMENT = b"x = 1  # one\n", b"x = (1)\n# two\n"


def test_comments_and_layout_ask_for_nothing():
    assert chosen("dualpipe/timeline/simulate.py", *COMMENT) == Selection()


def test_a_change_of_mode_asks_for_everything():
    changed = [Changed(".ci/run", b"x", b"x", "100755 -> 100644")]
    assert ".ci/run changes its mode, 100755 -> 100644" in choose(*tree(), changed).everything


def test_a_comment_where_the_museum_plants_a_fault_asks_whether_it_still_finds_the_place():
    """A text that it replaces may have a comment: `# each lane` in dualpipe/megatron/computation.py is in one."""
    found = chosen("dualpipe/megatron/computation.py", *COMMENT)
    assert list(found.tests) == [PLANTING]
    assert found == Selection(tests=found.tests)
    assert {PLANTING, MUSEUM} & chosen(
        "dualpipe/schedule/generate.py", TABLE, TABLE.replace(b"F0", b"F0 SF0")
    ).tests.keys()
    page = next(path for path in PLANTED if path.endswith(".md"))
    assert PLANTING in chosen(page, b"a", b"b").tests


def test_that_test_of_the_museum_is_there_and_left_out_where_it_is_not():
    assert f"def {PLANTING.partition('::')[2]}(" in (ROOT / MUSEUM).read_text()
    files = [path for path in tree()[1] if path != MUSEUM]  # as in the museum's own clones
    assert choose(tree()[0], files, [Changed("dualpipe/runtime/executor.py", *COMMENT)]) == Selection()


def test_what_executes_asks_for_trials_and_the_tests_of_production():
    found = chosen("dualpipe/runtime/executor.py")
    assert found.trial
    assert not found.prove
    assert not found.theorems
    assert "tests/production/test_faults.py" in found.tests
    assert "tests/schedule/test_generate.py" not in found.tests


def test_the_glue_to_megatron_asks_for_its_trial_and_a_change_of_what_executes_for_both():
    found = chosen("dualpipe/megatron/losses.py")
    assert found.megatron
    assert not found.trial
    assert chosen("dualpipe/runtime/executor.py").megatron
    assert not chosen("dualpipe/timeline/picture.py").megatron


def test_a_change_of_a_proof_asks_for_the_checks_that_use_it():
    found = chosen("proofs/search.py")
    assert found.prove
    assert not found.trial
    assert "tests/proofs/test_museum.py" in found.tests
    assert chosen("proofs/theorems/messages.py").theorems


def test_the_vocabulary_asks_for_everything_that_judges():
    found = chosen("dualpipe/schedule/value.py")
    assert found.prove
    assert found.theorems
    assert found.trial


@pytest.mark.parametrize("before", [None, b"x = 1"])
def test_of_a_test_that_changed_itself_the_long_tests_are_run_too(before):
    path = "tests/proofs/theorems/test_mutants.py"
    found = chosen(path, before, b"x = 2")
    assert found.long == (path,)
    assert path in found.tests
    assert chosen(path, *COMMENT).long == chosen("proofs/search.py").long == ()
    assert choose(*tree(), [Changed(path, before, b"x = 2"), Changed("pyproject.toml", b"a", b"b")]).long == (path,)


def test_the_nearest_tests_come_first():
    first = next(iter(choose(*tree(), [Changed("dualpipe/runtime/weightgrad.py", b"x = 1", b"x = 2")]).tests))
    assert first in ("tests/production/test_weightgrad.py", "tests/test_architecture.py")


def test_of_tests_as_near_the_one_that_uses_least_comes_first():
    files = {"tests/test_b.py": "import m\n", "tests/test_a.py": "import m, n, o\n", "m.py": "", "n.py": "", "o.py": ""}
    few = tree_of({path: read(text) for path, text in files.items()}, list(files))
    assert list(choose(few, list(files), [Changed("m.py", b"x = 1", b"x = 2")]).tests) == [
        "tests/test_b.py",
        "tests/test_a.py",
    ]


def test_a_page_of_text_asks_for_the_tests_that_name_it_and_no_more():
    found = chosen("docs/decisions/0002-the-phase-table.md", b"a", b"b")
    assert (found.prove, found.theorems, found.trial, found.everything) == ("", "", "", "")
    page = "docs/decisions/0002-the-phase-table.md"
    assert f"tests/docs/test_documentation.py::test_what_the_document_says_happens[{page}]" in found.tests
    assert "tests/docs/test_documentation.py" not in found.tests


@pytest.mark.parametrize("page", ["docs/reference/python.md", "docs/reference/cli.md"])
def test_a_page_that_is_made_asks_for_the_test_that_makes_it_again(page):
    """It is named by what makes it, which is no test: a sentence added by hand must not pass."""
    assert "tests/docs/test_reference.py" in chosen(page, b"a", b"b").tests


def test_a_page_that_is_only_run_does_not_ask_for_the_run_of_all():
    found = chosen("docs/tutorial.md", b"a", b"b").tests
    assert {"tests/docs/test_reference.py", "tests/docs/test_snippets.py", DOCUMENTATION}.isdisjoint(found)
    assert not [test for test in found if test.startswith("tests/ci/")]  # where this very file names it


def test_the_links_of_all_pages_are_followed_as_a_heading_may_be_gone_that_another_page_leads_to():
    found = chosen("docs/explanation/numerics.md", b"a", b"b").tests
    assert {f"{DOCUMENTATION}::test_every_link_leads_somewhere", LINKS} <= found.keys()


def test_the_tests_that_run_a_page_are_there():
    assert (ROOT / LINKS).exists()
    assert (ROOT / PAGES_READ).exists()
    source = (ROOT / DOCUMENTATION).read_text()
    for test in PAGE_TESTS:
        assert f"def {test.partition('[')[0]}(" in source


def test_golden_schedules_ask_for_the_tests_that_read_them_without_the_runtime():
    found = chosen("tests/golden/dualpipe-P4-M8.txt", b"a", b"b")
    assert "tests/schedule/test_generate.py" in found.tests
    assert "tests/cli/test_prove.py" not in found.tests
    assert not found.everything
    assert "tests/schedule/test_torchcsv.py" in chosen("tests/golden/torch-zbv-4x8.csv", b"a", b"b").tests


def test_the_counts_of_the_theorems_ask_for_the_theorems_alone():
    found = chosen("tests/golden/theorems.txt", b"a", b"b")
    assert found == Selection(theorems="tests/golden/theorems.txt changed")


@pytest.mark.parametrize(
    ("path", "before", "after", "why"),
    [
        ("pyproject.toml", b"a", b"b", "decides what everything runs on"),
        ("constraints.txt", b"a", b"b", "decides what everything runs on"),
        ("ci/gate.py", b"a", b"b", "the gate's own"),
        ("tests/ci/test_gate.py", b"a", b"b", "the gate's own"),
        ("dualpipe/gone.py", b"a", None, "is deleted"),
        ("dualpipe/weights.bin", None, b"b", "nothing is known of"),
    ],
)
def test_what_the_map_does_not_know_asks_for_everything(path, before, after, why):
    found = chosen(path, before, after)
    assert why in found.everything
    assert found.prove
    assert found.theorems
    assert found.trial
    assert {"tests/production/test_equality.py", "tests/proofs/test_checks.py"} <= found.tests.keys()


UNREAD = {"license": "a text that nothing reads"}
"""In small letters: this file would read what it names."""


def test_a_change_of_any_file_asks_for_something_that_uses_it():
    """More than the test that reads every source, and less than everything, which is for what nothing is known of."""
    for_all = (*BUILD, "ci/", "tests/ci/")
    found = {path: chosen(path) for path in tree()[1] if not path.startswith(for_all)}
    unseen = {path for path, selection in found.items() if selection.everything or not runs_what_uses_it(selection)}
    assert {path.lower() for path in unseen - {SOURCES_READ}} == set(UNREAD)


def runs_what_uses_it(found: Selection) -> bool:
    return any((found.prove, found.theorems, found.trial, found.megatron)) or bool(found.tests.keys() - {SOURCES_READ})


@pytest.mark.parametrize(
    ("path", "test"),
    [
        ("dualpipe/page/paint.js", "tests/page/test_browser.py"),
        ("dualpipe/page/paint.js", "tests/page/test_render.py"),
        ("dualpipe/record/child/startup.py", "tests/record/test_hand_written.py"),
        ("dualpipe/record/child/marks.py", "tests/record/test_torch.py"),
        ("examples/gpt_data.py", "tests/megatron/test_example.py"),
        ("tests/record/programs/gpipe.py", "tests/record/test_hand_written.py"),
        ("bench/soundness.py", "tests/test_bench.py"),
    ],
)
def test_what_is_run_by_its_path_asks_for_the_tests_that_run_it(path, test):
    assert test in chosen(path).tests


def test_a_source_that_nothing_but_the_reading_of_every_source_uses_asks_for_everything():
    files = {"app.py": "", "app.js": "", SOURCES_READ: 'FILES = (ROOT / "app.py", ROOT / "app.js")\n'}
    few = tree_of({path: read(text) for path, text in files.items() if path.endswith(".py")}, list(files))
    for path in ("app.py", "app.js"):
        assert "nothing is known of" in choose(few, list(files), [Changed(path, b"x = 1", b"x = 2")]).everything


TABLE = b'T: Table = (Row("1", 1, "F0"),)\ndef f():\n    return T\n'


def test_a_change_of_the_tables_alone_leaves_the_tests_of_the_runtime_out():
    found = chosen("dualpipe/schedule/generate.py", TABLE, TABLE.replace(b'"F0"', b'"F0 SF0"'))
    assert found.theorems == "the phase tables changed"
    assert "tests/schedule/test_generate.py" in found.tests
    assert "tests/production/test_equality.py" not in found.tests
    whole = chosen("dualpipe/schedule/generate.py", TABLE, TABLE.replace(b"def f", b"def g"))
    assert "tests/production/test_equality.py" in whole.tests


def test_what_a_change_means():
    assert meaning(TABLE, TABLE + b"# nothing\n") is Meaning.NOTHING
    assert meaning(TABLE, TABLE.replace(b"1,", b"2,")) is Meaning.TABLES
    assert meaning(TABLE, TABLE.replace(b"return T", b"return ()")) is Meaning.CODE
    assert meaning(TABLE, TABLE.replace(b"T: Table", b"S: Table")) is Meaning.CODE
    assert meaning(TABLE, b"this is no python") is Meaning.CODE
