"""Files of the user with the names of modules on which a verdict depends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dualpipe import _imports
from dualpipe.schedule.generate import generate
from dualpipe.schedule.text import dumps

SHADOWS = "reference proofs z3 torch matplotlib numpy typer click rich json typing dataclasses hashlib ci conftest"
SCRIPT = str(Path(sys.executable).with_name("dualpipe"))


@pytest.fixture
def folder(tmp_path):
    """A folder where every such file ends the process that imports it."""
    for name in SHADOWS.split():
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of the working directory')\n")
    (tmp_path / "mine.txt").write_text(dumps(generate("1f1b", 2, 2)))
    return tmp_path


def lines(folder, *command, **environment):
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_prove_as_a_module_imports_none_of_them_and_an_entry_point_may_import_its_own(folder):
    (folder / "rich.py").write_text("NAME = '1f1b'\n")
    (folder / "plans.py").write_text("import rich, dualpipe\ndef one(): return dualpipe.one_f_one_b(2, 2)\n")
    command = [sys.executable, "-m", "dualpipe", "prove", "mine.txt", "plans:one", "--json", "--html", "a.html"]
    assert [printed["verdict"] for printed in lines(folder, *command, PYTHONPATH=".")] == ["proved", "proved"]


@pytest.mark.skipif(
    not os.path.exists(SCRIPT),
    reason="no command beside this Python: would have shown that it imports nothing from PYTHONPATH",
)
def test_the_script_imports_none_of_them_from_pythonpath(folder):
    command = [SCRIPT, "show", "mine.txt", "--svg", "a.svg"]
    assert lines(folder, *command, PYTHONPATH=os.pathsep.join([".", str(folder)])) == []
    assert (folder / "a.svg").exists()


@pytest.mark.long
def test_verify_imports_none_of_them(folder):
    command = [sys.executable, "-m", "dualpipe.cli", "verify", "mine.txt", "--steps", "1", "--json"]
    assert [printed["verdict"] for printed in lines(folder, *command)] == ["equal"]


def test_the_standard_library_comes_first_then_installed_packages_and_the_path_is_restored(tmp_path, monkeypatch):
    installed, sources = tmp_path / "site", tmp_path / "sources"
    (installed / "torch-2.dist-info").mkdir(parents=True)
    (sources / "mine.egg-info").mkdir(parents=True)  # an editable installation leaves one beside the sources
    library = str(Path(os.__file__).parent)
    path = ["", str(sources), library, str(installed)]
    monkeypatch.chdir(sources)
    assert _imports.ordered(path) == [library, str(installed), "", str(sources)]
    monkeypatch.setattr(sys, "path", path)
    with _imports.OwnFirst():
        assert sys.path[0] == library
    assert sys.path == path
    assert not any(isinstance(finder, type) and finder.__name__ == "_Own" for finder in sys.meta_path)


def test_own_packages_come_from_beside_the_one_that_runs(tmp_path, monkeypatch):
    (tmp_path / "proofs.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = _imports._Own.find_spec("proofs")
    assert Path(spec.origin).parent.parent == Path(_imports.ROOT)
    assert _imports._Own.find_spec("numpy") is None


@pytest.mark.parametrize(
    ("original", "arguments", "is_one"),
    [
        ("python -m dualpipe.cli prove", "-m prove", True),
        ("python -X importtime -m dualpipe.cli", "-m", True),
        ("python -mdualpipe.cli", "-m", True),
        ("python -m dualpipe prove mine.txt", "-m prove mine.txt", True),
        ("python -Imdualpipe show", "-m show", True),
        ("python /bin/dualpipe show", "/bin/dualpipe show", True),
        ("python -m dualpipe.testing", "-m", False),
        ("python -m mine.train -m dualpipe", "-m -m dualpipe", False),
        ("python train.py -m dualpipe", "train.py -m dualpipe", False),
        ("python -m pytest", "/lib/pytest/__main__.py", False),
        ("python", "", False),
    ],
)
def test_the_path_of_another_program_that_imports_dualpipe_is_left_alone(original, arguments, is_one):
    assert _imports.is_command(original.split(), arguments.split()) == is_one
