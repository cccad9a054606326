"""Who imports whom, read from the sources: what a changed file reaches.

A node is a file, an edge goes from the one that uses to the one that is used.  What counts as use:

* an import, wherever it stands: a relative one from its package, and the one of a script also from the folder it is in;
* a module's name in a string, for scripts that are run in a process of their own;
* for a Python file its path, its name where no other has it, or its folder in a path that is put together of strings;
* for a file that is not Python, its name or its folder's name in a string;
* for such a file of a package, all Python files of that package unless one names it;
* for a test, the ``conftest.py`` of its folder and of those above.

A package's ``__init__.py`` is two nodes.  Whoever imports a module inside the package runs the file, and depends on
its text alone; whoever takes a name from the package depends on all that it imports.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import PurePosixPath
from typing import TypeAlias

import networkx as nx

Graph: TypeAlias = nx.DiGraph
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
_PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?")
_PART = 4
"""The fewest characters by which a string is taken for a part of a file's name."""
_NAMES = "#names"
"""The suffix of the node that stands for the names of a package."""


@dataclass(frozen=True)
class Source:
    """What a Python file says.

    The modules it imports, the names it takes from them (from ``..errors`` where it imports relatively), its strings,
    and the paths that it puts together: ``bench/*.py``, where what is not a string is a ``*``.
    """

    modules: frozenset[str]
    names: frozenset[tuple[str, str]]
    strings: tuple[str, ...]
    paths: frozenset[str] = frozenset()

    @cached_property
    def named(self) -> frozenset[str]:
        """The strings, without a slash at either end."""
        return frozenset(text.strip("/") for text in self.strings)


def read(text: bytes | str) -> Source:
    """Read a source.  Raises ``SyntaxError``."""
    nodes = list(ast.walk(ast.parse(text)))
    documentation = {id(node) for node in _documentation(nodes)}
    modules: set[str] = set()
    names: set[tuple[str, str]] = set()
    strings: list[str] = []
    paths: set[str] = set()
    parts = {id(part) for node in nodes for part in _parts(node)}
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {(module, alias.name) for alias in node.names}
        elif id(node) in documentation or id(node) in parts:
            pass
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(node.value)
            paths |= {node.value.strip("/")} if "/" in node.value and _PATH.fullmatch(node.value) else set()
        elif isinstance(node, ast.JoinedStr) or _parts(node):
            whole = _path(node)
            path = _known(whole)
            if _PATH.fullmatch(path) and ("/" in path or _parts(node)):
                paths |= {path} if "/" in path or "*" not in path else set()
                strings += _ends(path)
                strings += [f"{path}/*"] if whole.endswith("/*") and isinstance(node, ast.Call) else []
    return Source(frozenset(modules), frozenset(names), tuple(strings), frozenset(paths))


def _parts(node: ast.AST) -> tuple[ast.expr, ...]:
    """The expressions that an expression puts a path together of; none where it is no path."""
    match node:
        case ast.BinOp(left, ast.Div(), right):
            return left, right
        case ast.Call(ast.Attribute(folder, "joinpath" | "glob"), [*parts]):
            return folder, *parts
        case ast.Call(ast.Attribute(folder, "rglob"), [*parts]):
            return folder, ast.Constant("**"), *parts
        case ast.Call(ast.Name("Path") | ast.Attribute(_, "join"), [first, second, *more]):
            return first, second, *more
        case _:
            return ()


def _path(node: ast.AST) -> str:
    """The path that an expression gives, with ``*`` for what is not a string."""
    match node:
        case ast.Constant(str(text)):
            return text
        case ast.JoinedStr(values):
            return "".join(_path(value) for value in values)
        case _:
            return "/".join(_path(part) for part in _parts(node)) or "*"


