"""``--svg``, ``--png``, ``--html``, ``--trace``, ``--smtlib`` and ``-o`` destroy no other file."""

import os
import stat
import threading

import pytest

from dualpipe.cli.targets import HTML, PNG, RECORDING, SMTLIB, SVG, TRACE, Target, signed
from dualpipe.errors import RuleError
from dualpipe.files import write_whole
from dualpipe.schedule.generate import generate
from dualpipe.schedule.text import dumps, loads

TEXT = dumps(generate("1f1b", 2, 2))
TABLE = "0F0,0F1,,0B0,0B1\n,1F0,1B0,1F1,1B1\n"
WRITING = [
    ("show", "--svg"),
    ("show", "--png"),
    ("simulate", "--trace"),
    ("verify", "--trace"),
    ("prove", "--smtlib"),
    ("prove", "--html"),
]
"""Every command with an option that names a file to write; ``record`` takes no schedule."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with schedules under several names, where the command line runs."""
    (tmp_path / "mine.txt").write_text(TEXT)
    (tmp_path / "linked.txt").symlink_to("mine.txt")
    os.link(tmp_path / "mine.txt", tmp_path / "hard.txt")
    (tmp_path / "other.csv").write_text(TABLE)
    (tmp_path / "plans.py").write_text("def one(): raise SystemExit\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("command", WRITING, ids=" ".join)
def test_an_input_by_any_name_and_any_other_file_are_rejected_before_the_work(run, folder, command):
    before = contents(folder)
    for target in ("mine.txt", folder / "mine.txt", "./linked.txt", "hard.txt", "other.csv", "plans.py"):
        name, option = command
        result = run(name, "mine.txt", option, target)
        assert (result.code, result.out) == (2, ""), target
        assert f"{option} " in result.err
        assert len(result.err.splitlines()) == 1
        assert result.err.rstrip().endswith(("name another file", "name another file, or remove this one first"))
    assert run(name, "plans:one", option, "plans.py").code == 2
    assert contents(folder) == before


def test_record_replaces_nothing_but_a_recording_that_nobody_has_edited(run, folder):
    for target in ("mine.txt", "linked.txt", "other.csv", "plans.py"):
        result = run("record", "-o", target, "--", "nosuchprogram")
        assert "--output makes a new file, or replaces an unedited recording" in result.err
    recorded = folder / "recorded.txt"
    recorded.write_text(signed(TEXT))
    assert "what follows -- is a command" in run("record", "-o", recorded, "--", "nosuchprogram").err
    recorded.write_text(signed(TEXT).replace("0F0>", "0F1>"))
    assert f"{recorded} is something else" in run("record", "-o", recorded, "--", "nosuchprogram").err


def test_only_an_earlier_output_of_the_same_option_is_replaced(run, folder):
    made = {
        "--svg": ("show", "a.svg", SVG),
        "--png": ("show", "a.png", PNG),
        "--trace": ("simulate", "a.json", TRACE),
        "--html": ("prove", "a.html", HTML),
        "--smtlib": ("prove", "a.smt2", SMTLIB),
    }
    for _ in range(2):
        assert run("show", "mine.txt", "--svg", "a.svg", "--png", "a.png").code == 0
        assert run("simulate", "mine.txt", "--trace", "a.json").code == 0
        assert run("prove", "mine.txt", "--model", "blocking", "--html", "a.html", "--smtlib", "a.smt2").code == 0
    for option, (_, _, form) in made.items():
        for name in ("mine.txt", "other.csv", *(name for _, name, _ in made.values())):
            ours = form.is_ours((folder / name).read_bytes())
            assert ours == (name == made[option][1]), (option, name)
    assert not RECORDING.is_ours(TEXT.encode())


@pytest.mark.parametrize("second", ["a.out", "./a.out", "b.out"])
def test_two_options_do_not_name_one_file(run, folder, second):
    (folder / "b.out").symlink_to("a.out")
    for command in (("show", "--svg", "a.out", "--png", second), ("prove", "--html", "a.out", "--smtlib", second)):
        result = run(*command)
        assert (result.code, result.out) == (2, "")
        assert "every output needs its own file" in result.err
    assert not (folder / "a.out").exists()


def test_an_empty_file_may_be_written(run, folder):
    (folder / "empty").touch()
    assert run("simulate", "mine.txt", "--trace", "empty").code == 0


def test_a_file_that_appears_during_the_work_is_kept(folder):
    target = Target("--html", folder / "late", HTML)
    target.check()
    (folder / "late").write_text(TEXT)
    with pytest.raises(RuleError, match="late is something else"):
        target.write("<!doctype html>")
    assert (folder / "late").read_text() == TEXT


def test_a_recording_that_cannot_be_written_is_printed(run, folder, monkeypatch):
    """The program of a recording may itself have written that file."""
    program = "import pathlib; pathlib.Path('out.txt').write_text('mine')"
    monkeypatch.setattr("dualpipe.record.read_folder", lambda *_: ([], 1))
    monkeypatch.setattr("dualpipe.record.assemble_all", lambda *_: [Recorded()])
    result = run("record", "-o", "out.txt", "--", "python", "-c", program)
    assert (result.code, result.out) == (2, TEXT)
    assert (folder / "out.txt").read_text() == "mine"


class Recorded:
    """What the command uses of a recording."""

    notes = caveats = pipeline_ranks = ()
    comparison = None
    schedule = loads(TEXT)

    def as_json(self):
        return {}

    def summary(self):
        return "nothing"

    def text(self):
        return TEXT


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "old"
    file.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, b"new")
    assert contents(tmp_path) == {"old": b"old"}


def test_a_link_and_permissions_stay(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"old")
    file.chmod(0o640)
    link.symlink_to("file")
    write_whole(link, b"new")
    assert link.is_symlink()
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (b"new", 0o640)


def test_two_writers_at_once_leave_one_of_the_two_contents(tmp_path):
    file = tmp_path / "file"
    data = [bytes([number]) * 10**6 for number in range(4)]
    writers = [threading.Thread(target=write_whole, args=(file, each)) for each in data]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert file.read_bytes() in data
    assert list(tmp_path.iterdir()) == [file]


def test_a_pipe_is_written_to_and_one_that_nobody_reads_is_an_error(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b"x" * 10**6)
    reader.join()
    assert got == [b"x" * 10**6]
    monkeypatch.setattr("dualpipe.files._READER_SECONDS", 0.05)
    with pytest.raises(TimeoutError, match="nobody reads it"):
        write_whole(pipe, b"x")


def test_a_name_of_a_schedule_does_not_lead_out_of_the_traces_folder():
    from dualpipe.cli.verify import _trace_name
    from dualpipe.schedule import Schedule

    schedule = generate("1f1b", 2, 2)
    assert _trace_name(Schedule(schedule.routes, schedule.programs, "../../a")) == "-..-a-P2-M2.json"
    assert _trace_name(Schedule(schedule.routes, schedule.programs)) == "schedule-P2-M2.json"
