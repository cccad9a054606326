"""Records the schedule of somebody else's program: what its ranks computed and sent, as a schedule file.

    launch  ->  child (in every rank: events)  ->  events  ->  lineage  ->  naming  ->  recording
    starts the      watches torch, knows no        read     stages, lanes,  messages,    a Schedule
    command         schedule                       back     microbatches    slots        and notes

The ranks only write down what happens; that a tensor is microbatch 3 of stage 2 is concluded afterwards, from the
events of all ranks.
"""

from dualpipe.record.events import RecordError, read_folder
from dualpipe.record.launch import End, Launch, run
from dualpipe.record.recording import Recording, assemble, assemble_events

__all__ = ["End", "Launch", "RecordError", "Recording", "assemble", "assemble_events", "read_folder", "run"]
