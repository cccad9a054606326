"""Who uses whom, on a tree that is drawn.

app -> engine -> words          tools is a package whose __init__ re-exports engine
plain -> tools.small            takes a module out of it, and not its names
greedy -> tools                 takes a name of it
"""

import pytest

from ci.imports import graph, module_of, reached, read

FILES = {
    "app.py": "import engine\n",
    "engine.py": "def run():\n    from words import say\n",
    "words.py": "",
    "tools/__init__.py": "from engine import run\n",
    "tools/small.py": "",
    "plain.py": "from tools.small import anything\n",
    "greedy.py": "from tools import run\n",
    "script.py": 'command = ["python", "-m", "engine.run"]\ncode = "from words.say import x"\n',
    "speaker.py": '"""Speaks of words.say and of engine.run."""\n',
    "tests/conftest.py": "import words\n",
    "tests/test_one.py": 'DATA = "golden"\n',
    "tests/deep/test_two.py": 'PAGE = ROOT / "texts" / "x.md"\n',
    "tests/test_all.py": 'PAGES = (ROOT / "texts").glob("*.md")\n',
}
OTHERS = ["tests/golden/a.txt", "NOTES.md", "texts/x.md", "texts/y.md"]


@pytest.fixture(scope="module")
def tree():
    return graph({path: read(text) for path, text in FILES.items()}, OTHERS)


def test_a_module_is_named_by_its_path():
    assert module_of("dualpipe/cli/__init__.py") == "dualpipe.cli"
    assert module_of("dualpipe/cli/app.py") == "dualpipe.cli.app"


def test_use_is_followed_through_lazy_imports_with_the_number_of_steps(tree):
    found = reached(tree, ["words.py"])
    assert (found["words.py"], found["engine.py"], found["app.py"]) == (0, 1, 2)


def test_a_module_out_of_a_package_does_not_bring_what_the_package_re_exports(tree):
    found = reached(tree, ["engine.py"])
    assert "greedy.py" in found
    assert "plain.py" not in found
    assert "plain.py" in reached(tree, ["tools/__init__.py"])
    assert "plain.py" in reached(tree, ["tools/small.py"])


def test_a_module_named_in_a_string_is_used_and_one_in_a_docstring_is_not(tree):
    assert "script.py" in reached(tree, ["engine.py"])
    assert "script.py" in reached(tree, ["words.py"])
    assert "speaker.py" not in reached(tree, ["engine.py"])


def test_a_test_uses_the_conftest_of_its_folder_and_of_those_above(tree):
    found = reached(tree, ["tests/conftest.py"])
    assert {"tests/test_one.py", "tests/deep/test_two.py"} <= found.keys()


def test_data_is_used_by_who_names_its_folder(tree):
    assert set(reached(tree, ["tests/golden/a.txt"])) == {"tests/golden/a.txt", "tests/test_one.py"}
    assert set(reached(tree, ["NOTES.md"])) == {"NOTES.md"}


def test_who_names_one_file_of_a_folder_does_not_use_the_others():
    found = graph({path: read(text) for path, text in FILES.items()}, OTHERS)
    assert set(reached(found, ["texts/x.md"])) == {"texts/x.md", "tests/deep/test_two.py", "tests/test_all.py"}
    assert set(reached(found, ["texts/y.md"])) == {"texts/y.md", "tests/test_all.py"}


def test_a_file_that_is_not_in_the_tree_reaches_nothing(tree):
    assert reached(tree, ["elsewhere.py"]) == {}
