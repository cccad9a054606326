"""``dualpipe compare``: the table and its verdict, JSON, pictures, the page, and errors for bad input."""

import json

import pytest

from dualpipe.schedule.generate import NAMES, generate
from dualpipe.schedule.text import dumps
from dualpipe.timeline.measured_costs import MEASURED
from dualpipe.timeline.perfetto import Scaled, trace
from dualpipe.timeline.perfetto import dumps as dumps_trace
from dualpipe.timeline.run_log import simulated
from dualpipe.timeline.simulate import simulate
from dualpipe.timeline.timeline import Costs
from tests.page import reading


def test_the_table_has_every_named_schedule_and_the_best(run):
    result = run("compare", "-P", 4, "-M", 16)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].startswith("4 ranks, 16 microbatches; costs F=1,B=1,W=1, of 1/4 of the model; ")
    assert {line.split()[0] for line in lines[2:-1]} == set(NAMES)
    assert lines[2].split() == ["dualpipe-late-tail", "49", "2.0%", "5", "2", "2", "96"]
    assert lines[-1] == "best: dualpipe-late-tail, makespan 49; as fast: dualpipe-late-all"


def test_a_size_that_a_schedule_cannot_have_is_listed_with_the_reason(run):
    result = run("compare", "-P", 3, "-M", 4)
    assert result.code == 0
    assert "dualpipe: dualpipe needs an even number of ranks, 2 or more: got 3; use 4" in result.out
    assert "interleaved: interleaved needs a multiple of the ranks" in result.out
    assert "dualpipev: dualpipev needs at least two microbatches per rank" in result.out
    assert result.out.splitlines()[-1].startswith("best: zbv")


