"""The reference pages match the code, and the list of the public API is complete."""

import importlib
import pkgutil
import re
import textwrap

import pytest

from dualpipe.cli import app
from tests.docs import reference
from tests.docs.command_line import command_line, prose
from tests.docs.docstrings import markdown
from tests.docs.reference import FOLDER, MODULES, PAGES, public_names, python_api


@pytest.fixture(scope="module")
def rendered():
    return {name: render() for name, render in PAGES.items()}


@pytest.mark.parametrize("name", sorted(PAGES))
def test_the_page_matches_the_code(rendered, name):
    assert (FOLDER / name).read_text() == rendered[name], "run `make docs`"


def test_an_option_that_is_new_makes_the_page_stale(monkeypatch):
    before = command_line()
    monkeypatch.setattr(app.registered_commands[0], "help", "Something else.")
    assert command_line() != before


def test_a_changed_signature_makes_the_page_stale(monkeypatch):
    monkeypatch.setattr(reference, "MODULES", {"dualpipe": MODULES["dualpipe"]})
    before = python_api()
    monkeypatch.setattr("dualpipe.zb1p", lambda ranks, microbatches, late=False: None)
    assert python_api() != before


def test_every_public_name_exists():
    """A listed module with further names has an ``__all__``."""
    for name in MODULES:
        module = importlib.import_module(name)
        for public in public_names(module):
            assert getattr(module, public) is not None, f"{name}.{public}"


def test_a_module_that_exports_names_is_listed_or_known_to_be_internal():
    internal = {
        "dualpipe.cli": "the command line has its own page",
        "dualpipe.comm": "the module paths of DeepSeek's package, whose names dualpipe has too",
        "dualpipe.utils": "likewise",
        "dualpipe.schedule": "the vocabulary of the sources; dualpipe has what a user needs of it",
        "dualpipe.timeline.picture": "dualpipe.picture is its public name",
        "dualpipe.timeline.simulate": "dualpipe.simulate is its public name",
        "dualpipe.record": "what the command line and dualpipe.testing are made of",
        "dualpipe.record.plain": "likewise, for --compare",
        "dualpipe.megatron.on_cpu": "what the launcher's --on-cpu and the tests are made of",
    }
    found = set()
    for package in ("dualpipe", "proofs"):
        for info in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if info.name.endswith("__main__"):
                continue
            if hasattr(importlib.import_module(info.name), "__all__"):
                found.add(info.name)
    assert found - set(MODULES) == set(internal)


OUTSIDE = {
    *("Any", "Callable", "Collection", "Iterable", "Iterator", "Mapping", "Path", "Sequence", "None", "True", "False"),
    *("AbstractContextManager", "BaseException"),
    *("Figure", "Tensor", "Literal"),  # of matplotlib, torch and typing
    *("DistributedDataParallelConfig", "OptimizerConfig", "ProcessGroupCollection"),  # of Megatron
    *("F", "B", "W", "BW", "FB", "AA", "AR", "US", "RS", "RG"),  # parameters
    *("Event", "LaneIterator", "Parser", "Violation"),  # nothing a reader makes or takes apart
}
"""Names in signatures that the page need not explain."""


def test_every_type_that_a_signature_names_is_on_the_page(rendered):
    page = rendered["python.md"]
    explained = set(re.findall(r"^### (\w+)", page, re.M))
    signatures = [
        *re.findall(r"^```text\n(\w+\(.*?)```", page, re.M | re.S),
        *re.findall(r"^- `(\w+\(.*?)`", page, re.M),
    ]
    named = {name for text in signatures for name in re.findall(r"(?<![\w.'])[A-Z]\w*", text)}
    assert named - explained - OUTSIDE == set()


def test_a_docstring_is_complete(rendered):
    page = rendered["python.md"]
    for text in (
        "- `criterion`: `criterion(*outputs, *labels)`: a scalar loss, scaled as its gradient should be",
        "All microbatches have the same shapes, unless the pipeline has `variable_shapes`",
        "  Raises `DisagreementError` at the first step if the ranks were set up differently",
        "**Raises**\n\n- `OrderError`: If the order already has messages",
    ):
        assert text in page


DOCSTRING = """One line
in two.

Some ``code``::

    a  literal

Parameters
----------
one, two:
    What they are.
three:
    What it is.

    - a list,
    - of two
      things

After the section.

Args:
    four: What it is
        in two lines:

        - an item

Raises:
    ValueError: If not.
"""


def test_docstrings_of_both_styles_become_lists():
    assert markdown(DOCSTRING) == textwrap.dedent(
        """\
        One line in two.

        Some `code`:

        ```text
        a  literal
        ```

        **Parameters**

        - `one`, `two`: What they are.
        - `three`: What it is.

          - a list,
          - of two things

        After the section.

        **Parameters**

        - `four`: What it is in two lines:

          - an item

        **Raises**

        - `ValueError`: If not."""
    )


def test_a_meaning_of_an_exit_code_may_go_on_in_the_next_line():
    found = prose("Exit codes:\n0: proved\n1: refuted, or\ndeparts\n2: bad input\nWith several, the worst one.")
    assert found[2:] == [
        "| exit code | meaning |",
        "|---|---|",
        "| 0 | proved |",
        "| 1 | refuted, or departs |",
        "| 2 | bad input |",
        "",
        "With several, the worst one.",
    ]
