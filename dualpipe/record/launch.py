"""Run a command with the recorder in every Python process that it starts, and end all of them in time.

With a number of ranks the command is started that many times, as ``torchrun`` would: RANK, WORLD_SIZE and the others
are set.  Without one it is started once and launches its ranks itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dualpipe.errors import RuleError
from dualpipe.record import stacks
from dualpipe.record.processes import MARK, Watchdog, kill_marked

CHILD = Path(__file__).parent / "child"
TOGETHER = ("overlapped_forward_backward", "overlaped_forward_backward")  # DeepSeek's name, and as 1.0.0 spells it
_SITE = """\
import importlib.machinery, importlib.util, sys
def load():
    spec = importlib.util.spec_from_file_location(
        "_dualpipe_recorder", {init!r}, submodule_search_locations=[{child!r}]
    )
    module = sys.modules["_dualpipe_recorder"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import _dualpipe_recorder.startup
    _dualpipe_recorder.startup.start({folder!r})
def next_one():  # the sitecustomize that this one hides, if there is one
    sys.path[:] = [path for path in sys.path if path != {site!r}]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None:
        sys.modules["sitecustomize"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
load()
next_one()
"""


@dataclass(frozen=True)
class Launch:
    """What to run.

    ``together`` names methods that overlap a forward with a backward, ``containers`` module classes whose call is not
    the forward of a stage.  The program is stopped ``timeout`` seconds after its start, ``stall`` seconds after every
    rank began to wait for messages, and ``grace`` seconds after a rank failed.  ``plain_step`` is the training step to
    run plainly as well, if there is one: 0 for the first whose gradients an optimizer uses.
    """

    command: tuple[str, ...]
    ranks: int | None = None
    timeout: float = 120.0
    stall: float = 10.0
    grace: float = 10.0
    together: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()
    plain_step: int | None = None


@dataclass(frozen=True)
class End:
    """How the processes ended: their exit codes in order, ``None`` for one that was killed for ``reason``."""

    codes: tuple[int | None, ...]
    seconds: float
    reason: str

    @property
    def succeeded(self) -> bool:
        return all(code == 0 for code in self.codes)

    def describe(self) -> str:
        """One line for each process that failed or was killed."""
        return "\n".join(
            f"{self._name(n)} still ran after {self.seconds:.0f} s and was stopped: {self.reason}"
            if code is None
            else f"{self._name(n)} ended with exit code {code}"
            for n, code in enumerate(self.codes)
            if code != 0
        )

    def _name(self, number: int) -> str:
        return f"rank {number}" if len(self.codes) > 1 else "the command"


def run(launch: Launch, folder: Path, output: int) -> End:
    """Run until all processes have ended or the time is up.

    ``folder`` is an empty folder for the events, ``output`` the file descriptor for standard output.  No process of the
    command is left when this returns or raises, whatever its parent is by then.
    """
    _prepare(launch, folder)
    started = time.monotonic()
    processes: list[subprocess.Popen[bytes]] = []
    forked = _forked(launch, folder)
    commands = [forked] if forked else [launch.command] * (launch.ranks or 1)

    def codes() -> list[int | None]:
        found = [process.poll() for process in processes]
        return _forked_codes(folder, launch.ranks or 1, found[0]) if forked else found

    try:
        for rank, command in enumerate(commands):
            try:
                process = subprocess.Popen(
                    command,
                    env=_environment(launch, folder, rank),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    start_new_session=True,
                )
            except OSError as error:
                raise RuleError(
                    "what follows -- is a command", f"{command[0]}: {error.strerror}", "correct the command"
                ) from error
            processes.append(process)
        reason = _wait(codes, launch, folder, started)
        end = End(tuple(codes()), time.monotonic() - started, reason)
        if reason:
            stacks.ask(folder)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        kill_marked(str(folder))
        for process in processes:
            process.wait()
    stacks.note(folder)
    return end


def _forked(launch: Launch, folder: Path) -> tuple[str, ...] | None:
    """The command that forks the ranks, if the given one is ``python script.py`` or ``python -m module``."""
    python, *words = launch.command
    plain = words and (words[0].endswith(".py") or (words[0] == "-m" and len(words) > 1))
    if launch.ranks is None or not plain or not Path(python).name.startswith("python"):
        return None
    return (python, str(CHILD / "ranks.py"), str(folder), str(launch.ranks), *words)


def _forked_codes(folder: Path, ranks: int, parent: int | None) -> list[int | None]:
    """The exit codes so far; a rank whose forking process has ended has that one's exit code."""
    files = [folder / f"ended-{rank}" for rank in range(ranks)]
    return [int(file.read_text()) if file.exists() else parent for file in files]


def _wait(codes: Callable[[], Sequence[int | None]], launch: Launch, folder: Path, started: float) -> str:
    """Wait until every process has an exit code, or until there is a reason to kill the others, which is returned."""
    failed = None
    watchdog = Watchdog(folder, launch.stall)
    while None in (ended := codes()):
        now = time.monotonic()
        if any(ended):
            failed = failed or now
        if now - started > launch.timeout:
            return f"--timeout is {launch.timeout:g} s"
        if failed is not None and now - failed > launch.grace:
            return "another rank had failed"
        if watchdog.hangs(now):
            return f"every rank had been waiting for messages for {launch.stall:g} s"
        time.sleep(0.02)
    return ""


def _prepare(launch: Launch, folder: Path) -> None:
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        _SITE.format(init=str(CHILD / "__init__.py"), child=str(CHILD), folder=str(folder), site=str(site))
    )
    settings = {
        "launcher": os.getpid(),
        "devices": launch.ranks,
        "store": str(folder / "store") if launch.ranks else None,
        "together": [*TOGETHER, *launch.together],
        "containers": list(launch.containers),
        "plain_step": launch.plain_step,
        "plain_seconds": launch.timeout,
    }
    (folder / "settings.json").write_text(json.dumps(settings))


def _environment(launch: Launch, folder: Path, rank: int) -> dict[str, str]:
    path = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "CUDA_VISIBLE_DEVICES": "",
        MARK: str(folder),
    }
    if launch.ranks:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(launch.ranks),
            "LOCAL_WORLD_SIZE": str(launch.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port(folder)),
        }
    return environment


def _free_port(folder: Path) -> int:
    """One port for all ranks of a launch, for programs that read it; ``env://`` uses a file instead."""
    kept = folder / "port"
    if not kept.exists():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            kept.write_text(str(probe.getsockname()[1]))
    return int(kept.read_text())
