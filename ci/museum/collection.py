"""All exhibits, in the order in which they are shown."""

from ci.museum import lowering, megatron, messages, runtime, tables, training, unharmed, weights
from ci.museum.exhibit import Exhibit

EXHIBITS: tuple[Exhibit, ...] = (
    *tables.FAULTS,
    *lowering.FAULTS,
    *runtime.FAULTS,
    *messages.FAULTS,
    *weights.FAULTS,
    *megatron.FAULTS,
    *training.FAULTS,
    *unharmed.CHANGES,
)
