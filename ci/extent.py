"""How far a change to a Python file goes: layout only, only the phase tables, or code."""

from __future__ import annotations

import ast
from enum import Enum


class Extent(Enum):
    """What a change to a source touches."""

    LAYOUT = "comments and layout"
    TABLES = "phase tables"
    CODE = "code"


def extent(before: bytes, after: bytes) -> Extent:
    """Compare two versions of a source.  A source that does not parse counts as code."""
    try:
        old, new = ast.parse(before), ast.parse(after)
    except (SyntaxError, ValueError):
        return Extent.CODE
    if ast.dump(old) == ast.dump(new):
        return Extent.LAYOUT
    if any(map(_is_table, old.body)) and ast.dump(_without_tables(old)) == ast.dump(_without_tables(new)):
        return Extent.TABLES
    return Extent.CODE


def _is_table(node: ast.stmt) -> bool:
    """``NAME: Table = ...`` at the top level."""
    return isinstance(node, ast.AnnAssign) and isinstance(node.annotation, ast.Name) and node.annotation.id == "Table"


def _without_tables(tree: ast.Module) -> ast.Module:
    """The module without the rows of its tables; the names of the tables and their positions stay."""
    body = [
        ast.AnnAssign(node.target, node.annotation, None, node.simple)
        if isinstance(node, ast.AnnAssign) and _is_table(node)
        else node
        for node in tree.body
    ]
    return ast.Module(body, tree.type_ignores)
