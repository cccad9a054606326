"""All planted faults, in the order in which they are shown, and the harmless changes."""

from ci.faults import megatron, megatron_step, recorder, runtime, schedules, weights
from ci.faults.fault import Edit, SourceFault, harmless

FAULTS: tuple[SourceFault, ...] = (
    *schedules.FAULTS,
    *runtime.FAULTS,
    *weights.FAULTS,
    *megatron.FAULTS,
    *megatron_step.FAULTS,
    *recorder.FAULTS,
)

HARMLESS: tuple[SourceFault, ...] = (
    harmless(
        "a comment",
        "dualpipe/runtime/executor.py",
        "class Executor:\n",
        "# one object a step, and none is kept\nclass Executor:\n",
    ),
    harmless(
        "another title of a page of the documentation",
        "docs/decisions/0002-the-phase-table.md",
        "# 2. DualPipe is a table of phases\n",
        "# 2. DualPipe is a table of phases, once more\n",
    ),
    harmless(
        "a local variable renamed",
        "dualpipe/page/numbers.py",
        '    more = after - before\n    return f"{100 * more:+.1f} points" if percent else f"{more:+g}"',
        '    change = after - before\n    return f"{100 * change:+.1f} points" if percent else f"{change:+g}"',
    ),
    harmless(
        "in the phase tables a receive put before a send of the same slot",
        "dualpipe/schedule/generate.py",
        '"5 forwards end", N - h - 1, "B1+W1 SB1 RF1 RB0',
        '"5 forwards end", N - h - 1, "B1+W1 RF1 SB1 RB0',
        Edit(
            "dualpipe/schedule/generate.py",
            '"5 forwards end", N - h - 1, "B1 SB1 RF1 RB0 W',
            '"5 forwards end", N - h - 1, "B1 RF1 SB1 RB0 W',
        ),
    ),
)

PLANTED = (*FAULTS, *HARMLESS)
"""Everything that ``make museum`` plants."""
