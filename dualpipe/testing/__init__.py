"""Record a pipeline inside the processes that run it, for tests.

    from dualpipe.testing import record

    with record() as recording:          # on every rank, after init_process_group
        train_one_step()
    schedule = recording.gather().schedule

    from dualpipe.testing import record_ranks

    schedule = record_ranks(4, body).schedule       # forks 4 ranks, each calls body(rank)

``dualpipe.testing.pytest_plugin`` provides ``record_ranks`` as a pytest fixture.  ``dualpipe record`` records a program
in a file of its own, without any change to it.
"""

from dualpipe.testing.ranks import record_ranks
from dualpipe.testing.recorder import LiveRecording, record

__all__ = ["LiveRecording", "record", "record_ranks"]
