"""Which checks a change asks for, read from what the changed files reach.

====================  ==============================================================================================
a change of           asks for
====================  ==============================================================================================
a phase table         the six checks and the trial of every schedule that it changes, the theorems, the tests that
                      reach the tables without the runtime (the runtime is tried by the trial of the new schedules)
any other source      the checks whose code uses it, and the tests that use it, the nearest first
comments, layout      nothing; of a file in which the museum plants a fault, that the place is found still
a page of text        the tests that name it, or what makes it, the run of what it says to type, and all links
a golden schedule     as of the tables: the schedule is judged itself, and the tests of the runtime are left out
the theorems' counts  the theorems
other data            the tests that use what names the file or its folder
a file like this      everything: the gate's own, the build's, one that is deleted, whose mode changes, or that nothing
                      is known of
====================  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

import networkx as nx

from ci.golden import COUNTS, is_golden_schedule
from ci.imports import Graph, Source, graph, reached, read
from ci.meaning import Meaning, meaning
from ci.museum.collection import EXHIBITS
from ci.repository import Changed, Repository

PROVE, THEOREMS, TRIAL, MEGATRON, RUNTIME = (
    "proofs/prove.py",
    "proofs/theorems/prove.py",
    "reference/verify.py",
    "reference/megatron/verify.py",
    "dualpipe/runtime/executor.py",
)
DOCUMENTATION, LINKS = "tests/docs/test_documentation.py", "tests/docs/test_links.py"
PAGE_TESTS = (
    "test_what_the_document_says_happens[{page}]",
    "test_every_link_leads_somewhere",
    "test_what_is_not_run_has_a_reason_and_is_listed",
)
"""The tests that run what one page of the documentation says and follow the links, also those that lead to it."""
PAGES_READ = "tests/docs/snippets.py"
"""Reads every page.  Of the tests that use it, those of ``PAGE_TESTS`` are asked for one page."""
SOURCES_READ = "tests/test_architecture.py"
"""Reads every source, whatever imports it."""
MUSEUM = "tests/ci/test_museum.py"
PLANTING = f"{MUSEUM}::test_an_exhibit_finds_the_text_that_it_replaces_and_leaves_python"
PLANTED = frozenset(edit.path for exhibit in EXHIBITS for edit in exhibit.edits)
"""The files in which the museum plants its faults: it replaces a text there, which may be or have a comment."""
TEXTS = frozenset({".md", ".svg", ".png", ""})
"""Endings of files that do nothing unless a source names them; without an ending are LICENSE and the like."""
KNOWN_NAMES = frozenset({".gitignore", "Makefile", ".pre-commit-hooks.yaml"})
BUILD = frozenset({"pyproject.toml", "constraints.txt"})


@dataclass(frozen=True)
class Selection:
    """The checks to run, each with the reason.

    ``tests`` are files, the nearest to the change first, and of those as near the ones that use the least; ``long``
    those of which also the long tests are run, since they changed themselves.
    """

    prove: str = ""
    theorems: str = ""
    trial: str = ""
    megatron: str = ""
    tests: Mapping[str, str] = field(default_factory=dict)
    long: tuple[str, ...] = ()
    everything: str = ""


def select(repository: Repository, changed: Sequence[Changed]) -> Selection:
    """The checks for a change.  A source of the tree that does not parse asks for everything."""
    files = repository.files()
    sources = {}
    for path in files:
        if path.endswith(".py"):
            try:
                sources[path] = read((repository.root / path).read_bytes())
            except (SyntaxError, ValueError):
                return _everything(files, f"{path} cannot be read as Python")
    return choose(tree_of(sources, files), files, changed)


def tree_of(sources: Mapping[str, Source], files: Sequence[str]) -> Graph:
    """Who uses whom.  The gate names many files and runs none by its path: it is left out of who runs them."""
    return graph(sources, [path for path in files if not path.endswith(".py")], frozenset(filter(_is_own, sources)))


def choose(tree: Graph, files: Sequence[str], changed: Sequence[Changed]) -> Selection:
    """The checks for a change, given who uses whom."""
    code: list[str] = []
    tables: list[str] = []
    goldens: list[str] = []
    for change in changed:
        unknown = _unknown(change, tree)
        if unknown:
            return replace(_everything(files, unknown), long=_changed_tests(changed))
        if change.path == COUNTS:
            pass  # the theorems themselves hold it against what they count
        elif is_golden_schedule(change.path):
            goldens.append(change.path)
        elif not change.path.endswith(".py") or change.before is None or change.after is None:
            code.append(change.path)
        else:
            match meaning(change.before, change.after):
                case Meaning.TABLES:
                    tables.append(change.path)
                case Meaning.CODE:
                    code.append(change.path)
                case Meaning.NOTHING:
                    pass
    pages = [path for path in code if path.endswith(".md")]
    code = [path for path in code if path not in pages]
    steps = reached(tree, code)
    from_tables = reached(tree, tables)
    on_runtime = set(_used_with(tree, RUNTIME))
    tests = {path: distance for path, distance in steps.items() if _is_test(path)}
    for path, distance in reached(tree, [*tables, *goldens]).items():
        if _is_test(path) and path not in on_runtime:
            tests[path] = min(distance, tests.get(path, distance))
    for path, distance in _readers(tree, pages).items():
        tests.setdefault(path, distance)
    run = list(filter(_is_run, pages))
    if DOCUMENTATION in files and DOCUMENTATION not in tests:
        tests |= {f"{DOCUMENTATION}::{name}": 1 for page in run for name in _of_page(page)}
    if run and LINKS in files:
        tests.setdefault(LINKS, 1)
    if any(path.endswith(".py") for path in (*code, *tables)) and SOURCES_READ in files:
        tests.setdefault(SOURCES_READ, 0)
    if MUSEUM in files and MUSEUM not in tests and any(change.path in PLANTED for change in changed):
        tests[PLANTING] = 1
    nearest = sorted(tests, key=lambda path: (tests[path], _reach(tree, path), path))
    told = _short(code)
    return Selection(
        prove=f"{told} is used by it" if PROVE in steps else "",
        theorems=_theorems(steps, from_tables, changed, told),
        trial=f"{told} is used by it" if TRIAL in steps else "",
        megatron=f"{told} is used by it" if MEGATRON in steps else "",
        tests={path: _reason(path, tests[path]) for path in nearest},
        long=_changed_tests(changed),
    )


def _unknown(change: Changed, tree: Graph) -> str:
    """Why a changed file asks for everything; empty where it need not."""
    path = PurePosixPath(change.path)
    if _is_own(change.path):
        return f"{path} is the gate's own"
    if change.path in BUILD:
        return f"{path} decides what everything runs on"
    if change.mode:
        return f"{path} changes its mode, {change.mode}"
    if is_golden_schedule(change.path) or change.path == COUNTS:
        return ""
    if change.after is None:
        return f"{path} is deleted"
    known = path.suffix in TEXTS or path.name in KNOWN_NAMES or path.parts[0] in (".github", ".ci")
    if known or _is_test(change.path) or any(map(_is_judge, reached(tree, [change.path]))):
        return ""
    return f"nothing is known of {path}"


def _is_own(path: str) -> bool:
    """Whether a file is the gate's."""
    return path.startswith(("ci/", "tests/ci/"))


