"""Help at two widths, completion in a real shell, suggestions for misspelt names, --version."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer

from dualpipe.cli import app
from dualpipe.schedule import show_slot
from dualpipe.schedule.generate import PLANS, generate

COMMANDS = sorted(typer.main.get_command(app).commands)


def options_of(command):
    parameters = typer.main.get_command(app).commands[command].params
    return {option for parameter in parameters for option in parameter.opts if option.startswith("--")}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_its_width_and_names_every_option_and_an_example(run, monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", str(width))
    result = run(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert max(map(len, result.out.splitlines())) <= width
    for option in options_of(command):
        assert option in result.out
    assert re.search(rf"Examples: *\n \$ dualpipe {command}\b", result.out)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_a_help_name_options_that_exist(command):
    epilog = typer.main.get_command(app).commands[command].epilog
    lines = re.findall(r"\$ dualpipe (\S+)(.*?)\[/", epilog)
    assert lines
    for named, rest in lines:
        assert named == command
        assert set(re.findall(r"--[a-z-]+", rest)) <= options_of(command)


def test_the_help_of_all_lists_every_command_and_what_a_schedule_is(run):
    result = run("--help")
    assert result.code == 0
    for command in COMMANDS:
        assert f"│ {command} " in result.out
    assert "module:function" in result.out
    assert run().code in (0, 2)  # with no arguments, the same help


def test_the_version_is_the_distributions(run):
    assert run("--version").out == f"dualpipe {version('dualpipe-harness')}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shwo"], "Did you mean 'show'?"),
        (["show", "--rank", "3"], "--ranks"),
        (["show", "DualPipe"], "did you mean dualpipe?"),
        (["show", "--schedule", "zblp"], "did you mean zb1p?"),
        (["prove", "mien.txt"], "did you mean mine.txt?"),
        (["prove", "--model", "eagre"], "did you mean eager?"),
    ],
)
def test_a_misspelt_name_gets_a_suggestion(run, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "mine.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_a_name_unlike_any_other_gets_no_suggestion(run):
    assert "did you mean" not in run("show", "quicksilver").err


def test_show_in_json_is_the_schedule(run):
    printed = json.loads(run("show", "-P", 4, "-M", 8, "--json").out)
    schedule = generate("dualpipe", 4, 8)
    assert (printed["schedule"], printed["ranks"], printed["stages"]) == ("dualpipe", 4, 4)
    assert printed["microbatches"] == {">": 4, "<": 4}
    assert printed["lanes"] == {">": [0, 1, 2, 3], "<": [3, 2, 1, 0]}
    assert printed["programs"] == [[show_slot(slot) for slot in program] for program in schedule.programs]


@pytest.mark.parametrize("option", ["--all-sizes", "--optimal"])
def test_all_sizes_and_optimal_take_no_schedule(run, option):
    result = run("prove", option, "mine.txt")
    assert (result.code, result.out) == (2, "")
    assert f"{option} cannot be combined with mine.txt: got both" in result.err


@pytest.fixture
def complete(run, monkeypatch):
    """What bash would offer for the last word, by the protocol of the environment variable."""

    def offered(*words: str) -> list[str]:
        monkeypatch.setenv("_DUALPIPE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["dualpipe", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        return run().out.split()

    return offered


def test_commands_options_names_and_choices_are_completed(complete):
    assert complete("") == COMMANDS
    assert complete("sh") == ["show"]
    assert complete("prove", "--all") == ["--all-sizes"]
    assert complete("show", "--schedule", "dual") == [name for name in PLANS if name.startswith("dual")]
    assert complete("prove", "z") == ["zb1p", "zbv"]
    assert complete("verify", "--dtype", "f") == ["fp32", "fp64"]


def test_a_real_bash_completes_with_the_script_that_is_shown(tmp_path):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash, whose completion of `dualpipe pr` would be shown to be `prove`")
    shim = tmp_path / "dualpipe"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m dualpipe.cli "$@"\n')
    shim.chmod(0o755)
    script = """
        eval "$(dualpipe --show-completion)"
        COMP_WORDS=(dualpipe pr) COMP_CWORD=1
        handler=$(complete -p dualpipe | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        "$handler" dualpipe pr dualpipe
        echo "${COMPREPLY[@]}"
    """
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [bash, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "prove", done.stderr
