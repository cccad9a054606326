"""For tests of a pipeline: record what its ranks do, inside the processes that run it.

    from dualpipe.testing import record

    with record() as recording:          # on every rank, after init_process_group
        train_one_step()
    schedule = recording.gather().schedule

    from dualpipe.testing import record_ranks

    schedule = record_ranks(4, body).schedule       # forks 4 ranks, each calls body(rank)

``dualpipe.testing.pytest_plugin`` offers ``record_ranks`` as a pytest fixture.  A program in a file of its own is
recorded with ``dualpipe record``, which needs no change to it.
"""

from dualpipe.testing.ranks import record_ranks
from dualpipe.testing.recorder import LiveRecording, record

__all__ = ["LiveRecording", "record", "record_ranks"]