def test_names_choose_among_the_named_schedules_and_files_come_in_addition(run, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(dumps(generate("zb1p", 3, 7)))
    printed = json.loads(run("compare", file, "zbv", "1f1b", "--json").out)
    assert (printed["ranks"], printed["microbatches"]) == (3, 7)
    assert [each["schedule"] for each in printed["schedules"]] == ["zbv", str(file), "1f1b"]
    assert printed["best"] == ["zbv"]
    assert len(json.loads(run("compare", file, "--json").out)["schedules"]) == len(NAMES) + 1


def test_costs_latency_overlap_and_bytes_reach_the_simulation(run):
    options = ["--cost", "F=1,B=2,W=0.5", "--latency", 0.25, "--overlap", 0.8, "--bytes", "B=8,W=2,weights=100"]
    printed = json.loads(run("compare", "-P", 2, "-M", 8, *options, "--max-bytes", 130, "--json").out)
    assert printed["costs"] == {"F": 1, "B": 2, "W": 0.5, "BW": None, "FB": 0.8 * 3.5, "latency": 0.25}
    assert printed["bytes"] == {"B": 8, "W": 2, "weights": 100}
    by_name = {each["schedule"]: each for each in printed["schedules"]}
    assert by_name["1f1b"]["peak_bytes"] == [116, 108]
    assert by_name["dualpipe"]["fits"] is False
    assert by_name["dualpipe"]["reason"] == "holds 224 bytes, and 130 are allowed"
    assert by_name["dualpipe"]["parameters"] == [2, 2]


def test_measured_costs_are_in_seconds_and_an_overridden_latency_is_printed(run, tmp_path):
    file = tmp_path / "trace.json"
    measured = simulated(simulate(generate("zb1p", 2, 4), Costs(latency=0.5)), MEASURED)
    file.write_text(dumps_trace(trace([Scaled(measured, 1e3)], {})))  # its unit is a millisecond
    result = run("compare", "zbv", "-P", 2, "-M", 4, "--cost-from", file, "--latency", 0.25)
    heading = result.out.splitlines()[0]
    assert "costs F=0.001,B=0.001,W=0.001,BW=0.002,latency=0.25 (means of 2 stages), times in seconds" in heading
    assert result.err.endswith(" s; --latency overrides it: 0.25 s\n")


def test_none_that_fits_is_a_refusal(run):
    result = run("compare", "-P", 4, "-M", 8, "--max-activations", 1)
    assert result.code == 1
    assert result.out.endswith("best: none of them fits\n")


def test_pictures_and_the_page_show_every_schedule(run, tmp_path):
    svg, png, html = (tmp_path / f"c.{form}" for form in ("svg", "png", "html"))
    options = ["zbv", "dualpipe-late-tail", "interleaved", "--svg", svg, "--png", png, "--html", html]
    assert run("compare", "-P", 2, "-M", 4, *options, "--max-activations", 3).code == 0
    drawn = svg.read_text()
    for name in ("zbv", "dualpipe-late-tail", "interleaved"):
        assert f"{name}: makespan" in drawn
    assert drawn.count('id="rank 1"') == 3
    assert drawn.count('id="limit"') == 3
    assert png.read_bytes().startswith(b"\x89PNG")
    text = html.read_text()
    assert "best: dualpipe-late-tail" in text
    (data,) = reading.data(text)
    assert [one["title"] for one in data["drawings"]] == ["dualpipe-late-tail", "zbv", "interleaved"]
    assert data["drawings"][1]["caption"].startswith("zbv: makespan 12.5, bubble 4.0%, parameters 1")


def wrong_schedules():
    """The check that refutes each, and a text in which only that is wrong."""
    dualpipe, zb1p = dumps(generate("dualpipe", 4, 8)), dumps(generate("zb1p", 2, 4))
    return {
        "messages": dualpipe.replace("0SF3>+3SB1<", "3SB1<+0SF3>"),
        "complete": zb1p.replace("0W3>", ""),
        "accumulation": dumps(generate("1f1b", 1, 2)).replace("0B0>+0W0>", "0B0>").replace("0W1>", "0W1> 0W0>"),
    }


@pytest.mark.parametrize("check", wrong_schedules())
def test_a_file_that_is_refuted_is_listed_with_the_reason_and_never_best(run, tmp_path, check):
    file = tmp_path / "wrong.txt"
    file.write_text(wrong_schedules()[check])
    result = run("compare", file, "zbv")
    assert result.code == 0
    assert f"\n{file}: refuted: {check}: " in result.out
    assert result.out.splitlines()[-1].startswith("best: zbv, ")
    right, wrong = json.loads(run("compare", file, "zbv", "--json").out)["schedules"]
    assert (wrong["schedule"], wrong["fits"]) == (str(file), False)
    assert wrong.keys() == right.keys()
    assert {wrong[key] for key in wrong.keys() - {"schedule", "fits", "reason"}} == {None}
    assert wrong["reason"].startswith(f"refuted: {check}: ")


def test_a_waived_check_does_not_keep_a_file_from_the_comparison(run, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(wrong_schedules()["accumulation"])
    assert f"\n{file}: refuted" not in run("compare", file, "zbv", "--waive", "accumulation").out


def test_a_file_given_twice_is_compared_once(run, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text(dumps(generate("1f1b", 1, 1)))
    result = run("compare", file, tmp_path / ".." / tmp_path.name / "mine.txt", "zbv", "zbv")
    assert result.out.startswith("1 rank, 1 microbatch; ")
    assert [line.split()[0] for line in result.out.splitlines()[2:-1]] == [str(file), "zbv"]


def test_bw_names_the_schedules_to_which_it_does_not_apply(run):
    out = run("compare", "1f1b", "zb1p", "dualpipe-late-all", "--cost", "BW=1", "-P", 2, "-M", 4).out
    (line,) = [line for line in out.splitlines() if line.startswith("BW does not apply")]
    assert "zb1p" in line
    assert "1f1b" not in line


def test_no_picture_is_written_where_no_schedule_can_have_the_size(run, tmp_path):
    files = {option: tmp_path / f"c.{option}" for option in ("svg", "png", "html")}
    result = run("compare", "dualpipe", "-P", 3, "-M", 8, *(f"--{option}={file}" for option, file in files.items()))
    assert result.code == 1
    assert result.out.endswith("use 4\nbest: none\n")
    assert result.err == "".join(f"{file} is not written: no schedule was simulated\n" for file in files.values())
    assert not any(file.exists() for file in files.values())


BAD = {
    "no ranks": (["-P", 0], "-P is 1 or more: got 0"),
    "negative ranks": (["-P", -2], "-P is 1 or more: got -2"),
    "no microbatches": (["-M", 0], "-M is 1 or more: got 0"),
    "too many ranks": (["-P", 10**30], "a comparison has at most 1,024 ranks: got 1,000,000"),
    "too many microbatches": (["-M", 10**8], "ranks times microbatches is at most 65,536: got 1 times 100,000,000"),
    "too many of both": (["-P", 1024], "ranks times microbatches is at most 65,536: got 1,024 times 2,048"),
    "late W as an option": (["--late-w", "tail"], "use dualpipe-late-tail or dualpipev-late-tail"),
    "late W of a schedule": (["dualpipev", "zbv", "--late-w", "all"], "got --late-w all; use dualpipev-late-all"),
    "late W twice": (["dualpipe-late-tail", "--late-w", "all"], "got all with dualpipe-late-tail"),
    "no such late W": (["--late-w", "some"], "late_w must be none, tail, all"),
    "no such check": (["--waive", "speed"], "a check that can be waived is one of complete, order"),
    "no such schedule": (["dualpipe-late"], "dualpipe, dualpipev (both also with -late-tail, -late-all), 1f1b"),
    "two costs": (["--cost", "F=1", "--cost-from", "x.json"], "got --cost and --cost-from"),
    "no trace": (["--cost-from", "x.json"], "x.json: No such file or directory"),
    "two latencies": (["--cost", "latency=1", "--latency", 2], "got --latency and latency= in --cost"),
    "two overlaps": (["--cost", "FB=1", "--overlap", 0.8], "got --overlap and FB= in --cost"),
    "an overlap of nothing": (["--overlap", 0], "--overlap is more than 0 and at most 2: got 0"),
    "a negative latency": (["--latency", -1], "latency is -1"),
    "a negative limit": (["--max-activations", -1], "--max-activations is a number from 0"),
    "a limit on unknown bytes": (["--max-bytes", 5], "--max-bytes needs the sizes"),
    "sizes of another name": (["--bytes", "B=1,V=2"], "got 'V=2'; names are B, W, weights"),
    "another size than the file's": (["{file}", "-P", 4], "{file} has 3, -P asks for 4"),
    "files of two sizes": (["{file}", "{other}"], "compared schedules must have the same size"),
    "the picture over the file": (["{file}", "--svg", "{file}"], "is a schedule that the command reads"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(run, tmp_path, case):
    files = {"file": tmp_path / "mine.txt", "other": tmp_path / "other.txt"}
    files["file"].write_text(dumps(generate("zb1p", 3, 7)))
    files["other"].write_text(dumps(generate("zb1p", 3, 8)))
    arguments, says = BAD[case]
    result = run("compare", *(str(argument).format(**files) for argument in arguments))
    assert result.code == 2
    assert says.format(**files) in result.err


def test_collectives_of_a_file_are_counted_and_the_others_have_none(run, tmp_path):
    file, html = tmp_path / "mine.txt", tmp_path / "c.html"
    file.write_text(dumps(generate("zbv", 2, 4)).replace("rank 0:", "rank 0: 0US>").replace("rank 1:", "rank 1: 1US>"))
    result = run("compare", file, "zbv", "--cost", "US=6", "--html", html)
    assert f"{file} has collectives: 2 US\nschedules without collectives are compared without any, so add" in result.out
    assert result.out.splitlines()[-1] == "best: zbv, makespan 12.5"
    assert "schedules without collectives are compared without any" in html.read_text()
    counted = {each["schedule"]: each for each in json.loads(run("compare", file, "zbv", "--json").out)["schedules"]}
    assert (counted["zbv"]["collectives"], counted[str(file)]["collectives"]) == ({}, {"US": 2})


def test_costs_and_a_measured_run_are_one_choice(run, tmp_path):
    result = run("compare", "--cost", "F=1", "--cost-from", tmp_path)
    assert (result.code, result.out) == (2, "")
    assert "--cost and --cost-from" in result.err
