"""Events of ranks, written by hand in the recorder's format, to test what is concluded from them."""

from dualpipe.record import Recording, assemble_events
from dualpipe.schedule import show_slot


class Rank:
    """The events of one rank; a method that adds a forward or a message returns its number."""

    def __init__(self, rank: int, ranks: int = 2) -> None:
        self.events, self._rank, self._ranks = [], rank, ranks
        self._forwards = self._messages = self._runs = 0
        self._modules: set[int] = set()

    def _write(self, event: str, **fields) -> None:
        self.events.append({"event": event, **fields, "at": f"rank{self._rank}.py:{len(self.events)}"})

    def forward(self, *messages: int, after=(), module: int = 0, grad: bool = True) -> int:
        if module not in self._modules:
            self._modules.add(module)
            self._write("module", module=module, name="Linear", holds=[])
        began = {"first": True, "again": None, "grad": grad}
        number, self._forwards = self._forwards, self._forwards + 1
        self._write("forward", forward=number, module=module, messages=list(messages), after=list(after), **began)
        return number

    def backward(self, forward: int, *messages: int, weights: bool = True) -> None:
        self._runs += 1
        self._write("backward", forwards=[forward], run=self._runs, untrainable=[])
        if messages:
            self._write("gradients", forwards=[forward], messages=[list(messages)])
        if weights:
            self._write("weights", forwards=[forward], run=self._runs)

    def post(
        self,
        *messages: tuple[str, int, str, int | None],
        wait: bool = True,
        form: str = "float32[2, 4]",
        group: str = "0",
    ) -> list[int]:
        """Post messages together: send or receive, the peer, and for a send its content, such as ("F", 3)."""
        posted = []
        for kind, peer, letter, forward in messages:
            number, self._messages = self._messages, self._messages + 1
            marks = [] if forward is None else [(letter, forward)]
            posted.append(
                {
                    "message": number,
                    "kind": kind,
                    "peer": peer,
                    "group": list(range(self._ranks)),
                    "group_name": group,
                    "tag": 0,
                    "marks": marks,
                    "form": form,
                    "real": True,
                    "weights": [],
                    "memory": (number, 0),
                }
            )
        self._write("post", messages=posted, inside="")
        numbers = [message["message"] for message in posted]
        if wait:
            self._write("wait", messages=numbers, own=True)
        return numbers

    def send(self, peer: int, letter: str = "", forward: int | None = None, wait: bool = True) -> int:
        return self.post(("send", peer, letter, forward), wait=wait)[0]

    def receive(self, peer: int, wait: bool = True, form: str = "float32[2, 4]") -> int:
        return self.post(("receive", peer, "", None), wait=wait, form=form)[0]

    def reduce(self, number: int, name: str, group: list[int], module: int = 0) -> None:
        """An all-reduce of the gradient of a parameter; ``number`` counts the rank's collectives."""
        holds = {"form": ["float32[4]"], "modules": [module], "names": [name], "marks": [], "context": []}
        self._write("collective", collective=number, name="all_reduce", group=group, group_name="1", **holds)
        self._write("collect", collective=number)
        self._write("collected", collective=number)

    def step(self) -> None:
        self._write("step")

    def end(self) -> None:
        self._write("end")


def recorded(*ranks: Rank, end: bool = True, step: int = 1) -> Recording:
    """The recording of ranks, all of which have ended if ``end``."""
    for rank in ranks:
        if end:
            rank.end()
    return assemble_events({number: rank.events for number, rank in enumerate(ranks)}, step=step)


def lines(recording: Recording) -> list[str]:
    """The program of each rank, without the peers of messages."""
    programs = recording.schedule.programs
    return [" ".join(show_slot(tuple(op.bare for op in slot)) for slot in program) for program in programs]
