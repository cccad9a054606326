"""The command line, called in this process as the console script calls it."""

import sys
from typing import NamedTuple

import pytest

from dualpipe.cli import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capfd):
    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["dualpipe", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        out, err = capfd.readouterr()
        return Result(exited.value.code or 0, out, err)

    return call
