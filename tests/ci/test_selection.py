"""Which checks and tests a change needs, in this repository."""

import ast
from functools import cache
from pathlib import Path

import pytest

from ci.extent import Extent, extent
from ci.faults.collection import FAULTS, HARMLESS
from ci.repository import Changed, Repository
from ci.selection import CHECKS, PAGE_TESTS, ROWS, Row
from ci.selector import ARCHITECTURE, FAULTS_FIT, Selection, is_test, row_of_path, select
from tests.ci.conftest import ROOT
from tests.docs.snippets import documents

FILES = Repository(ROOT).files()
TESTS = [path for path in FILES if is_test(path)]
PYTHON = frozenset(path for path in FILES if path.endswith(".py"))
CODE = b"x = 1\n", b"x = 2\n"
COMMENT = b"x = 1  # one\n", b"x = (1)\n# two\n"
TABLE = b'T: Table = (Row("1", 1, "F0"),)\ndef f():\n    return T\n'
OTHER_ROW = TABLE.replace(b'"F0"', b'"F0 SF0"')


def selected(path: str, before: bytes | None = CODE[0], after: bytes | None = CODE[1], mode: str = "") -> Selection:
    return select(FILES, [Changed(path, before, after, mode)])


def test_without_a_change_nothing_runs():
    assert select(FILES, []) == Selection()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_the_check_that_must_refuse_a_fault_runs_on_it(fault, tmp_path):
    paths = {edit.path for edit in fault.plant.edits}
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    fault.plant(tmp_path)
    changed = [Changed(path, (ROOT / path).read_bytes(), (tmp_path / path).read_bytes()) for path in sorted(paths)]
    found = select(FILES, changed)
    check = fault.checks[0].partition("/")[0]
    if check == "tests":
        assert homes_of(fault.says) <= set(found.tests)
    elif check not in ("prove", "generator"):  # which run on every changed schedule
        assert check in found.checks


@cache
def text_of(path: str) -> str:
    return (ROOT / path).read_text()


def homes_of(says: str) -> set[str]:
    """The files of the tests that a fault names; the gate stops at the first that fails."""
    names = [test.partition(".*")[0] for test in says.split("|")]
    return {next(path for path in TESTS if f"def {name}(" in text_of(path)) for name in names}


@cache
def imports(path: str) -> frozenset[str]:
    """The files of this repository that a source imports, also within functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text_of(path))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            package = ".".join(Path(path).parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, [package, node.module]))
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        for name in names:
            names_of_files = (f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py")
            found |= {file for file in names_of_files if file in PYTHON}
    return frozenset(found)


@cache
def uses(test: str) -> frozenset[str]:
    """The files that a test imports, directly or not, with the conftest files of its folders; not through the gate,
    which imports nothing of the tree but in other processes."""
    above = [str(folder / "conftest.py") for folder in Path(test).parents]
    waiting, found = [test, *(path for path in above if path in FILES)], set()
    while waiting:
        path = waiting.pop()
        if path not in found and not path.startswith("ci/"):
            found.add(path)
            waiting += imports(path)
    return frozenset(found)


def test_a_source_needs_every_test_that_imports_it():
    """Of the gate's own tests the table names those that look at the tree itself."""
    missing = {}
    for path in PYTHON:
        importing = {test for test in TESTS if path in uses(test) and not test.startswith("tests/ci/")}
        if not path.startswith("ci/") and (lacking := importing - set(selected(path).tests)):
            missing[path] = lacking
    assert missing == {}


@pytest.mark.parametrize(
    ("check", "start"),
    [
        ("prove", "proofs/prove.py"),
        ("theorems", "proofs/theorems/prove.py"),
        ("trial", "reference/verify.py"),
        ("trial, Megatron", "reference/megatron/verify.py"),
    ],
)
def test_a_source_needs_every_check_that_imports_it(check, start):
    assert [path for path in sorted(uses(start)) if check not in selected(path).checks] == []


def test_every_row_names_tests_that_exist_and_is_of_some_file():
    for prefix, row in ROWS.items():
        assert any(path.startswith(prefix) for path in FILES), prefix
        assert set(row.checks) <= set(CHECKS)
        for entry in (*row.near, *row.far):
            file, _, test = entry.partition("::")
            assert (ROOT / file).exists(), entry
            assert not test or f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(), entry
    file, _, test = FAULTS_FIT.partition("::")
    assert f"def {test}(" in (ROOT / file).read_text()


def test_every_file_has_a_row_or_needs_everything_by_name():
    assert [path for path in FILES if "has no row" in selected(path).everything] == []


def test_every_folder_of_tests_runs_for_some_source():
    near = {entry.split("/")[1] for row in ROWS.values() for entry in row.near}
    assert {path.split("/")[1] for path in TESTS if path.count("/") > 1} - near <= {"ci"}


def test_comments_and_layout_need_nothing():
    assert selected("dualpipe/timeline/simulate.py", *COMMENT) == Selection()


def test_a_comment_in_a_file_with_planted_faults_needs_the_test_that_finds_their_texts():
    """A replaced text may include a comment: `# each lane` in dualpipe/megatron/computation.py does."""
    assert selected("dualpipe/megatron/computation.py", *COMMENT) == Selection(tests=(FAULTS_FIT,))
    assert FAULTS_FIT in selected("dualpipe/schedule/generate.py", TABLE, OTHER_ROW).tests
    page = next(fault.path for fault in HARMLESS if fault.path.endswith(".md"))
    assert FAULTS_FIT in selected(page).tests


