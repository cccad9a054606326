"""The reference pages say what the code is, and the list of the public API is whole."""

import importlib
import pkgutil

import pytest

from dualpipe.cli import app
from tests.docs import reference
from tests.docs.reference import FOLDER, MODULES, PAGES, command_line, public_names, python_api


@pytest.fixture(scope="module")
def rendered():
    return {name: render() for name, render in PAGES.items()}


@pytest.mark.parametrize("name", sorted(PAGES))
def test_the_page_is_what_the_code_says(rendered, name):
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


def test_every_public_name_is_there_and_is_what_its_module_exports():
    """Whatever is listed exists, and each listed module says itself what it exports where it defines more."""
    for name in MODULES:
        module = importlib.import_module(name)
        for public in public_names(module):
            assert getattr(module, public) is not None, f"{name}.{public}"


def test_a_module_that_exports_names_is_listed_or_known_to_be_internal():
    internal = {
        "dualpipe.cli": "the command line has its own page",
        "dualpipe.comm": "the module paths of DeepSeek's package, whose names dualpipe has too",
        "dualpipe.utils": "likewise",
        "dualpipe.record": "what the command line and dualpipe.testing are made of",
    }
    found = set()
    for package in ("dualpipe", "proofs"):
        for info in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if info.name.endswith("__main__"):
                continue
            if hasattr(importlib.import_module(info.name), "__all__"):
                found.add(info.name)
    assert found - set(MODULES) == set(internal)
