"""The commands that draw: what they write, and that the picture of the documentation is theirs."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dualpipe.schedule.generate import generate
from dualpipe.schedule.text import dumps
from tests.cli.conftest import run as run
from tests.pictures.tracefile import complaints

README_PICTURE = Path(__file__).parents[2] / "docs" / "pictures" / "dualpipe-P4-M10.svg"
SVG = "{http://www.w3.org/2000/svg}"


def test_show_writes_pictures_and_no_text(run, tmp_path):
    result = run("show", "-P", 2, "--svg", tmp_path / "a.svg", "--png", tmp_path / "a.png")
    assert (result.code, result.out, result.err) == (0, "", "")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag == f"{SVG}svg"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_show_takes_costs_for_a_picture(run, tmp_path):
    run("show", "-P", 2, "--svg", tmp_path / "a.svg", "--cost", "F=1,B=2,W=1")
    assert "costs F=1,B=2,W=1" in (tmp_path / "a.svg").read_text()
    assert run("show", "--svg", tmp_path / "b.svg", "--cost", "F=x").code == 2


def test_costs_without_a_picture_are_told(run):
    result = run("show", "--cost", "F=2")
    assert (result.code, result.out) == (2, "")
    assert "add --timeline, --svg FILE or --png FILE" in result.err


def test_a_schedule_that_is_stuck_has_no_picture(run, tmp_path):
    file = tmp_path / "stuck.txt"
    file.write_text("lane > 0\nrank 0: 0B0> 0F0>\n")
    result = run("show", "--schedule", file, "--svg", tmp_path / "a.svg")
    assert result.code == 2
    assert "cannot begin 0B0>" in result.err
    assert not (tmp_path / "a.svg").exists()


def test_the_timeline_is_as_wide_as_the_terminal_and_plain_where_it_is_none(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    narrow = run("show", "--timeline").out
    monkeypatch.setenv("COLUMNS", "100")
    wide = run("show", "--timeline").out
    assert "\x1b" not in narrow + wide
    assert max(len(line) for line in narrow.splitlines() if line.startswith("rank")) <= 50
    assert "rank 0  F0 F1 F2 f0 b0 w0 f1 F3+b1+w1 ···" in wide


def test_show_without_options_is_the_text_as_ever(run):
    assert run("show", "-P", 4, "-M", 8).out == dumps(generate("dualpipe", 4, 8))


def test_simulate_writes_a_trace_beside_what_it_prints(run, tmp_path):
    file = tmp_path / "trace.json"
    result = run("simulate", "-P", 4, "-M", 8, "--trace", file)
    assert result.out == run("simulate", "-P", 4, "-M", 8).out
    schedule = generate("dualpipe", 4, 8)
    assert complaints(json.loads(file.read_text()), schedule, {"simulated dualpipe, 4 ranks, 8 microbatches": 1}) == []


def contents(svg: str) -> list[tuple[str, ...]]:
    """What a picture shows: shapes with their places to a tenth of a point and their colours, and every text."""
    found = []
    for element in ElementTree.fromstring(svg).iter():
        style = element.get("style", "")
        fill = re.search(r"fill: (#\w+|none|url)", style)
        places = tuple(f"{float(n):.1f}" for n in re.findall(r"-?\d+\.?\d*", element.get("d", "")))
        where = (element.get("x", ""), element.get("y", ""))
        if places or (element.text and element.tag == f"{SVG}text"):
            place = tuple(f"{float(n):.1f}" for n in where if n)
            found.append((element.tag, fill.group(1) if fill else "", *places, *place, element.text or ""))
    return found


@pytest.fixture
def drawn(run, tmp_path):
    run("show", "-P", 4, "-M", 10, "--svg", tmp_path / "now.svg")
    return (tmp_path / "now.svg").read_text()


def test_the_picture_of_the_documentation_is_up_to_date(drawn):
    """To renew it: dualpipe show -P 4 -M 10 --svg docs/pictures/dualpipe-P4-M10.svg"""
    assert contents(README_PICTURE.read_text()) == contents(drawn)
    assert len(contents(drawn)) > 2 * 3 * 4 * 10


@pytest.mark.parametrize(
    ("name", "options"),
    [("late-w-P4-M10", ()), ("late-w-links-P4-M10", ("dualpipe-late-all", "--latency", 0.5))],
)
def test_the_pictures_of_late_w_are_up_to_date(run, tmp_path, name, options):
    """To renew them: the commands in docs/explanation/late-w.md"""
    run("compare", "-P", 4, "-M", 10, "dualpipe", "dualpipe-late-tail", *options, "--svg", tmp_path / "now.svg")
    assert contents(README_PICTURE.with_name(f"{name}.svg").read_text()) == contents((tmp_path / "now.svg").read_text())


def test_the_picture_of_the_documentation_is_small_and_brings_its_own_ground():
    svg = README_PICTURE.read_text()
    assert len(svg) < 64_000
    shapes = [shape for shape in contents(svg) if shape[0] == f"{SVG}path"]
    assert shapes[0][1] == "#ffffff"


@pytest.mark.parametrize(
    ("old", "new"), [(">4</text>", ">5</text>"), ("fill: #113f78", "fill: #86b9ee"), ("M 9", "M 8")]
)
def test_a_picture_that_lags_behind_is_noticed(drawn, old, new):
    assert old in drawn
    assert contents(drawn.replace(old, new, 1)) != contents(drawn)