def test_a_tree_without_the_gates_own_tests_selects_none_of_them():
    clone = [path for path in FILES if not path.startswith("tests/ci/")]
    assert select(clone, [Changed("dualpipe/runtime/executor.py", *COMMENT)]) == Selection()


def test_the_runtime_needs_trials_and_the_tests_of_production_first():
    found = selected("dualpipe/runtime/weightgrad.py")
    assert set(found.checks) == {"trial", "trial, Megatron"}
    assert found.tests[0] == "tests/production/test_weightgrad.py"
    assert "tests/schedule/test_generate.py" not in found.tests
    assert ARCHITECTURE in found.tests


def test_a_proof_needs_prove_and_a_theorem_the_theorems():
    assert "trial" not in selected("proofs/search.py").checks
    assert set(selected("proofs/search.py").checks) == {"prove"}
    assert set(selected("proofs/theorems/messages.py").checks) == {"theorems"}
    assert set(selected("proofs/findings.py").checks) == {"prove", "theorems"}


def test_the_schedule_value_needs_every_check_and_every_test():
    found = selected("dualpipe/schedule/value.py")
    assert set(found.checks) == set(CHECKS)
    assert set(found.tests) == set(TESTS)


def test_a_change_of_phase_tables_alone_leaves_out_the_tests_of_the_runtime():
    found = selected("dualpipe/schedule/generate.py", TABLE, OTHER_ROW)
    assert set(found.checks) == {"theorems"}
    assert "tests/schedule/test_generate.py" in found.tests
    assert "tests/production/test_equality.py" not in found.tests
    code = selected("dualpipe/schedule/generate.py", TABLE, TABLE.replace(b"def f", b"def g"))
    assert "tests/production/test_equality.py" in code.tests


@pytest.mark.parametrize("before", [None, b"x = 1"])
def test_of_a_changed_test_the_long_tests_run_too(before):
    path = "tests/proofs/theorems/test_mutants.py"
    found = selected(path, before, b"x = 2")
    assert found.long == (path,)
    assert found.tests == (path, ARCHITECTURE)
    assert selected(path, *COMMENT).long == selected("proofs/search.py").long == ()
    assert select(FILES, [Changed(path, before, b"x = 2"), Changed("pyproject.toml", b"a", b"b")]).long == (path,)


def test_a_page_needs_its_own_run_and_the_links_of_all_pages():
    page = "docs/explanation/numerics.md"
    assert selected(page).tests == tuple(test.format(page=page) for test in PAGE_TESTS)
    assert selected(page).checks == {}
    assert "tests/docs/test_reference.py" in selected("docs/reference/cli.md").tests


def test_the_pages_that_need_a_run_of_their_own_are_those_that_have_one():
    """pytest ends without a result if it is asked for the run of a page that it does not collect."""
    own_run = PAGE_TESTS[0]
    needing = [path for path in FILES if own_run.format(page=path) in selected(path).tests]
    assert sorted(needing) == sorted(str(page.relative_to(ROOT)) for page in documents())


def test_a_golden_schedule_needs_the_tests_of_schedules_and_the_counts_only_the_theorems():
    assert all(path.startswith("tests/schedule/") for path in selected("tests/golden/dualpipe-P4-M8.txt").tests)
    assert set(selected("tests/golden/theorems.txt").checks) == {"theorems"}
    assert selected("tests/golden/theorems.txt").tests == ()


@pytest.mark.parametrize(
    ("path", "before", "after", "mode", "why"),
    [
        ("pyproject.toml", b"a", b"b", "", "the gate's own, or decides what everything runs on"),
        ("ci/gate.py", b"a", b"b", "", "the gate's own"),
        ("tests/ci/test_gate.py", b"a", b"b", "", "the gate's own"),
        ("dualpipe/gone.py", b"a", None, "", "is deleted"),
        ("README.md", b"a", b"a", "100755 -> 100644", "README.md changes its mode, 100755 -> 100644"),
        ("somewhere/weights.bin", None, b"b", "", "has no row in ci/selection.py"),
    ],
)
def test_what_the_table_does_not_know_needs_everything(path, before, after, mode, why):
    found = selected(path, before, after, mode)
    assert why in found.everything
    assert set(found.checks) == set(CHECKS)
    assert set(found.tests) == set(TESTS)


def test_the_longest_prefix_counts():
    assert row_of_path("dualpipe/unheard_of.py") is ROWS["dualpipe/"]
    assert row_of_path("dualpipe/runtime/executor.py") is ROWS["dualpipe/runtime/"]
    assert selected("LICENSE") == Selection()
    assert ROWS["LICENSE"] == Row()


def test_the_extent_of_a_change():
    assert extent(TABLE, TABLE + b"# nothing\n") is Extent.LAYOUT
    assert extent(TABLE, TABLE.replace(b"1,", b"2,")) is Extent.TABLES
    assert extent(TABLE, TABLE.replace(b"return T", b"return ()")) is Extent.CODE
    assert extent(TABLE, TABLE.replace(b"T: Table", b"S: Table")) is Extent.CODE
    assert extent(TABLE, b"this is no python") is Extent.CODE
