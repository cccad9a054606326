"""The museum's page is true: all faults are there, and whatever a row names exists and has its number."""

import ast
import re
from functools import cache
from typing import NamedTuple

import pytest

from ci.museum.collection import EXHIBITS as GATE
from tests.docs.snippets import ROOT
from tests.megatron.museum import FAULTS
from tests.proofs.museum import EXHIBITS

PAGE = ROOT / "docs" / "reference" / "museum.md"
KNOWN = 38
CHECKS = {"complete", "order", "messages", "deadlock", "memory", "accumulation"}


class Row(NamedTuple):
    """A line of the table; ``shown`` are the names that show it with the files they are in; ``gate``: planted there."""

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
def test_a_row_says_what_where_and_how_and_what_it_names_exists(row):
    assert len(row.fault.split()) > 3
    assert row.seen_in
    assert row.caught_by
    assert row.shown
    assert absent(row) == []


def test_an_exhibit_of_the_glue_is_in_the_row_of_its_number():
    shown = {(row.number, name) for row in ROWS for name, path in row.shown if path == "tests/megatron/museum.py"}
    assert shown == {(fault.number, fault.plant.__name__) for fault in FAULTS}


def test_an_exhibit_of_the_proofs_is_shown_with_the_checks_that_refute_it():
    shown = {name: row for row in ROWS for name, path in row.shown if path == "tests/proofs/museum.py"}
    assert set(shown) == {exhibit.plant.__name__ for exhibit in EXHIBITS}
    for exhibit in EXHIBITS:
        row = shown[exhibit.plant.__name__]
        assert row.seen_in == exhibit.seen_in
        assert set(re.findall(r"`(\w+)`", row.caught_by)) & CHECKS == set(exhibit.checks)


def test_the_faults_that_the_gate_is_tried_with_are_marked():
    assert {row.number for row in ROWS if row.gate} == {exhibit.number for exhibit in GATE} - {0}


def test_a_row_that_names_nothing_real_is_noticed():
    planted = "| 4 | two sends swapped | seen | messages | [`test_it`](../../tests/proofs/test_museum.py) | |"
    assert absent(rows(planted)[0]) == ["tests/proofs/test_museum.py: test_it"]
    assert absent(rows(planted.replace("test_museum", "missing"))[0]) == ["tests/proofs/missing.py: test_it"]
