"""The location of a finding in the sources: the row of the phase table that made a slot of a schedule."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TABLES, THEOREMS = "dualpipe/schedule/generate.py", "proofs/theorems"
BOUNDS = ("live", "memory", "pending")
"""The theorems that only claim a family's bound, which has the theorem's name."""


@dataclass(frozen=True)
class Location:
    """A line of a source; ``what`` names it for a reader."""

    path: str
    line: int
    what: str = ""


NOWHERE = Location("", 1)


@dataclass(frozen=True)
class Locator:
    """Locates findings.

    Parameters
    ----------
    rows:
        Which row made each op, as ``ci.child.expand`` gives it.
    lines:
        The line of each table's rows in ``dualpipe/schedule/generate.py``.
    changed:
        The lines of that file that the change touches.  A finding with several locations gets one of these if it can.
    cause:
        The first changed line of the change, for findings without another location.
    """

    rows: Mapping[str, Any]
    lines: Mapping[tuple[str, str], int]
    changed: frozenset[int]
    cause: Location

    def locate(self, schedule: str, data: Mapping[str, Any]) -> Location:
        """The location of a finding as ``prove`` gives it."""
        found = [location for rank, slot in _slots(data) for location in self._made_by(schedule, rank, slot)]
        touched = [location for location in found if location.line in self.changed]
        return next(iter([*touched, *found]), self.cause)

    def _made_by(self, schedule: str, rank: int, slot: int) -> Iterator[Location]:
        made = self.rows.get(schedule)
        if made is None or not 0 <= rank < len(made["ranks"]) or not 0 <= slot < len(made["ranks"][rank]):
            return
        for number in dict.fromkeys(made["ranks"][rank][slot]):
            table, row = made["rows"][number]
            line = self.lines.get((table, row))
            if line is not None:
                yield Location(TABLES, line, f"row {row!r} of {table}")


def bounds_in(root: Path) -> Callable[[str, str], Location]:
    """A function that locates the bound of a name in the source of a family."""
    sources = {file: file.read_text(errors="replace") for file in sorted((root / THEOREMS).glob("*.py"))}

    def find(family: str, bound: str) -> Location:
        for file, source in sources.items():
            name = family.partition("-late-")[0]  # the variants with late W have the same bounds
            if f'"{name}"' in source and "Bounds(" in source:
                return Location(f"{THEOREMS}/{file.name}", _bound(source.splitlines(), name, bound))
        return Location(THEOREMS, 1)

    return find


def _bound(lines: Sequence[str], family: str, bound: str) -> int:
    """The line of a family's bound: the last one above the family's name, else the first one below."""
    written = [n for n, line in enumerate(lines, 1) if line.strip().startswith(f"{bound}=")]
    named = next(n for n, line in enumerate(lines, 1) if f'"{family}"' in line)
    return max((n for n in written if n < named), default=min(written, default=named))


def lines_of_rows(source: str) -> dict[tuple[str, str], int]:
    """The line of each table's rows; a variant has its own rows and those of the tables it is made of."""
    found: dict[tuple[str, str], int] = {}
    for node in ast.parse(source).body:
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if value else []  # type: ignore[attr-defined]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if value is None or not names:
            continue
        reader = _Rows()
        reader.visit(value)
        inherited = {
            row: line for read in reader.tables for (table, row), line in found.items() if table == read
        }  # of two tables that are read, the second replaces rows of the first
        for name in names:
            found |= {(name, row): line for row, line in (inherited | reader.own).items()}
    return found


@dataclass
class _Rows(ast.NodeVisitor):
    """The rows written in an expression, and the names of the tables that it takes others from."""

    own: dict[str, int] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "Row" and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                self.own[first.value] = node.lineno
            return
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.tables.append(node.id)


def _slots(data: Any) -> Iterator[tuple[int, int]]:
    """Every rank and slot in a finding, in its order."""
    if isinstance(data, Mapping):
        rank, slot = data.get("rank"), data.get("slot")
        if isinstance(rank, int) and isinstance(slot, int):
            yield rank, slot
        for value in data.values():
            yield from _slots(value)
    elif isinstance(data, Sequence) and not isinstance(data, str):
        for value in data:
            yield from _slots(value)
