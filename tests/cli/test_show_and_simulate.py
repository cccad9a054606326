"""``dualpipe show`` and ``dualpipe simulate``: their output, and their errors for bad input."""

import json

import pytest

from dualpipe.schedule.generate import NAMES, generate
from dualpipe.schedule.text import dumps, loads


@pytest.mark.parametrize("name", NAMES)
def test_show_prints_the_schedule(run, name):
    result = run("show", "-P", 4, "-M", 12, "--schedule", name)
    assert (result.code, result.err) == (0, "")
    assert loads(result.out) == generate(name, 4, 12)


def test_late_w_chooses_the_variant_of_a_schedule_by_argument_and_by_option(run):
    variant = dumps(generate("dualpipev-late-tail", 2, 4))
    assert run("show", "dualpipev", "-P", 2, "-M", 4, "--late-w", "tail").out == variant
    assert run("show", "--schedule", "dualpipev", "-P", 2, "-M", 4, "--late-w", "tail").out == variant
    assert json.loads(run("simulate", "-P", 8, "-M", 32, "--late-w", "all", "--json").out)["makespan"] == 99


@pytest.mark.parametrize("command", ["show", "simulate", "prove", "verify"])
def test_late_w_of_a_schedule_that_has_no_such_variant_is_refused(run, command):
    result = run(command, "zb1p", "--late-w", "tail")
    assert (result.code, result.out) == (2, "")
    assert "late W is an option of dualpipe, dualpipev: got tail with zb1p" in result.err


def test_a_shown_file_is_read_again(run, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(dumps(generate("zb1p", 3, 5)))
    assert run("show", "--schedule", file).out == file.read_text()


def test_a_table_of_torch_is_printed_and_read_again(run, tmp_path):
    file = tmp_path / "table.csv"
    printed = run("show", "dualpipev", "-P", 2, "-M", 4, "--csv")
    assert printed.code == 0
    file.write_text(printed.out)
    assert run("show", file, "--csv").out == printed.out
    assert "SEND" not in run("show", file, "--csv", "--compute-only").out
    assert run("show", "dualpipe", "-P", 2, "-M", 4, "--csv").code == 2, "a table has one lane"
    assert run("show", file, "--csv", "--json").code == 2
    assert run("show", file, "--compute-only").code == 2


def test_simulate_prints_the_makespan_the_bubble_and_the_peaks(run):
    result = run("simulate", "-P", 8, "-M", 32)
    assert result.code == 0
    assert "makespan 102, bubble 48 in all, 5.9% of the ranks' time" in result.out
    summary = json.loads(run("simulate", "-P", 8, "-M", 32, "--json").out)
    assert summary["makespan"] == 3 * 32 + 8 - 2
    assert summary["peak_activations"] == [9] * 8
    assert summary["peak_pending_w"] == [1, 2, 3, 4, 4, 3, 2, 1]
    assert summary["bubble_share"] == pytest.approx(48 / (8 * 102))


def test_simulate_takes_costs(run):
    """DeepSeek's formula for the bubble of a rank, (P/2-1)(F&B + B - 3W) with B the full backward: here 3 (2.5+2-3)."""
    summary = json.loads(run("simulate", "-P", 8, "-M", 32, "--cost", "F=1,B=1,W=1,FB=2.5", "--json").out)
    assert summary["bubble"][3] == 4.5


BAD = {
    "odd ranks": (["-P", 3], "even number of ranks", "got 3", "use 4"),
    "no ranks": (["-P", 0], "even number of ranks", "got 0", "use 2"),
    "odd microbatches": (["-M", 9], "even number of microbatches", "got 9", "use 10"),
    "too few microbatches": (["-P", 4, "-M", 6], "two microbatches per rank", "got 6", "use 8 or more, or 1f1b"),
    "too few for 1f1b": (["-P", 4, "-M", 2, "--schedule", "1f1b"], "as many microbatches as ranks", "got 2", "use 4"),
    "no such file": (
        ["--schedule", "missing.txt"],
        "1f1b, zb1p, interleaved, zbv, a file or module:function",
        "missing.txt",
        "no such",
    ),
}


@pytest.mark.parametrize("command", ["show", "simulate", "verify"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_the_rule_what_was_given_and_the_fix(run, command, case):
    arguments, *parts = BAD[case]
    result = run(command, *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("dualpipe: ")
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err


def test_a_rank_count_that_does_not_fit_the_file(run, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(dumps(generate("1f1b", 3, 5)))
    result = run("verify", file, "-P", 4)
    assert result.code == 2
    assert f"{file} has 3, -P asks for 4; leave -P out" in result.err


def test_an_error_in_a_file_has_its_line_and_column(run, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("lane > 0\nrank 0: 0F0> 0X0>\n")
    result = run("verify", file)
    assert result.code == 2
    assert f"{file}:2:14: found '0X0>'; expected an op" in result.err


def test_a_folder_is_not_a_schedule_file(run, tmp_path):
    assert run("show", "--schedule", tmp_path).code == 2


@pytest.mark.parametrize("cost", ["X=1", "F", "F=one", "F=-1", "F=nan", "F=inf"])
def test_an_invalid_cost_is_bad_input(run, cost):
    result = run("simulate", "--cost", cost)
    assert result.code == 2
    assert result.err.startswith("dualpipe: ")


@pytest.mark.parametrize("command", [("simulate",), ("show", "--timeline")], ids=" ".join)
def test_a_cost_that_is_given_twice_is_bad_input(run, command):
    result = run(*command, "--cost", "F=1,B=2, F=2")
    assert (result.code, result.out) == (2, "")
    assert "--cost must give each name once: got F twice in 'F=1,B=2, F=2'; leave one of them out" in result.err


@pytest.mark.parametrize(("name", "text"), [("mine.txt", "lane > 0\nrank 0: 0F0>\n"), ("mine.csv", "0F0\n")])
def test_a_byte_order_mark_before_the_text_is_skipped(run, tmp_path, name, text):
    file = tmp_path / name
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert run("show", file).out == "lane > 0\nrank 0: 0F0>\n"
    file.write_bytes(b"\xef\xbb\xbf" + b"\xff")
    assert f"{file}:1:1: found byte 0xff" in run("show", file).err


def test_every_command_has_a_help(run):
    for command in ("show", "simulate", "verify"):
        result = run(command, "--help")
        assert result.code == 0
        assert command in result.out


COLLECTIVES = """\
lane > 0 1
group 0: 0 1
rank 0: 0US> 0F0> 0SF0> 0RB0> 0B0>+0W0> 0AR>@0
rank 1: 1RF0> 1F0> 1B0>+1W0> 1SB0> 1AR>@0
"""


def test_collectives_without_a_cost_are_named_and_with_one_they_take_it(run, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(COLLECTIVES)
    note = "collectives: 2 AR, 1 US; AR, US without a cost (as in --cost AR=1), so without time of their own"
    free = run("simulate", file)
    assert free.out.splitlines()[1:3] == [note, "makespan 6, bubble 6 in all, 50.0% of the ranks' time"]
    priced = run("simulate", file, "--cost", "AR=4,US=0.5")
    assert priced.out.splitlines()[1:3] == [
        "collectives: 2 AR, 1 US",
        "makespan 10.5, bubble 15 in all, 71.4% of the ranks' time",
    ]
    assert json.loads(run("simulate", file, "--json").out)["collectives"] == {"AR": 2, "US": 1}
    drawn = run("show", file, "--timeline", "--cost", "AR=1")
    assert drawn.err.startswith("dualpipe: the drawing leaves a gap where a rank waits for a collective; collectives: ")
