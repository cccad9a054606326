"""``dualpipe prove``: verdicts, exit codes, several files, foreign tables, hostile bytes."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualpipe.cli.options import find_schedule
from dualpipe.schedule import RF, UP, Op
from dualpipe.schedule.generate import NAMES, generate
from dualpipe.schedule.text import ScheduleSyntaxError, dumps
from proofs.prove import CHECKS, prove
from proofs.theorems import THEOREMS
from tests.production.cases import without

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def proved_file(tmp_path):
    file = tmp_path / "proved.txt"
    file.write_text(dumps(generate("dualpipe", 2, 4)))
    return file


@pytest.fixture
def refuted_file(tmp_path):
    file = tmp_path / "refuted.txt"
    file.write_text(dumps(without(generate("1f1b", 2, 2), 1, Op(RF, UP, 1, 1))))
    return file


@pytest.mark.parametrize("name", NAMES)
def test_the_named_schedules_are_proved(run, name):
    result = run("prove", "-P", 4, "-M", 8, "--schedule", name)
    assert result.code == 0
    assert result.out.startswith(f"{name} on 4 ranks: proved\n")
    for check in CHECKS:
        assert f"  {check}" in result.out


def test_json_has_the_contract_keys(run, proved_file):
    printed = json.loads(run("prove", proved_file, "--json").out)
    assert (printed["schedule"], printed["ranks"], printed["verdict"]) == ("dualpipe", 2, "proved")
    assert list(printed["checks"]) == list(CHECKS)
    assert all(check["verdict"] == "proved" and check["seconds"] >= 0 for check in printed["checks"].values())
    assert printed["peak_activations"] == [3, 3]


def test_a_refuted_schedule_has_a_story_and_exits_with_1(run, refuted_file):
    result = run("prove", refuted_file)
    assert result.code == 1
    assert "rank 1 runs the forward of microbatch 1 at stage 1 of lane > in slot 4 (1F1>)" in result.out
    printed = json.loads(run("prove", refuted_file, "--json").out)
    assert printed["checks"]["deadlock"]["verdict"] == "refuted"
    assert "rank 0 waits forever" in printed["checks"]["deadlock"]["story"]


def test_each_file_gives_a_line_and_the_worst_gives_the_exit_code(run, proved_file, refuted_file, tmp_path):
    result = run("prove", proved_file, refuted_file, "--json")
    assert result.code == 1
    assert [json.loads(line)["verdict"] for line in result.out.splitlines()] == ["proved", "refuted"]
    bad = tmp_path / "bad.txt"
    bad.write_text("lane > 0\nrank 0: 0X\n")
    result = run("prove", refuted_file, bad, proved_file, "--json")
    assert result.code == 2
    assert [json.loads(line)["verdict"] for line in result.out.splitlines()] == ["refuted", "bad input", "proved"]
    assert f"{bad}:2:9" in result.err


@pytest.mark.parametrize("table", ["dualpipev", "zbv", "interleaved1f1b"])
def test_tables_of_torch_are_lowered_and_proved(run, table):
    (file,) = GOLDEN.glob(f"torch-{table}-*.csv")
    result = run("prove", file)
    assert result.code == 0, result.out


def test_a_bound_that_does_not_hold_is_refuted(run):
    result = run("prove", "--max-activations", 4)
    assert result.code == 1
    assert "holds 5 live activations" in result.out


def test_bytes_per_stage_give_the_peak_in_bytes(run):
    sizes = ["--bytes-for-b", "9,8,8,12", "--bytes-for-w", "3,2,2,4"]
    result = run("prove", *sizes)
    assert result.code == 0
    assert "rank 0 holds at most" in result.out
    assert run("prove", *sizes[:2]).code == 2
    assert run("prove", "--bytes-for-b", "9,8", "--bytes-for-w", "3,2").code == 2


def test_smtlib_is_written_for_another_solver(run, tmp_path):
    file = tmp_path / "obligations.smt2"
    assert run("prove", "-P", 2, "--smtlib", file, "--model", "blocking").code == 0
    assert file.read_text().count("(check-sat)") == len(CHECKS)


@pytest.mark.parametrize("model", ["blocking", "eager", "eager:2", "edge", "stream", "all"])
def test_a_model_of_communication_can_be_chosen(run, model):
    assert run("prove", "-P", 2, "--model", model).code == 0


def test_an_unknown_model_is_bad_input(run):
    assert run("prove", "--model", "hopeful").code == 2


def test_all_sizes_prints_a_line_for_each_theorem(run):
    result = run("prove", "--all-sizes", "--json", "--schedule", "1f1b")
    assert result.code == 0
    printed = [json.loads(line) for line in result.out.splitlines()]
    assert {theorem["verdict"] for theorem in printed} == {"proved"}
    names = {theorem["name"] for theorem in printed}
    assert names == {f"1f1b: {theorem}" for theorem in THEOREMS if theorem != "pending"}  # no W is deferred
    assert all(0 < theorem["non_vacuous"] <= theorem["obligations"] for theorem in printed)


def test_all_sizes_of_one_family_proves_its_theorems_alone(run):
    result = run("prove", "--all-sizes", "--schedule", "1f1b")
    assert result.code == 0
    *printed, total = result.out.splitlines()
    assert all(line.startswith("proved: 1f1b: ") for line in printed if not line.startswith(" "))
    assert total.startswith(f"{len(THEOREMS) - 1} theorems, ")


def test_all_sizes_can_name_dualpipe_although_it_is_the_default(run, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "dualpipe.cli.proving.prove_all",
        lambda begin, of, by: asked.append(of and [family.name for family in of]) or [],
    )
    run("prove", "--all-sizes", "--schedule", "dualpipe")
    run("prove", "--all-sizes")
    assert asked == [["dualpipe"], None]


def test_all_sizes_of_a_family_without_theorems_is_bad_input(run, proved_file):
    for name, message in ((proved_file, "name one of them"), ("1f1", "did you mean 1f1b?")):
        result = run("prove", "--all-sizes", "--schedule", name)
        assert result.code == 2
        assert "there are theorems for 1f1b, zb1p, dualpipe, dualpipev" in " ".join(result.err.split())
        assert message in " ".join(result.err.split())


def test_a_schedule_is_compared_with_a_named_one_of_its_size(run, tmp_path):
    file = tmp_path / "eager.txt"
    text = dumps(generate("dualpipe", 4, 8)).replace("schedule dualpipe\n", "")
    file.write_text(text.replace(" 2W3<", "").replace("2B3<", "2B3<+2W3<"))
    result = run("prove", file, "--against", "dualpipe", "--model", "blocking")
    assert result.code == 1
    assert f"{file} on 4 ranks: proved" in result.out, "every check holds"
    assert "weights: rank 1 runs 2W3< in slot 22 before 1B3>" in result.out
    against = json.loads(run("prove", file, "--against", "dualpipe", "--json").out)["against"]
    assert (against["name"], against["verdict"]) == ("dualpipe", "departs")
    (departure,) = [each for each in against["departures"] if each["rank"] == 1]
    assert (departure["aspect"], departure["here"]) == ("weights", {"slot": 22, "op": "2W3<"})
    assert departure["there"] == {"slot": 24, "op": "1B3>"}
    assert "does the backward put weight gradients into the store?" in departure["meaning"]
    assert run("prove", file, "--against", file).code == 0


@pytest.mark.parametrize("name", ["interleaved", "zbv"])
def test_a_schedule_to_compare_with_has_the_size_of_the_file(run, tmp_path, name):
    file = tmp_path / "three.txt"
    file.write_text(dumps(generate(name, 3, 6)))
    result = run("prove", file, "--against", name, "--model", "blocking")
    assert (result.code, result.err) == (0, "")
    assert run("prove", file, "--against", name, "-P", 3, "-M", 6, "--model", "blocking").code == 0


def test_a_check_can_be_waived_by_its_name(run, tmp_path):
    file = tmp_path / "late.txt"
    file.write_text(dumps(generate("zb1p", 2, 4)).replace("1W2> 1W3>", "1W3> 1W2>"))
    assert run("prove", file, "--model", "blocking").code == 1
    result = run("prove", file, "--model", "blocking", "--waive", "accumulation", "--waive", "memory")
    assert result.code == 0
    assert result.out.startswith("zb1p on 2 ranks: proved but for accumulation (waived)\n")
    result = run("prove", file, "--waive", "acumulation")
    assert result.code == 2
    assert "did you mean accumulation?" in " ".join(result.err.split())


def test_the_size_of_a_named_schedule_to_compare_with_can_be_given(run, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("lane > 0 1\nlane < 1 0\nrank 0: 0F0> 0SF0>\nrank 1: 0F0< 0SF0< 0F1< 0SF1<\n")
    result = run("prove", file, "--against", "dualpipe")
    assert result.code == 2
    assert "it has 1 of lane > and 2 of lane <; say with -M" in " ".join(result.err.split())
    result = run("prove", file, "--against", "dualpipe", "-M", 4, "--model", "blocking")
    assert result.code == 1
    assert "rank 0 never runs 1F0<" in result.out
    file.write_text("lane > 0 1\nlane < 1 0\nfailure 0: raised IndexError at x.py:3\nrank 0: 0F0>\nrank 1: 0F0<\n")
    result = run("prove", file, "--against", "dualpipe")
    own = "give with -M how many microbatches the program has, since it ended before it ran all of them"
    assert own in " ".join(result.err.split()), result.err
    assert run("prove", "zb1p", "-P", 2, "-M", 4, "--against", "1f1b", "--model", "blocking").code == 1
    assert run("prove", "--all-sizes", "--against", "1f1b").code == 2


WORDS = st.sampled_from(
    [
        "lane",
        "rank",
        "schedule",
        ">",
        "<",
        "0",
        "1",
        "0:",
        "1:",
        "0F0>",
        "0W0>",
        "1RF0>@7",
        "0SF0>",
        "+",
        "#",
        "\n",
        "\t",
    ]
)
TEXTS = st.one_of(st.binary(max_size=200), st.lists(WORDS, max_size=40).map(lambda words: " ".join(words).encode()))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=TEXTS, suffix=st.sampled_from([".txt", ".csv"]))
def test_any_bytes_give_a_verdict_or_an_error_with_line_and_column(tmp_path, data, suffix):
    file = tmp_path / f"hostile{suffix}"
    file.write_bytes(data)
    outcome = read(file)
    if isinstance(outcome, ScheduleSyntaxError):
        assert re.match(rf"{re.escape(str(file))}:\d+:\d+: found ", str(outcome))
    else:
        assert prove(outcome, smt=False).exit_code in (0, 1)


def read(file):
    try:
        return find_schedule(str(file), None, None)
    except ScheduleSyntaxError as error:
        return error


def test_optimal_proves_the_least_makespan_from_both_sides(run):
    assert "12 slots are enough and 11 are not" in run("prove", "--optimal", "-P", 2, "-M", 4).out
    assert run("prove", "--optimal", "-P", 3, "-M", 4).code == 2