def _known(path: str) -> str:
    """A path from its first known folder to its last known part."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    while parts and not parts[0].strip("*"):
        parts.pop(0)
    while parts and not parts[-1].strip("*"):
        parts.pop()
    return "/".join(parts)


def _ends(path: str) -> list[str]:
    """A path as the strings by which ``_users`` knows it: whole, its last part, and before a pattern the folder."""
    folder, _, last = path.rpartition("/")
    return [path, last, *(_ends(_known(folder)) if "*" in last and _known(folder) else [])]


def _documentation(nodes: Iterable[ast.AST]) -> Iterator[ast.Constant]:
    """The strings that are statements: docstrings, and those under a constant."""
    for node in nodes:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value


def graph(sources: Mapping[str, Source], others: Iterable[str], quoting: Set[str] = frozenset()) -> Graph:
    """The graph of a tree: ``sources`` by path, and the paths of the files that are not Python.

    The sources that are ``quoting`` use no Python file by its path: they speak of files that they do not run.
    """
    found = Graph()
    modules = {module_of(path): path for path in sources}
    found.add_nodes_from(sources)
    for path in sources:
        if path.endswith("/__init__.py"):
            found.add_edge(path + _NAMES, path)
    for path, source in sources.items():
        found.add_edges_from((_node(path), used) for used in _uses(_absolute(source, path, modules), modules))
        if PurePosixPath(path).name.startswith("test_"):
            found.add_edges_from((path, conftest) for conftest in _conftests(path) if conftest in sources)
    names = Counter(PurePosixPath(path).name for path in sources)
    running = {user: source for user, source in sources.items() if user not in quoting}
    for path in sources:
        found.add_edges_from((_node(user), path) for user in _runners(path, running, names) if user != path)
    others = tuple(others)
    listed = {PurePosixPath(path).name for path in others}
    for path in others:
        found.add_node(path)
        found.add_edges_from((_node(user), path) for user in _users(path, sources, listed))
        found.add_edges_from((_node(user), path) for user in _owners(path, sources))
    return found


def _node(path: str) -> str:
    """The node that uses what a source uses."""
    return path + _NAMES if path.endswith("/__init__.py") else path


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


def _absolute(source: Source, path: str, modules: Mapping[str, str]) -> Source:
    """A source with its relative imports resolved, and those of files of its own folder, which a script finds there."""
    folder = PurePosixPath(path).parent.parts

    def of(name: str) -> str:
        bare = name.lstrip(".")
        level = len(name) - len(bare)
        if level:
            return ".".join([*folder[: max(0, len(folder) - level + 1)], *filter(None, [bare])])
        beside = ".".join([*folder, bare])
        return beside if folder and bare.split(".")[0] not in modules and beside in modules else bare

    names = frozenset((of(module), name) for module, name in source.names)
    return replace(source, modules=frozenset(map(of, source.modules)), names=names)


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


def _runners(path: str, sources: Mapping[str, Source], names: Mapping[str, int]) -> Iterator[str]:
    """The sources that name a Python file by its path, or its folder in a path; by its name where no other has it."""
    pure = PurePosixPath(path)
    for user, source in sources.items():
        strings = source.named
        named = path in strings or (pure.name in strings and names[pure.name] == 1)
        apart = pure.stem in strings and ".py" in strings and not strings.isdisjoint(_folders(pure))
        if named or apart or any(_leads_to(way, path) for way in source.paths):
            yield user


def _leads_to(way: str, path: str) -> bool:
    """Whether a path with ``*`` may be that of a file, or of its folder, seen from any folder above.

    Not where it is the bare name of a file, which others may have.
    """
    return ("/" in way or not way.endswith(".py")) and bool(_pattern(way).fullmatch(path))


@cache
def _pattern(way: str) -> re.Pattern[str]:
    parts = ["(?:.+/)?" if part == "**" else re.escape(part).replace(r"\*", "[^/]*") + "/" for part in way.split("/")]
    return re.compile(f"(?:.+/)?{''.join(parts).rstrip('/')}(?:/[^/]+)?")


def _folders(file: PurePosixPath) -> set[str]:
    """What a file's folder is called."""
    return {str(file.parent), file.parent.name} if len(file.parts) > 1 else set()


def _users(path: str, sources: Mapping[str, Source], names: Set[str]) -> Iterator[str]:
    """The sources that name a file which is not Python, or the folder it lies in."""
    pure = PurePosixPath(path)
    for user, source in sources.items():
        strings = source.named
        folder = not strings.isdisjoint(_folders(pure)) and _may_mean(strings, pure, names)
        if folder or strings & {path, pure.name}:
            yield user


def _owners(path: str, sources: Mapping[str, Source]) -> list[str]:
    """The Python files of the package that has a file which is not Python; none where one of them names it."""
    pure = PurePosixPath(path)
    package = [user for user in sources if PurePosixPath(user).parent == pure.parent]
    named = any(pure.name in sources[user].strings for user in package)
    return package if f"{pure.parent}/__init__.py" in sources and not named else []


def _may_mean(strings: Set[str], file: PurePosixPath, names: Set[str]) -> bool:
    """Whether a source that names a file's folder may go on to this file.

    Not where it names other files that there are, and neither a pattern nor a part of this file's name.  A lone star
    may be anything.
    """
    patterns = any("*" in text and text.strip("*") and fnmatch(file.name, text.rpartition("/")[2]) for text in strings)
    parts = any(len(text) >= _PART and text in file.name for text in strings)
    return patterns or parts or not strings & names
