"""Faults of the phase tables and of their expansion.  The six checks must refuse them."""

from ci.museum.exhibit import Edit, fault

GENERATE, TABLE = "dualpipe/schedule/generate.py", "dualpipe/schedule/phase_table.py"

FAULTS = (
    fault(
        4,
        "two sends of one batch swapped",
        GENERATE,
        '"4 overlapped", H - 2 * N + h, "RF0 RB1 F0+B1+W1 SF0 SB1',
        '"4 overlapped", H - 2 * N + h, "RF0 RB1 F0+B1+W1 SB1 SF0',
        check="prove",
        rule="messages",
        says="rank . expects the .* but the next message from rank . is the ",
    ),
    fault(
        3,
        "in the middle, where both lanes go to one peer, two receives mixed up",
        GENERATE,
        '"F0 SF1 RB1 B1+W1 SF0 SB1 RF1 RB0 F1+B0+W0 SF1 SB0"',
        '"F0 SF1 RB1 B1+W1 SF0 SB1 RB0 RF1 F1+B0+W0 SF1 SB0"',
        check="prove",
        rule="messages",
        says="dualpipe-P2-M4: rank 1 expects the gradient .* but the next message from rank 0 is the activation",
    ),
    fault(
        34,
        "one receive too many on a middle rank",
        GENERATE,
        '"F0 SF0 RF0 RF1 F1"',
        '"F0 SF0 RF0 RF1 RF1 F1"',
        check="prove",
        rule="messages",
        says="rank . expects the .* but the next message from rank . is the ",
    ),
    fault(
        9,
        "a receive that nobody consumes",
        GENERATE,
        '"2 last", 1, "F0 SF0 RB0 B0+W0 SB0"',
        '"2 last", 1, "F0 SF0 RB0 B0+W0 SB0 RF0"',
        check="prove",
        rule="messages",
        says="1f1b-P2-M4: rank 1 waits .* as message 5 from rank 0, which sends only 4",
    ),
    fault(
        11,
        "W put off and never run",
        GENERATE,
        'Row("8 weights", h + 1, "W")',
        'Row("8 weights", h, "W")',
        check="prove",
        rule="complete",
        says="never computes the weight gradient",
    ),
    fault(
        10,
        "W taken from an empty queue",
        GENERATE,
        '"2 weights deferred", r, "F0 SF0 RB0 B0 SB0 RF0"',
        '"2 weights deferred", r, "F0 SF0 W RB0 B0 SB0 RF0"',
        check="generator",
        rule="schedule",
        says="row '2 weights deferred' runs a W and none is deferred",
    ),
    fault(
        25,
        "all forwards first: as many activations as microbatches",
        GENERATE,
        """ONE_F_ONE_B: Table = (
    Row("1 warm-up", P - r - 1, "RF0 F0 SF0"),""",
        """ONE_F_ONE_B: Table = (
    Row("1 warm-up", M - 1, "RF0 F0 SF0"),""",
        Edit(GENERATE, '"2 one forward, one backward", M - P + r,', '"2 one forward, one backward", M - M,'),
        Edit(GENERATE, '"3 cooldown", P - r - 1, "RB0 B0+W0 SB0"', '"3 cooldown", M - 1, "RB0 B0+W0 SB0"'),
        check="prove",
        rule="memory",
        says="1f1b-P1-M4: rank 0 holds 2 live activations in slot 1, and may hold 1 ",
    ),
    fault(
        33,
        "the mirror chunk used by the wrong lane on the second half of the ranks",
        GENERATE,
        "(UP, DOWN) if rank < half else (DOWN, UP)",
        "(UP, DOWN) if rank < half else (UP, DOWN)",
        check="prove",
        rule="complete",
        says="dualpipe-P2-M4: rank 1 runs .* but rank 0 holds that stage",
    ),
    fault(
        37,
        "the mirror chunk numbered as if it were at the rank's own place",
        GENERATE,
        "(Chunk(here, near), Chunk(there, ranks - 1 - near))",
        "(Chunk(here, near), Chunk(there, near))",
        check="prove",
        rule="complete",
        says="dualpipe-P2-M4: rank 0 runs .* of lane < .* but rank 1 holds that stage",
    ),
    fault(
        31,
        "stages placed in a loop for a V",
        GENERATE,
        "{UP: (*range(ranks), *reversed(range(ranks)))}",
        "{UP: (*range(ranks), *range(ranks))}",
        check="prove",
        rule="complete",
        says="dualpipev-P2-M4: rank 0 runs .* but rank 1 holds that stage",
    ),
    fault(
        8,
        "fewer microbatches than two a rank let through",
        GENERATE,
        """    _require_twice("dualpipe", ranks, microbatches)
""",
        "",
        check="generator",
        rule="schedule",
        says="repeats -1 times",
    ),
    fault(
        7,
        "forward receive and backward send not in one batch",
        TABLE,
        "messages += [(op(action, row), row) for action in step if action in exists]",
        "slots += [((op(action, row), row),) for action in step if action in exists]",
        check="prove",
        rule="deadlock",
        says="rank 0 waits in slot 3 .0SF1>. until rank 1 receives .* and rank 1 gets no further than slot 3",
    ),
    fault(
        1,
        "both sides send first, receives put off",
        TABLE,
        """                if messages:
                    slots.append(tuple(messages))
                    messages.clear()""",
        """                if messages:
                    for first in ("S", "R"):
                        part = tuple(item for item in messages if item[0].kind.startswith(first))
                        slots += [part] if part else []
                    messages.clear()""",
        check="prove",
        rule="deadlock",
        says="rank 0 waits in slot 3 .0SF1>. until rank 1 receives .* and rank 1 gets no further than slot 3",
    ),
    fault(
        0,
        "a stack where a queue was meant: the W that waited least is run first",
        TABLE,
        "oldest = deferred.popleft()",
        "oldest = deferred.pop()",
        check="prove",
        rule="accumulation",
        says="adds the weight gradient of microbatch",
    ),
)
