"""Who imports whom, read from the sources: what a changed file reaches.

A node is a file, an edge goes from the one that uses to the one that is used.  What counts as use:

* an import, wherever it stands;
* a module's name in a string, for scripts that are run in a process of their own;
* for a file that is not Python, its name or its folder's name in a string;
* for a test, the ``conftest.py`` of its folder and of those above.

A package's ``__init__.py`` is two nodes.  Whoever imports a module inside the package runs the file, and depends on
its text alone; whoever takes a name from the package depends on all that it imports.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import TypeAlias

import networkx as nx

Graph: TypeAlias = nx.DiGraph
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
_PART = 4
"""The fewest characters by which a string is taken for a part of a file's name."""
_NAMES = "#names"
"""The suffix of the node that stands for the names of a package."""


@dataclass(frozen=True)
class Source:
    """What a Python file says: the modules it imports, the names it takes from them, and its strings."""

    modules: frozenset[str]
    names: frozenset[tuple[str, str]]
    strings: tuple[str, ...]


def read(text: bytes | str) -> Source:
    """Read a source.  Raises ``SyntaxError``."""
    tree = ast.parse(text)
    documentation = {id(node) for node in _documentation(tree)}
    modules: set[str] = set()
    names: set[tuple[str, str]] = set()
    strings: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            strings.append(node.value)
    return Source(frozenset(modules), frozenset(names), tuple(strings))


def _documentation(tree: ast.Module) -> Iterator[ast.Constant]:
    """The strings that are statements: docstrings, and those under a constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value


def graph(sources: Mapping[str, Source], others: Iterable[str]) -> Graph:
    """The graph of a tree: ``sources`` by path, and the paths of the files that are not Python."""
    found = Graph()
    modules = {module_of(path): path for path in sources}
    found.add_nodes_from(sources)
    for path in sources:
        if path.endswith("/__init__.py"):
            found.add_edge(path + _NAMES, path)
    for path, source in sources.items():
        node = path + _NAMES if path.endswith("/__init__.py") else path
        found.add_edges_from((node, used) for used in _uses(source, modules))
        if PurePosixPath(path).name.startswith("test_"):
            found.add_edges_from((node, conftest) for conftest in _conftests(path) if conftest in sources)
    others = tuple(others)
    names = {PurePosixPath(path).name for path in others}
    for path in others:
        found.add_node(path)
        found.add_edges_from((user, path) for user in _users(path, sources, names))
    return found


def module_of(path: str) -> str:
    """``dualpipe/cli/__init__.py`` is ``dualpipe.cli``."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def reached(found: Graph, changed: Iterable[str]) -> dict[str, int]:
    """The files that use the changed ones, directly or not, with the least number of steps; the changed ones have 0."""
    starts = [node for path in changed for node in (path, path + _NAMES) if node in found]
    distances: dict[str, int] = {}
    steps_of = nx.multi_source_dijkstra_path_length(found.reverse(copy=False), starts) if starts else {}
    for node, steps in steps_of.items():
        path = node.removesuffix(_NAMES)
        distances[path] = min(int(steps), distances.get(path, int(steps)))
    return distances


def _uses(source: Source, modules: Mapping[str, str]) -> Iterator[str]:
    for name in source.modules:
        yield from _named(name, modules)
    for module, name in source.names:
        inside = f"{module}.{name}"
        yield from _named(inside if inside in modules else module, modules)
    for text in source.strings:
        for dotted in _DOTTED.findall(text):
            yield from _named(dotted, modules)


def _named(name: str, modules: Mapping[str, str]) -> Iterator[str]:
    """The nodes that importing a dotted name uses: the module itself, and of the packages above it the text."""
    parts = name.split(".")
    while parts and ".".join(parts) not in modules:
        parts.pop()  # a name within the module
    for length in range(1, len(parts) + 1):
        path = modules.get(".".join(parts[:length]))
        if path is not None:
            yield path + _NAMES if length == len(parts) and path.endswith("/__init__.py") else path
    if parts and f"{'.'.join(parts)}.__main__" in modules:
        yield modules[f"{'.'.join(parts)}.__main__"]  # what `python -m` of a package runs


def _conftests(path: str) -> Iterator[str]:
    for folder in PurePosixPath(path).parents:
        yield str(folder / "conftest.py")


def _users(path: str, sources: Mapping[str, Source], names: Set[str]) -> Iterator[str]:
    """The sources that name a file which is not Python, or the folder it lies in."""
    pure = PurePosixPath(path)
    folders = {str(pure.parent), pure.parent.name} if len(pure.parts) > 1 else set()
    for user, source in sources.items():
        strings = {text.strip("/") for text in source.strings}
        if strings & {path, pure.name} or (strings & folders and _may_mean(strings, pure, names)):
            yield user + _NAMES if user.endswith("/__init__.py") else user


def _may_mean(strings: set[str], file: PurePosixPath, names: Set[str]) -> bool:
    """Whether a source that names a file's folder may go on to this file.

    Not where it names other files that there are, and neither a pattern nor a part of this file's name.
    """
    patterns = any("*" in text and fnmatch(file.name, text.rpartition("/")[2]) for text in strings)
    parts = any(len(text) >= _PART and text in file.name for text in strings)
    return patterns or parts or not strings & names