def _is_judge(path: str) -> bool:
    """Whether a file is a test or a check that runs what it uses."""
    return path != SOURCES_READ and (_is_test(path) or path in (PROVE, THEOREMS, TRIAL, MEGATRON))


def _everything(files: Sequence[str], why: str) -> Selection:
    tests = {path: why for path in files if _is_test(path)}
    return Selection(why, why, why, why, tests, everything=why)


def _changed_tests(changed: Sequence[Changed]) -> tuple[str, ...]:
    """The files of tests that are new or do something else than before."""
    there = [(change.path, change.before, change.after) for change in changed if _is_test(change.path)]
    return tuple(
        path
        for path, before, after in there
        if after is not None and (before is None or meaning(before, after) is not Meaning.NOTHING)
    )


def _is_test(path: str) -> bool:
    return path.startswith("tests/") and PurePosixPath(path).name.startswith("test_") and path.endswith(".py")


def _is_run(page: str) -> bool:
    """Whether what a page says to type is run by a test."""
    return page == "README.md" or page.startswith("docs/")


def _readers(tree: Graph, pages: Sequence[str]) -> dict[str, int]:
    """The tests that name a page, or use a file beside the tests that does, such as what makes the page.

    The gate's own only speak of pages.
    """
    apart = (PAGES_READ, SOURCES_READ)
    beside = [node for node in tree if node.startswith("tests/") and not _is_own(node) and node not in apart]
    readers = tree.subgraph([*pages, *beside])
    return {path: steps for path, steps in reached(readers, pages).items() if _is_test(path)}


def _of_page(page: str) -> list[str]:
    return [test.format(page=page) for test in PAGE_TESTS]


def _used_with(tree: Graph, path: str) -> Sequence[str]:
    return tuple(reached(tree, [path])) if path in tree else ()


def _reach(tree: Graph, path: str) -> int:
    """How many files a test uses, directly or not."""
    return len(nx.descendants(tree, path)) if path in tree else 0


def _theorems(steps: Mapping[str, int], from_tables: Mapping[str, int], changed: Sequence[Changed], told: str) -> str:
    if THEOREMS in from_tables:
        return "the phase tables changed"
    if THEOREMS in steps:
        return f"{told} is used by them"
    return f"{COUNTS} changed" if any(change.path == COUNTS for change in changed) else ""


def _reason(path: str, distance: int) -> str:
    return "changed itself" if distance == 0 else f"{distance} import{'s' * (distance > 1)} away"


def _short(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
