"""Bad input, whatever the command: told before the work, in JSON too, and never as a verdict."""

import json
import os
import subprocess
import sys

import pytest

import dualpipe.cli
from dualpipe.perfetto import of_timeline
from dualpipe.schedulefile import loads
from dualpipe.simulate import simulate


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "nosuch.txt"),
        ("simulate", "--cost", "F=x"),
        ("verify", "--steps", "0"),
        ("prove", "--schedule", "nosuch"),
        ("prove", "--all-sizes", "mine.txt"),
        ("record", "--json", "--", "nosuchprogram"),
    ],
    ids=" ".join,
)
def test_with_json_a_complaint_is_one_object(run, arguments):
    arguments = arguments if "--json" in arguments else (*arguments, "--json")
    result = run(*arguments)
    told = json.loads(result.out)
    assert (result.code, told["verdict"]) == (2, "bad input")
    assert told["error"] in result.err


def test_a_recorded_programs_json_option_is_not_ours(run):
    result = run("record", "--", "nosuchprogram", "--json")
    assert (result.code, result.out) == (2, "")


def test_a_fault_of_our_own_is_no_verdict(run, monkeypatch):
    def broken(**_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(dualpipe.cli, "app", broken)
    result = run("prove", "--json")
    assert result.code == dualpipe.cli.FAULT
    assert result.code not in range(4)
    assert json.loads(result.out) == {"verdict": "fault", "error": "a bug"}
    assert "Traceback" in result.err
    assert "ZeroDivisionError" in result.err


@pytest.mark.parametrize("arguments", [("prove", "-P", "2", "-M", "4"), ("show", "-P", "2", "-M", "4", "--json")])
def test_an_output_that_nobody_reads_is_no_verdict(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "from dualpipe.cli import main; main()", *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (dualpipe.cli.UNREAD, "")


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1"])
def test_a_time_to_wait_is_a_time(run, seconds):
    result = run("prove", "-P", 2, "--solver-timeout", seconds)
    assert result.code == 2
    assert "--solver-timeout is more than 0" in result.err


@pytest.mark.parametrize("option", ["--html", "--smtlib"])
def test_an_output_that_cannot_be_written_is_told_before_the_proof(run, option, tmp_path):
    (tmp_path / "held").mkdir()
    for place, told in (("nowhere/a", "there is no folder"), ("held", "is a folder")):
        result = run("prove", option, tmp_path / place)
        assert (result.code, result.out) == (2, "")
        assert told in result.err


@pytest.mark.parametrize(
    "command", [("show", "--svg"), ("show", "--png"), ("simulate", "--trace"), ("verify", "--trace")]
)
def test_likewise_of_pictures_and_traces(run, command, tmp_path):
    result = run(*command, tmp_path / "nowhere" / "a")
    assert (result.code, result.out) == (2, "")
    assert "there is no folder" in result.err


@pytest.mark.parametrize(
    ("question", "option"),
    [
        ("--optimal", ("--html", "a.html")),
        ("--optimal", ("--smtlib", "a.smt2")),
        ("--optimal", ("--max-activations", "1")),
        ("--optimal", ("--model", "eager")),
        ("--all-sizes", ("--html", "a.html")),
        ("--all-sizes", ("-P", "4")),
        ("--all-sizes", ("--optimal",)),
    ],
    ids=str,
)
def test_an_option_that_a_question_does_not_know_is_refused(run, question, option):
    result = run("prove", question, *option)
    assert (result.code, result.out) == (2, "")
    assert f"got {option[0]} as well" in result.err


def test_costs_beyond_all_sums_are_refused(run):
    assert run("simulate", "--json", "--cost", "F=1e308").code == 2
    assert run("show", "--timeline", "--cost", "F=1e308").code == 2
    assert json.loads(run("simulate", "--json", "--cost", "F=1e100").out)["makespan"] > 1e100


@pytest.mark.parametrize("latency", ["1e7", "1e99"])
def test_a_drawing_without_end_is_refused(run, latency):
    result = run("show", "--timeline", "--cost", f"latency={latency}")
    assert (result.code, result.out) == (2, "")
    assert "draw a picture instead" in result.err


def test_a_name_that_is_no_text_and_a_terminal_that_knows_little(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "dualpipe.cli"]
    name = b"\xff.txt"
    (tmp_path / os.fsdecode(name)).write_text("lane > 0\nrank 0: 0F0> 0B0> 0W0>\n")
    for arguments in (["show", name, "--timeline"], ["prove", name, "--html", "a.html"]):
        done = subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\udcff.txt" in (tmp_path / "a.html").read_bytes()


def test_tracks_are_apart_however_many_ranks_there_are():
    ranks = 1500
    lines = [f"lane > {' '.join(map(str, range(ranks)))}"]
    for rank in range(ranks):
        receive = [f"{rank}RF0>"] if rank else []
        send = [f"{rank}SF0>"] if rank < ranks - 1 else []
        lines.append(f"rank {rank}: {' '.join([*receive, f'{rank}F0>', *send])}")
    trace = of_timeline(simulate(loads("\n".join(lines) + "\n")))
    names = {}
    for event in trace["traceEvents"]:
        if event["name"] == "thread_name":
            assert event["tid"] not in names
            names[event["tid"]] = event["args"]["name"]
    for event in trace["traceEvents"]:
        if event["ph"] == "X" and event["cat"] in ("SF", "RF"):
            assert names[event["tid"]].startswith(f"rank {event['args']['rank']} messages")
