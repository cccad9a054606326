"""Record the schedule of any torch.distributed program: what its ranks computed and sent, as a schedule file.

    launch  ->  child                ->  events  ->  lineage, routes  ->  naming, slots  ->  recording
    starts the   in every rank: watches   read        stages, lanes,       ops of            a Schedule,
    command      torch, writes events     back        microbatches         messages, slots   notes, caveats

The ranks only write events.  That a tensor is microbatch 3 of stage 2 is concluded afterwards from the events of all
ranks.
"""

from dualpipe.record.events import RecordError, read_folder
from dualpipe.record.launch import End, Launch, run
from dualpipe.record.pipelines import assemble_all
from dualpipe.record.recording import Recording, assemble, assemble_events

__all__ = [
    "End",
    "Launch",
    "RecordError",
    "Recording",
    "assemble",
    "assemble_all",
    "assemble_events",
    "read_folder",
    "run",
]
