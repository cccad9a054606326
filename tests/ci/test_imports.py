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


NAMED = {
    "scripts/start.py": "from beside import x\nimport words\n",
    "scripts/beside.py": "",
    "words.py": "",
    "kit/__init__.py": "",
    "kit/show.py": 'PARTS = ("look", "paint")\nSTYLE = "kit.css"\n\ndef script(name):\n    return f"{name}.js"\n',
    "kit/inner/__init__.py": "",
    "kit/inner/part.py": "from . import near\nfrom ..show import script\n",
    "kit/inner/near.py": "def f():\n    from .far import x\n",
    "kit/inner/far.py": "",
    "kit/start.py": 'FOLDER = Path(__file__).parent / "inner"\n',
    "tests/test_path.py": 'SCRIPT = ROOT / "scripts" / "start.py"\n',
    "tests/test_text.py": 'COMMAND = ["python", "scripts/start.py"]\n',
    "tests/test_name.py": 'run("beside.py")\nopen(tmp_path / "start.py")\n',
    "tests/test_pattern.py": 'ALL = (ROOT / "scripts").glob("*.py")\n',
    "tests/test_format.py": 'def file(name):\n    return f"scripts/{name}.py"\n',
    "tests/test_join.py": 'FILE = Path(ROOT, "scripts", name + ".py")\n',
    "tests/test_parts.py": 'run("scripts", "start", ".py")\n',
    "tests/test_kit.py": 'CSS = ROOT / "kit" / "kit.css"\n',
    "tests/test_other.py": 'OTHER = ROOT / "scripts" / "deep" / "start.py"\nshown = total / "scripts"\n',
    "tests/test_quoting.py": 'PATH = "scripts/start.py"\n',
}
WHOLE = {"tests/test_path.py", "tests/test_text.py", "tests/test_pattern.py", "tests/test_format.py"}
WHOLE |= {"tests/test_join.py", "tests/test_parts.py"}


@pytest.fixture(scope="module")
def named():
    sources = {path: read(text) for path, text in NAMED.items()}
    return graph(sources, ["kit/look.js", "kit/kit.css"], frozenset({"tests/test_quoting.py"}))


def used(tree, path: str) -> set[str]:
    return {user for user in reached(tree, [path]) if user.startswith("tests/")}


def test_a_relative_import_is_one_from_the_package(named):
    assert {"kit/inner/near.py", "kit/inner/part.py"} <= reached(named, ["kit/inner/far.py"]).keys()
    assert "kit/inner/part.py" in reached(named, ["kit/show.py"])


def test_a_script_finds_the_modules_beside_it(named):
    assert "scripts/start.py" in reached(named, ["scripts/beside.py"])
    assert "scripts/start.py" in reached(named, ["words.py"])


def test_a_python_file_is_used_by_who_names_its_path_or_puts_it_together(named):
    assert used(named, "scripts/start.py") == WHOLE | {"tests/test_other.py"}  # which names the folder


def test_a_bare_name_is_a_python_file_only_where_no_other_has_it(named):
    assert "tests/test_name.py" in used(named, "scripts/beside.py")
    assert "tests/test_name.py" not in used(named, "scripts/start.py")
    assert "tests/test_name.py" not in used(named, "kit/start.py")


def test_who_names_a_folder_in_a_path_uses_the_python_files_in_it(named):
    assert {"kit/start.py", "tests/test_kit.py"}.isdisjoint(reached(named, ["scripts/start.py"]))
    assert "kit/start.py" in reached(named, ["kit/inner/far.py"])


def test_a_file_of_a_package_that_is_not_named_is_used_by_the_whole_package(named):
    assert {"kit/show.py", "kit/start.py"} <= set(named.predecessors("kit/look.js"))
    assert set(named.predecessors("kit/kit.css")) == {"kit/show.py", "tests/test_kit.py"}


def test_a_path_is_read_as_far_as_it_is_made_of_strings():
    found = read('a = ROOT / "x" / name / f"{k}-1.txt"\nb = (ROOT / "y").rglob("*.py")\nc = d / e\nf = d / "z" / n\n')
    assert found.paths == {"x/*/*-1.txt", "y/**/*.py", "z"}
    assert {"x", "*-1.txt", "y", "*.py", "z"} <= set(found.strings)
    assert set(read('a = ROOT / "x" / "y"\n').strings) == {"x/y", "y"}


@pytest.mark.parametrize(
    ("text", "uses"),
    [
        ('FILES = ROOT / "texts", "x.md"\n', False),
        ('FILES = ROOT / "texts", "x.md", "*"\n', False),  # of a signature, say
        ('FILES = (ROOT / "texts").glob("*"), "x.md"\n', True),
        ('FILES = (ROOT / "texts").glob("*.md"), "x.md"\n', True),
        ('FILES = (ROOT / "texts").rglob("*.md"), "x.md"\n', True),
        ('FILES = ROOT / "texts" / f"{name}.md", "x.md"\n', True),
        ('FILES = (ROOT / "texts").iterdir()\n', True),
    ],
)
def test_who_names_a_folder_and_one_file_uses_another_where_a_pattern_fits(text, uses):
    found = graph({"a.py": read(text)}, ["texts/x.md", "texts/y.md"])
    assert ("a.py" in reached(found, ["texts/y.md"])) is uses


def test_a_file_that_is_not_in_the_tree_reaches_nothing(tree):
    assert reached(tree, ["elsewhere.py"]) == {}
