"""Faults of the lowering, which adds messages to an order of computes."""

from ci.museum.exhibit import fault

LOWER = "dualpipe/schedule/lower.py"

FAULTS = (
    fault(
        2,
        "each side orders its messages by its own needs: sends when produced, receives when consumed",
        LOWER,
        "yield _Event((end, False, made.rank, made.position), ((made.rank, (send,)), (rank, (receive,))))",
        """yield _Event((end, False, made.rank, made.position), ((made.rank, (send,)),))
                    yield _Event((start, False, rank, made.position), ((rank, (receive,)),))""",
        check="prove",
        rule="messages",
        says="rank . expects the .* but the next message from rank . is the ",
    ),
    fault(
        0,
        "joined message slots in reverse order on one side",
        LOWER,
        "        program[-1] += slot",
        "        program[-1] = slot + program[-1] if slot[0].kind in RECEIVES else program[-1] + slot",
        check="prove",
        rule="messages",
        says="rank . expects the .* but the next message from rank . is the ",
    ),
    fault(
        0,
        "a message takes the receiver's place for the sender's",
        LOWER,
        "((made.rank, (send,)), (rank, (receive,)))",
        "((rank, (send,)), (made.rank, (receive,)))",
        check="prove",
        rule="order",
        says="rank 1 comes in slot 0 .* but that needs the forward .* which never comes on rank 1",
    ),
)
