"""Bad input to any command: reported before the work, in JSON too, and never as a verdict."""

import itertools
import json
import os
import subprocess
import sys

import pytest

import dualpipe.cli
from dualpipe.schedule.text import loads
from dualpipe.timeline.perfetto import of_timeline
from dualpipe.timeline.simulate import simulate


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
def test_with_json_an_error_is_one_object(run, arguments):
    arguments = arguments if "--json" in arguments else (*arguments, "--json")
    result = run(*arguments)
    printed = json.loads(result.out)
    assert (result.code, printed["verdict"]) == (2, "bad input")
    assert printed["error"] in result.err


def test_the_json_option_of_a_recorded_program_is_not_ours(run):
    result = run("record", "--", "nosuchprogram", "--json")
    assert (result.code, result.out) == (2, "")


def test_an_internal_error_is_no_verdict(run, monkeypatch):
    def broken(**_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(dualpipe.cli, "app", broken)
    result = run("prove", "--json")
    assert result.code == dualpipe.cli.FAULT
    assert result.code not in range(4)
    assert json.loads(result.out) == {"verdict": "fault", "error": "a bug"}
    assert "Traceback" in result.err
    assert "ZeroDivisionError" in result.err


@pytest.mark.parametrize(
    ("arguments", "unbuffered", "takes"),
    [
        (("prove", "-P", "2", "-M", "4"), "", 0),
        (("show", "-P", "40", "-M", "800", "--json"), "1", 1),  # more than a pipe holds, so the reader leaves within it
    ],
    ids=["at its start", "in its middle"],
)
def test_an_output_whose_reader_leaves_is_no_verdict(arguments, unbuffered, takes):
    reading, writing = os.pipe()
    command = [sys.executable, "-c", "from dualpipe.cli import main; main()", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open(reading, "rb", 0) as reader:
        if not takes:
            reader.close()
        with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment) as process:
            os.close(writing)
            if takes:
                assert len(reader.read(takes)) == takes
            reader.close()
            _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (dualpipe.cli.UNREAD, "")


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1"])
def test_a_timeout_is_a_positive_number_of_seconds(run, seconds):
    result = run("prove", "-P", 2, "--solver-timeout", seconds)
    assert result.code == 2
    assert "--solver-timeout is more than 0" in result.err


@pytest.mark.parametrize("option", ["--html", "--smtlib"])
def test_an_output_that_cannot_be_written_is_an_error_before_the_proof(run, option, tmp_path):
    (tmp_path / "held").mkdir()
    for place, message in (("nowhere/a", "there is no folder"), ("held", "is a folder")):
        result = run("prove", option, tmp_path / place)
        assert (result.code, result.out) == (2, "")
        assert message in result.err


@pytest.mark.parametrize(
    "command", [("show", "--svg"), ("show", "--png"), ("simulate", "--trace"), ("verify", "--trace")]
)
def test_a_picture_or_trace_that_cannot_be_written_is_an_error(run, command, tmp_path):
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
        ("--optimal", ("--late-w", "tail")),
        ("--all-sizes", ("--html", "a.html")),
        ("--all-sizes", ("-P", "4")),
        ("--all-sizes", ("--optimal",)),
    ],
    ids=str,
)
def test_all_sizes_and_optimal_reject_options_that_they_do_not_use(run, question, option):
    result = run("prove", question, *option)
    assert (result.code, result.out) == (2, "")
    assert f"{question} cannot be combined with {option[0]}: got both" in result.err


def test_costs_whose_sum_overflows_are_rejected(run):
    assert run("simulate", "--json", "--cost", "F=1e308").code == 2
    assert run("show", "--timeline", "--cost", "F=1e308").code == 2
    assert json.loads(run("simulate", "--json", "--cost", "F=1e100").out)["makespan"] > 1e100


@pytest.mark.parametrize("latency", ["1e7", "1e99"])
def test_a_drawing_that_is_too_long_is_rejected(run, latency):
    result = run("show", "--timeline", "--cost", f"latency={latency}")
    assert (result.code, result.out) == (2, "")
    assert "draw a picture instead" in result.err


def test_a_file_name_that_is_not_utf_8_on_an_ascii_terminal(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "dualpipe.cli"]
    name = b"\xff.txt"
    (tmp_path / os.fsdecode(name)).write_text("lane > 0\nrank 0: 0F0> 0B0> 0W0>\n")
    for arguments in (["show", name, "--timeline"], ["prove", name, "--html", "a.html"]):
        done = subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\udcff.txt" in (tmp_path / "a.html").read_bytes()


def test_tracks_are_distinct_for_any_number_of_ranks():
    ranks = 1100  # with a thousand ranks and more, numbers of four digits must not meet
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


