"""What a change of a Python file means: nothing, only the phase tables, or code."""

from __future__ import annotations

import ast
from enum import Enum


class Meaning(Enum):
    """How far a change of a source goes."""

    NOTHING = "comments and layout"
    TABLES = "phase tables"
    CODE = "code"


def meaning(before: bytes, after: bytes) -> Meaning:
    """Compare two versions of a source.  A source that does not parse counts as code."""
    try:
        old, new = ast.parse(before), ast.parse(after)
    except (SyntaxError, ValueError):
        return Meaning.CODE
    if ast.dump(old) == ast.dump(new):
        return Meaning.NOTHING
    if _tables(old) and ast.dump(_without_tables(old)) == ast.dump(_without_tables(new)):
        return Meaning.TABLES
    return Meaning.CODE


def _is_table(node: ast.stmt) -> bool:
    """``NAME: Table = ...`` at the top level."""
    return isinstance(node, ast.AnnAssign) and isinstance(node.annotation, ast.Name) and node.annotation.id == "Table"


def _tables(tree: ast.Module) -> list[ast.stmt]:
    return [node for node in tree.body if _is_table(node)]


def _without_tables(tree: ast.Module) -> ast.Module:
    """The module with each table's rows taken out; their names and places stay."""
    body = [
        ast.AnnAssign(node.target, node.annotation, None, node.simple)
        if isinstance(node, ast.AnnAssign) and _is_table(node)
        else node
        for node in tree.body
    ]
    return ast.Module(body, tree.type_ignores)
