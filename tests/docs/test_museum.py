"""The museum's page lists every known fault, and each name in a row exists and has the row's number."""

import ast
import re
from functools import cache
from typing import NamedTuple

import pytest

from ci.faults.collection import FAULTS as SOURCE_FAULTS
from tests.docs.snippets import ROOT
from tests.megatron.faults import FAULTS as MEGATRON_FAULTS
from tests.proofs.faults import FAULTS as SCHEDULE_FAULTS

PAGE = ROOT / "docs" / "reference" / "museum.md"
KNOWN = 38
CHECKS = {"complete", "order", "messages", "deadlock", "memory", "accumulation"}


class Row(NamedTuple):
    """A row of the table.  ``shown`` are functions with their files; ``gate``: also planted in the sources."""

    number: int
    fault: str
    seen_in: str
    caught_by: str
    shown: tuple[tuple[str, str], ...]
    gate: bool


def rows(text: str) -> list[Row]:
    found = []
    for line in text.splitlines():
        if re.match(r"\| *[0-9]+ \|", line):
            number, fault, seen_in, caught_by, shown, gate = (cell.strip() for cell in line.strip("|").split("|"))
            links = re.findall(r"\[`(\w+)`\]\(\.\./\.\./([\w/.]+)\)", shown)
            found.append(Row(int(number), fault, seen_in, caught_by, tuple(links), gate == "✓"))
    return found


@cache
def functions(path: str) -> set[str]:
    """The functions that a file of the project defines at its top level; none where there is no such file."""
    file = ROOT / path
    return (
        {n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef)} if file.exists() else set()
    )


def absent(row: Row) -> list[str]:
    return [f"{path}: {name}" for name, path in row.shown if name not in functions(path)]


ROWS = rows(PAGE.read_text())


def test_every_known_fault_has_one_row():
    assert [row.number for row in ROWS] == list(range(1, KNOWN + 1))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.number}")
def test_a_row_is_complete_and_the_functions_it_names_exist(row):
    assert len(row.fault.split()) > 3
    assert row.seen_in
    assert row.caught_by
    assert row.shown
    assert absent(row) == []


@pytest.mark.parametrize(
    ("files", "faults"), [("tests/megatron/faults", MEGATRON_FAULTS), ("tests/proofs/faults", SCHEDULE_FAULTS)]
)
def test_a_planted_fault_is_in_the_row_of_its_number(files, faults):
    shown = {(row.number, name) for row in ROWS for name, path in row.shown if path.startswith(files)}
    assert shown == {(fault.number, fault.plant.__name__) for fault in faults}


def test_the_row_of_a_schedules_fault_names_the_checks_that_refute_it():
    for fault in SCHEDULE_FAULTS:
        assert set(re.findall(r"`(\w+)`", ROWS[fault.number - 1].caught_by)) & CHECKS == set(fault.checks)


def test_the_faults_planted_in_the_sources_are_marked():
    assert {row.number for row in ROWS if row.gate} == {fault.number for fault in SOURCE_FAULTS} - {0}


def test_a_row_with_a_missing_function_is_found():
    planted = "| 4 | two sends swapped | seen | messages | [`test_it`](../../tests/proofs/test_planted_faults.py) | |"
    assert absent(rows(planted)[0]) == ["tests/proofs/test_planted_faults.py: test_it"]
    assert absent(rows(planted.replace("test_planted_faults", "missing"))[0]) == ["tests/proofs/missing.py: test_it"]