@pytest.mark.parametrize(
    ("command", "output"), [(("prove", "--model", "blocking", "--json"), "full"), (("show",), "closed")]
)
def test_a_verdict_that_cannot_be_printed_is_bad_input(command, output):
    redirect = ">&-" if output == "closed" else ">/dev/full"
    line = f'exec "$0" -m dualpipe.cli "$@" -P 2 -M 4 {redirect}'
    done = subprocess.run(["sh", "-c", line, sys.executable, *command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("dualpipe: standard output ")


def test_a_silent_pipe_is_an_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dualpipe.files.SILENT_SECONDS", 0.05)
    os.mkfifo(tmp_path / "pipe")
    assert "gave nothing for" in run("show", tmp_path / "pipe").err
    reading, writing = os.pipe()
    os.write(writing, b"lane > 0\n")
    assert "gave nothing for" in run("prove", f"/dev/fd/{reading}").err
    os.write(writing, b"lane > 0\nrank 0: 0F0>\n")
    os.close(writing)
    assert run("show", f"/dev/fd/{reading}").out == "lane > 0\nrank 0: 0F0>\n"
    os.close(reading)


def test_an_endless_file_is_bad_input(run, monkeypatch):
    monkeypatch.setattr("dualpipe.files.MOST_BYTES", 1 << 20)
    assert "/dev/zero has more" in run("show", "/dev/zero").err


def test_a_file_that_changes_while_it_is_read_is_bad_input(run, tmp_path, monkeypatch):
    file = tmp_path / "mine.txt"
    file.write_text("lane > 0\nrank 0: 0F0>\n")
    sizes = itertools.count()

    def changing(descriptor, real=os.fstat):
        status = list(real(descriptor))
        status[6] = next(sizes)
        return os.stat_result(status)

    with monkeypatch.context() as patched:
        patched.setattr("dualpipe.files.os.fstat", changing)
        result = run("show", file)
    assert f"{file} changed; run the command again" in result.err


@pytest.mark.parametrize("text", ["# one\rlane > 0\nrank 0: 0F0>\n", "lane > 0\nrank 0: 0F0> # W later\r0W0>\n"])
def test_a_bare_carriage_return_in_a_comment_is_bad_input(run, tmp_path, text):
    (tmp_path / "mine.txt").write_bytes(text.encode())
    assert "found a carriage return; expected lines that end in a newline" in run("show", tmp_path / "mine.txt").err


def test_a_bare_carriage_return_in_a_table_is_bad_input(run, tmp_path):
    (tmp_path / "mine.csv").write_bytes(b"0F0,0W0\r,1F0,1W0\n")
    assert "mine.csv:1:8: found a carriage return" in run("show", tmp_path / "mine.csv").err


LONG = "a" * 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prove", ""), "or module:function: got an empty name; give a name"),
        (("prove", "."), "or module:function: . is a folder; name a file in it"),
        (("prove", "/proc/self/mem"), "a schedule must be a file that can be read: /proc/self/mem: "),
        (("show", LONG), "the name of a file may have at most 255 bytes: got 300 bytes: aaa"),
        (
            ("show", "--svg", ""),
            "--svg is a file that can be written: . is a folder (an empty name means the current one);",
        ),
        (("show", "--svg", LONG), f"{LONG} cannot be created: File name too long; name another file"),
        (
            ("show", "--svg", "ok.txt/x.svg"),
            "ok.txt/x.svg cannot be created: ok.txt is a file, not a folder; name another",
        ),
        (
            ("show", "--svg", "/dev/full"),
            "--svg is a file that can be written: /dev/full could not be written: No space",
        ),
        (("prove", "--bytes-for-b", "1"), "go together: got --bytes-for-b alone; add --bytes-for-w"),
        (("prove", "--bytes-for-w", "1"), "go together: got --bytes-for-w alone; add --bytes-for-b"),
        (("prove", "--bytes-for-b", "9" * 5000, "--bytes-for-w", "1", "ok.txt"), "of at most 18 digits: got 999"),
        (("prove", "--model", "eager:" + "9" * 22), "may buffer at most 999999999 messages: got 'eager:999"),
        (("show", "depths.txt"), "lane > has 2 stages and lane < has 1 stage; expected"),
        (("show", "no.txt"), "got no.txt, and no such file exists; correct it"),
        (("show", "oky.txt"), "got oky.txt, and no such file exists; did you mean ok.txt?"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_an_error_gives_the_rule_what_was_given_and_the_fix(run, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "ok.txt").write_text("lane > 0\nrank 0: 0F0> 0B0> 0W0>\n")
    (tmp_path / "depths.txt").write_text("lane > 0 0\nlane < 0\nrank 0:\n")
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("command", [("mine.txt", "--schedule", "zb1p"), ("--optimal", "--schedule", "zb1p")], ids=str)
def test_prove_ignores_no_schedule(run, command):
    result = run("prove", *command)
    assert (result.code, result.out) == (2, "")
    assert "--schedule" in result.err
