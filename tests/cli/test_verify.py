"""``dualpipe verify``: equal, different, hung, bad input; as text and as JSON."""

import json
import os
import subprocess
import sys
import time

import pytest

from dualpipe.schedule import RF, SENDS, UP, Op, Schedule
from dualpipe.schedule.generate import generate
from dualpipe.schedule.text import dumps
from tests.docs.snippets import ROOT
from tests.production.cases import rewrite, without

TORCH_ALONE = """
import sys
# A module that is None in sys.modules cannot be imported.
sys.modules.update(dict.fromkeys(["z3", "cvc5", "megatron", "hypothesis", "matplotlib", "psutil"]))
import pytest
assert pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu"]) == 0
sys.argv = ["dualpipe", "verify", "-P", "2", "--steps", "2"]
from dualpipe.cli import main
main()
"""


def test_verify_and_the_collection_of_the_gpu_tests_need_torch_rich_and_typer_alone():
    """A GPU machine may have no solver, no Megatron and no test tool except pytest."""
    command = [sys.executable, "-c", TORCH_ALONE]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # hypothesis comes with a plugin
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/gpu/test_megatron.py::test_dualpipe_over_nccl" in done.stdout
    assert "EQUAL" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1] in ("0", "1")]
    assert [row[0] for row in rows] == ["0", "1"]
    assert all(row[-2:] == ["equal", "equal"] for row in rows)


def test_an_equal_run_in_json(run):
    result = run("verify", "-P", 2, "--steps", 2, "--json")
    report = json.loads(result.out)
    assert (report["verdict"], result.err) == ("equal", "")
    assert report["losses"][0] > report["losses"][1]
    assert {party["verdict"] for party in report["parties"].values()} == {"equal"}
    assert report["tensors"] > 200


def swapped(schedule: Schedule) -> Schedule:
    def swap(slot):
        sends = [op for op in slot if op.kind in SENDS and schedule.peer(op) == 2]
        other = {sends[0]: sends[1], sends[1]: sends[0]} if len(sends) == 2 else {}
        return [tuple(other.get(op, op) for op in slot)]

    return rewrite(schedule, 1, swap)


def test_a_different_run_names_the_first_parameter_step_and_stage_with_units_in_the_last_place(run, tmp_path):
    file = tmp_path / "swapped.txt"
    file.write_text(dumps(swapped(generate("dualpipe", 4, 8))))
    result = run("verify", file, "--steps", 1)
    assert (result.code, result.err) == (1, "")
    assert "\x1b" not in result.out
    assert "NOT EQUAL" in result.out
    assert "processes: step 0, stage" in result.out
    assert "units in the last place" in result.out
    report = json.loads(run("verify", file, "--steps", 1, "--json").out)
    assert report["verdict"] == "different"
    assert report["parties"]["processes"]["differences"] > 10
    assert report["parties"]["fake ranks"]["first_difference"] == report["parties"]["processes"]["first_difference"]


def test_a_run_with_an_impossible_op_names_it_and_exits_with_1(run, tmp_path):
    file = tmp_path / "dropped.txt"
    file.write_text(dumps(without(generate("1f1b", 2, 2), 1, Op(RF, UP, 1, 1))))
    result = run("verify", file, "--steps", 1, "--timeout", 3)
    assert result.code == 1
    assert "(1F1>): it needs 1RF1>, which has not been posted" in result.out
    assert "fake ranks: Misstep: F runs after what it needs on its rank: rank 1, slot 4, 1F1>" in result.out


def test_a_hung_run_ends_in_time_with_what_every_rank_waited_for_and_exits_with_1(run, tmp_path):
    """Rank 0 waits for the gradient before it sends the activation; rank 1 for the activation."""
    file = tmp_path / "hang.txt"
    file.write_text("lane > 0 1\nrank 0: 0F0> 0RB0> 0B0>+0W0> 0SF0>\nrank 1: 1RF0> 1F0> 1B0>+1W0> 1SB0>\n")
    started = time.monotonic()
    result = run("verify", file, "--steps", 1, "--timeout", 2)
    assert time.monotonic() - started < 20
    assert result.code == 1
    assert "at 0B0>: receive 0RB0> from rank 1 failed after" in result.out
    assert "(1F0>): receive 1RF0> from rank 0 failed after" in result.out
    assert "fake ranks: Deadlock" in result.out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", 0, "at least one step"),
        ("--device", "tpu", "cpu or cuda"),
        ("--transport", "pigeon", "direct or staged"),
        ("--timeout", 0, "positive number of seconds"),
    ],
)
def test_bad_options(run, option, value, message):
    result = run("verify", option, value)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_a_schedule_without_ops(run, tmp_path):
    file = tmp_path / "empty.txt"
    file.write_text("lane > 0\nrank 0:\n")
    assert "without ops" in run("verify", file).err


def test_a_gap_in_the_numbers_of_microbatches(run, tmp_path):
    file = tmp_path / "gap.txt"
    file.write_text("lane > 0\nrank 0: 0F999999999> 0B999999999> 0W999999999>\n")
    result = run("verify", file)
    assert result.code == 2
    assert "lane > names 1, the largest being 999999999; renumber them" in result.err
