"""Changes to a source that change its meaning, and a random sample of them."""

from __future__ import annotations

import ast
import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ci import GateError

PACKAGES = ("dualpipe/", "proofs/", "reference/")
PRESENTATION = (
    "dualpipe/page/",
    "dualpipe/timeline/palette.py",
    "dualpipe/timeline/picture.py",
    "dualpipe/timeline/terminal.py",
)
"""Modules that only draw: no test could decide which sizes and colours are right."""

_TEXTS = frozenset({"__repr__", "__str__", "describe", "told"})
"""Functions that only write text for a reader."""

_DROP = "drop statement"
_UNUSED = ("VariableReplacer", "VariableInserter", "_Is_Eq", "_IsNot_NotEq", "_Eq_Is", "_NotEq_IsNot")
"""Operators of cosmic-ray that need arguments, or exchange identity and equality: of ``None`` and of members of an
enumeration, which is all that these sources compare by identity, they are the same."""

Position = tuple[int, int]


@dataclass(frozen=True)
class Mutant:
    """One changed source: ``source`` is the whole text of the file after the change."""

    path: str
    line: int
    operator: str
    source: str

    def diff(self, original: str) -> str:
        """The change, without the lines around it."""
        lines = difflib.unified_diff(original.splitlines(), self.source.splitlines(), lineterm="", n=0)
        return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


@dataclass(frozen=True)
class _Change:
    """An operator, and the occurrence in the file that it changes, which cosmic-ray counts from 0."""

    operator: str
    occurrence: int
    start: Position
    end: Position


def sources(root: Path, tracked: Iterable[str], files: Sequence[str]) -> list[str]:
    """The sources to mutate: those of ``PACKAGES`` except ``PRESENTATION``, or of ``files`` (prefixes of paths)."""
    wanted = tuple(files) or PACKAGES
    found = [path for path in tracked if path.endswith(".py") and path.startswith(PACKAGES) and path.startswith(wanted)]
    if not files:
        found = [path for path in found if not path.startswith(PRESENTATION)]
    found = [path for path in found if (root / path).is_file()]
    if not found:
        raise GateError(
            f"mutants are drawn from the sources in {', '.join(PACKAGES)}",
            f"no file there begins with {' or '.join(wanted)}",
            "give paths or folders, such as FILES=dualpipe/schedule/lower.py",
        )
    return found


def sample(texts: Mapping[str, str], count: int, seed: int) -> list[Mutant]:
    """``count`` mutants of the sources ``{path: text}``, the same for the same seed and texts.

    Every position has the same chance, and one of its possible changes is drawn: otherwise additions, each of which
    can become eleven other operators, would crowd out the rest.
    """
    random = Random(seed)
    positions = [(path, options) for path in sorted(texts) for options in _positions(texts[path])]
    drawn: list[Mutant] = []
    for path, options in random.sample(positions, len(positions)):
        if len(drawn) == count:
            break
        change = random.choice(options)
        source = _apply(texts[path], change)
        if source != texts[path] and _compiles(source):
            drawn.append(Mutant(path, change.start[0], change.operator, source))
    return drawn


def _positions(text: str) -> list[list[_Change]]:
    """The possible changes to a source, by position."""
    excluded = list(_excluded(text))
    found: dict[tuple[Position, Position], list[_Change]] = defaultdict(list)
    for change in [*_of_cosmic_ray(text), *_dropped(text)]:
        if not any(start <= change.start and change.end <= end for start, end in excluded):
            found[change.start, change.end].append(change)
    return [found[key] for key in sorted(found)]


def _of_cosmic_ray(text: str) -> Iterator[_Change]:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    nodes = list(ast_nodes(get_ast(text)))
    for name in operator_names():
        if name.endswith(_UNUSED):
            continue
        operator = get_operator(name)()
        positions = (position for node in nodes for position in operator.mutation_positions(node))
        for occurrence, (start, end) in enumerate(positions):
            yield _Change(name, occurrence, start, end)


def _dropped(text: str) -> Iterator[_Change]:
    """Statements with side effects only, each of which can become ``pass``."""
    for node in ast.walk(ast.parse(text)):
        call = isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.YieldFrom))
        assigned = isinstance(node, ast.Assign) and all(isinstance(target, ast.Attribute) for target in node.targets)
        if call or assigned or isinstance(node, (ast.AugAssign, ast.Raise, ast.Delete)):
            yield _Change(_DROP, 0, *_extent(node, text))


def _apply(text: str, change: _Change) -> str:
    if change.operator != _DROP:
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator

        return mutate_code(text, get_operator(change.operator)(), change.occurrence) or text
    lines = text.splitlines(keepends=True)
    (first, left), (last, right) = change.start, change.end
    kept = lines[first - 1][:left] + "pass" + lines[last - 1][right:]
    return "".join([*lines[: first - 1], kept, *lines[last:]])


def _excluded(text: str) -> Iterator[tuple[Position, Position]]:
    """Parts without meaning at run time, and texts: annotations, f-strings, code that only type checkers read."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.name in _TEXTS or _named(node.decorator_list, "overload"):
                yield _extent(node, text)
            elif node.returns is not None:
                yield _extent(node.returns, text)
        elif isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            yield _extent(node.annotation, text)
        elif (
            isinstance(node, ast.JoinedStr)
            or (isinstance(node, ast.If) and _named([node.test], "TYPE_CHECKING"))
            or (isinstance(node, ast.ClassDef) and _named(node.bases, "Protocol"))
        ):
            yield _extent(node, text)


def _named(nodes: Iterable[ast.expr], name: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == name for node in nodes)


def _extent(node: ast.AST, text: str) -> tuple[Position, Position]:
    """The first and the last position, in characters; ast counts bytes."""
    lines = text.splitlines()

    def in_characters(line: int, column: int) -> Position:
        return line, len(lines[line - 1].encode()[:column].decode())

    return (
        in_characters(node.lineno, node.col_offset),  # type: ignore[attr-defined]
        in_characters(node.end_lineno, node.end_col_offset),  # type: ignore[attr-defined]
    )


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except (SyntaxError, ValueError):
        return False
    return True
