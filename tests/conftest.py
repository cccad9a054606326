"""For every test: one thread per process, as sums may depend on the number of threads; Ctrl-C ends the run.

With ``pytest -n N --dist loadfile`` a worker runs whole files, and all of what ``TOGETHER`` lists: fixtures and caches
are then filled once.  The folders of ``FIRST`` begin, so that no worker is left alone with a slow one at the end.
"""

import gc
import signal

import pytest

try:
    from hypothesis import settings
except ImportError:  # the GPU tests run where no test tool but pytest is installed
    pass
else:
    settings.register_profile("untimed", deadline=None)  # how long an example takes says nothing about it
    settings.load_profile("untimed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script, where children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

TOGETHER = ("tests/proofs/theorems/",)
"""Folders whose files rely on the same proofs."""
FIRST = ("tests/proofs/theorems/", "tests/docs/", "tests/megatron/", "tests/soundness/", "tests/record/", "tests/ci/")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("numprocesses", None):  # the process that only distributes the tests runs none
        import torch

        torch.set_num_threads(1)
        gc.disable()  # while modules are imported there is little garbage


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what is imported by now, half a million objects, out of every garbage collection, in forked ranks too."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # tests keep many objects too, and leave little garbage
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(
            key=lambda item: next((at for at, way in enumerate(FIRST) if item.nodeid.startswith(way)), len(FIRST))
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((way for way in TOGETHER if nodeid.startswith(way)), super()._split_scope(nodeid))

    config.option.loadscopereorder = False  # in the order of collection
    return Scheduling(config, log)
