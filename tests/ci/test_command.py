"""How a command of the gate's package ends: no error of its own reads as a refusal."""

import os
import signal
import subprocess
import sys

import pytest

from ci import GateError
from ci.process import environment
from tests.ci.conftest import ROOT


def ended(body: str) -> subprocess.CompletedProcess:
    code = f"import os, signal, time\nfrom ci.command import run_as_command\n{body}\nrun_as_command(main)\n"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=dict(environment(ROOT)), capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("code", [0, 1, 3])
def test_it_ends_with_the_code_that_main_returns(code):
    done = ended(f"def main(arguments): return {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_bad_input_is_one_line():
    error = GateError("the rule", "what was given", "the fix")
    done = ended(f"from ci import GateError\ndef main(arguments): raise GateError{error.rule, error.got, error.fix}")
    assert (done.returncode, done.stderr) == (2, f"{error}\n")


def test_an_internal_error_is_printed_whole_and_is_no_refusal():
    done = ended("def main(arguments): return [][0]")
    assert done.returncode == 70
    assert "IndexError" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("internal error (not a verdict): ")


def test_an_unreadable_file_is_bad_input():
    done = ended("def main(arguments): open('/nowhere/at/all')")
    assert (done.returncode, done.stderr) == (2, "[Errno 2] No such file or directory: '/nowhere/at/all'\n")


def test_an_output_without_a_reader_is_no_verdict():
    reading, writing = os.pipe()
    os.close(reading)
    code = "from ci.command import run_as_command\nrun_as_command(lambda arguments: print('PASSED'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=dict(environment(ROOT)), stdout=writing, stderr=subprocess.PIPE, timeout=30)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_silently(sent, code):
    body = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    done = ended(f"{body}def main(arguments): os.kill(os.getpid(), {int(sent)}); time.sleep(20)")
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize("name", ["ci.gate", "ci.golden", "ci.faults"])
def test_help_describes_the_command_and_its_exit_codes(name):
    command = [sys.executable, "-m", name, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=dict(environment(ROOT)), capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert "Exit code 0: " in " ".join(done.stdout.split())
    assert "`" not in done.stdout


def test_zero_jobs_are_bad_input():
    command = [sys.executable, "-m", "ci.gate", "--jobs", "0"]
    done = subprocess.run(command, cwd=ROOT, env=dict(environment(ROOT)), capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "--jobs: at least 1, got 0" in done.stderr
