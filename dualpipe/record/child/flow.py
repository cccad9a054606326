"""What happens on one rank, concluded from where its tensors come from.

A *forward* is a connected part of an autograd graph that begins at leaves: tensors that were received, loaded, or
detached from the previous stage.  It gets a number when the first module is called on those leaves, and every later
call on its output belongs to it.  Its *backward* is the first run of the autograd engine that starts from its output.
Its *weight gradient* is everything that adds to the ``.grad`` of a parameter, in that run or later.

One rank alone does not show the stage, the microbatch and the lane of a forward.  They are concluded afterwards from
the events of all ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import errors
from .applied import Kind, Made
from .arrivals import Arrivals
from .attempts import Attempts
from .buffers import Buffers
from .calls import Call
from .draws import Draws
from .forwards import Forwards, Trials
from .freed import Freed
from .gradients import Gradients
from .log import Sink, call_number, call_path, program_line
from .marks import NONE, Key, Marks, Table, key_of
from .origins import Origins, marks
from .outputs import Outputs
from .owed import Owed
from .parameters import Parameters, state_of
from .posts import Posted, Posts
from .runs import Runs

_COMPUTES = frozenset({"forward", "backward", "weights", "weights requested"})


def _only_shaped_like(operator: str) -> bool:
    """Whether an operator uses the shape of a tensor and none of its values."""
    return operator.endswith("_like") or operator.startswith("new_")


class Flow:
    """The state of one rank; every method handles one thing that the program does."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._table = Table()
        self._forwards = Forwards()
        self._trials = Trials()
        self.parameters = Parameters()
        self.posted: list[int] = []  # the messages of the last post
        # (forward, module, with gradients) -> the inputs of its calls
        self._given: dict[tuple[int, int, bool], set[tuple[Key | None, ...]]] = {}
        self._calls: list[Call] = []  # those that have not returned
        self._owed = Owed(self.write, self._forwards, self.parameters)
        self._engine_runs = Runs(self.write, self._table, self._forwards, self.parameters, self._owed)
        self.origins = Origins(self.write, self._table, self._forwards, self.parameters, self._engine_runs)
        self.attempts = Attempts(self.write, self._forwards)
        self._gradients = Gradients(self.write, self._table, self.parameters, self.origins, self._owed, self.attempts)
        self._outputs = Outputs(self._forwards, self._reach)
        self.freed = Freed(self._table)
        self._posts = Posts(self._table, self.origins, self.parameters, self.freed)
        self.context: Marks | None = None  # the marks of the module call or the run of the engine in progress
        self.calling = 0  # depth of module calls
        self._begun_with_grad = False  # whether the outermost one began with gradients enabled
        self.running = 0  # depth of runs of the engine
        self._thread = threading.get_ident()
        self.buffers = Buffers(self.write, self.freed)
        self.caller = ""  # the class of the module that is being called
        self.arrivals = Arrivals(self.write, self.origins)
        self.draws: Draws | None = None  # to be kept for a plain run
        self.made: Sequence[Made] = ()  # what a plain run does after every operator outside of modules
        self.together: frozenset[str] = frozenset()  # names of functions that overlap a forward with a backward
        self._events = self._polled_at = 0

    def write(self, event: str, **fields: Any) -> None:
        self._events += 1
        if event in _COMPUTES:
            fields["path"] = call_path()
            fields["together"] = call_number(self.together)
        self._sink({"event": event, "at": program_line(), **fields})
        self.attempts.wrote(event)

    def poll(self, messages: Sequence[int]) -> None:
        """The program has looked whether messages have completed, and they have not; repeated looks are one event."""
        if self._polled_at != self._events:
            self.write("poll", messages=list(messages))
            self._polled_at = self._events

    def on_own_thread(self) -> bool:
        """Whether this is the thread that computes, or a helper thread that waits on its behalf."""
        waiting_for = getattr(threading.current_thread(), "on_behalf_of", None)  # set by dualpipe's transport
        return (waiting_for or threading.get_ident()) == self._thread

    def find(self, forward: int) -> int:
        """The forward that one turned out to be a part of."""
        return self._forwards.find(forward)

    def within(self, context: Marks | None) -> Marks | None:
        """Enter a context, whose marks every new tensor gets; returns the previous context."""
        left, self.context = self.context, context
        return left

    # module calls

    def begin(self, module: nn.Module, inputs: Sequence[Tensor] | None) -> Call:
        """A module is called outside of other calls: with ``inputs``, to infer shapes (``[]``) or without tensors."""
        call = Call(module)
        self._calls.append(call)
        if inputs is not None:
            self._open(call, inputs)
        return call

    def _open(self, call: Call, inputs: Sequence[Tensor]) -> None:
        call.made = self.call(call.module, inputs) if inputs else None
        call.left, call.is_open = self.within(call.made), True
        self.calling, self.caller = 1, type(call.module).__qualname__
        self._begun_with_grad = torch.is_grad_enabled()

    def _open_inside(self, inputs: Sequence[Tensor]) -> None:
        """An operator runs in a module call without tensors, which may have its input as an attribute."""
        call = self._calls[-1]
        if call.is_open or call.communicates:
            return
        given = [tensor for tensor in inputs if tensor not in self.parameters]
        if any(map(call.holds, inputs)) or any(
            letter in "MC" for t in given for letter, _ in self.origins.carried_by(t)
        ):
            self._open(call, given or inputs)

    def end(self, call: Call) -> None:
        """The call has returned or raised."""
        self._calls.pop()
        if call.is_open:
            self.calling = 0
            self.within(call.left)

    def call(self, module: nn.Module, inputs: Sequence[Tensor]) -> Marks:
        """An outermost module call begins; returns the marks of its results."""
        number, held = self.parameters.number(module)
        if held is not None:
            self.write("module", module=number, name=type(module).__qualname__, holds=held)
            for tensor in state_of(module):  # received weights are not input data
                self._table.put(tensor, NONE)
        continued: set[int] = set()
        messages: set[int] = set()
        detached_from: set[int] = set()
        detached: set[int] = set()
        arrived: set[int] = set()
        find = self._forwards.find
        for tensor in inputs:
            for letter, n in self.origins.carried_by(tensor):
                if letter == "M":
                    messages.add(n)
                elif letter == "C":
                    detached_from.add(find(n))
                elif letter == "U":
                    arrived.add(n)
                elif letter == "F":
                    continued.add(find(n))
                    if tensor.is_floating_point() and not self.origins.is_joined_by_graph(tensor, n):
                        detached.add(find(n))
        continued |= {find(self.origins.input_of[m]) for m in messages if m in self.origins.input_of}
        continued -= detached_from  # with a leaf from its output a new stage begins, whatever else it takes from there
        continued |= {find(self.origins.following[c]) for c in detached_from if c in self.origins.following}
        continued = self.origins.join(continued)
        if len(continued) > 1:  # a module that reads several microbatches at once is not a stage
            return marks("F", continued)
        forward = next(iter(continued)) if continued else self._forwards.open()
        again = None if continued or messages else self._trials.earlier(number, inputs, forward)
        self._forwards.called(forward, number)
        fresh, after = self.origins.take(forward, messages, detached_from)
        if not continued or fresh or after:
            began = {"first": not continued, "again": again, "grad": torch.is_grad_enabled()}
            self.write("forward", forward=forward, module=number, messages=fresh, after=after, **began)
        if arrived:
            self.write("arrival", forward=forward, arrivals=sorted(arrived), backward=False)
        if detached and torch.is_grad_enabled() and self.parameters.trainable({number}):
            self.write("doubt", what="detached", forward=forward)
        earlier = self._given.setdefault((forward, number, torch.is_grad_enabled()), set())
        given = tuple(map(key_of, inputs))
        if given in earlier:
            self.write("doubt", what="called again", forward=forward)
        earlier.add(given)
        return marks("F", {forward})

    def _take_inside(self, found: Marks) -> None:
        """The running module call has read tensors that are not among its arguments."""
        if not self.calling or self.context is None or len(self.context) != 1:
            return
        ((_, forward),) = self.context
        forward = self._forwards.find(forward)
        messages = (n for letter, n in found if letter == "M")
        detached_from = (self._forwards.find(n) for letter, n in found if letter == "C")
        fresh, after = self.origins.take(forward, messages, detached_from)
        if fresh or after:
            began = {"first": False, "again": None, "grad": torch.is_grad_enabled()}
            module = min(self._forwards.modules(forward))
            self.write("forward", forward=forward, module=module, messages=fresh, after=after, **began)

    def called(self, made: Marks, output: Any) -> None:
        """The outermost module call has returned."""
        if len(made) == 1:
            ((_, forward),) = made
            self.origins.returned(forward, (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)))
            nodes = self._outputs.returned(forward, output)
            self.buffers.called(nodes, self._forwards.find(forward))

    # runs of the autograd engine

    def run(self, roots: Sequence[Any], grads: Sequence[Any], inputs: Sequence[Any]) -> Marks:
        """The engine is about to run from ``roots``; returns the marks of its results."""
        held = frozenset(mark for g in grads if isinstance(g, Tensor) for mark in self._table.get(g))
        found = self._engine_runs.begin(roots, grads, inputs, partial(self.origins.owners, held))
        self._forwards.interrupt()
        if found and (arrived := sorted(number for letter, number in held if letter == "U")):
            self.write("arrival", forward=min(found), arrivals=arrived, backward=True)
        return marks("B", found)

    def makers(self, roots: Sequence[Any]) -> set[int]:
        """The forwards that made the roots of a run."""
        return {forward for root in roots for forward in self._engine_runs.makers(root)}

    def spares_weights(self) -> bool:
        """Whether the run of the engine in progress was requested for no gradient of a weight."""
        return self._engine_runs.spares_weights()

    def runs_for(self, forward: int) -> bool:
        """Whether the run of the engine in progress is the backward of a forward, or one of its backwards."""
        return self._engine_runs.runs_for(self._forwards.find(forward))

    def ran(self, completed: bool) -> None:
        """The engine has returned, or raised."""
        self._engine_runs.end(completed)
        self._gradients.note_replaced("found replaced")

    def _reach(self, forward: int, gradients: Sequence[Any]) -> None:
        """The engine is about to run the node of an output of a forward."""
        if self.running and (alone := self._engine_runs.reach(forward, gradients)):
            self.context = marks("B", alone)

    # operators and gradients

    def operator(self, kind: Kind, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """An operator has run: its results get the marks of the context, or else of its inputs."""
        if self._calls and not self.calling and not self.running:
            self._open_inside(inputs)
        if self.calling and self._begun_with_grad and self.context is not None and len(self.context) == 1:
            ((_, forward),) = self.context
            self._owed.read(forward, inputs)
        memory = {key[0]: tensor for tensor in inputs if (key := key_of(tensor))}
        for output in outputs:
            key = key_of(output)
            if key is None:
                continue
            for made in () if self.calling else self.made:
                made(kind, output, inputs)
            aliased = memory.get(key[0])
            if aliased is None and self.context is None:
                self._gradients.read(output, inputs)
                if output.numel() > 1:
                    self.parameters.note_copy(output, inputs)
            if aliased is None:
                found = NONE if _only_shaped_like(kind.name) else self.origins.carried(inputs)
                self._take_inside(found)
                transit = self._engine_runs.in_transit()
                received = frozenset(mark for mark in found if mark[0] == "M" and mark[1] in transit)
                self._table.put(output, found if self.context is None else self.context | received)
            elif not kind.mutable:
                continue  # a view has the marks of its memory
            elif self.context is not None:
                self._take_inside(self.origins.carried(inputs))
                self._table.put(output, self.context)
                if self.running and (held := self.parameters.held_in(output)):
                    for parameter in held:
                        self.parameters.add_to(parameter)
                    self._gradients.changed(kind)
            else:
                self._written(kind, output, inputs)

    def _written(self, kind: Kind, output: Tensor, inputs: list[Tensor]) -> None:
        """An operator outside of every context has written to a tensor in place."""
        key = key_of(output)
        carried = self.origins.carried([tensor for tensor in inputs if key_of(tensor) != key])
        held = self.parameters.held_in(output)
        if held:
            self._gradients.changed(kind)
            self._gradients.add(held, carried)
        else:
            self._gradients.read(output, inputs)
            self._table.put(output, carried if kind.replaces else self._table.get(output) | carried)

    def assigned(self, parameter: Tensor, gradient: Tensor | None) -> None:
        """The program has set ``parameter.grad``."""
        self._gradients.assigned(parameter, gradient, bool(self.running))

    def set_main_grad(self, parameter: Tensor) -> None:
        """The program has set ``parameter.main_grad``."""
        if parameter in self.parameters:
            self._gradients.set_main_grad(parameter)

    def stop(self) -> None:
        """Take back what was changed in the program's objects."""
        self.parameters.stop_listening()

    # errors

    def note_error(self, error: BaseException, what: str, numbers: Iterable[int], freed: str = "") -> None:
        """An error has left a module call (F), a run of the engine (B), a message (M) or a collective (C).

        ``freed`` is where the program had freed the output from which the engine was to run.
        """
        errors.note(error, what, numbers, freed)

    def raised(self, error: BaseException) -> None:
        """The program ends by an error."""
        self.write("raised", **errors.describe(error))

    # messages

    def post(self, messages: Sequence[Posted]) -> list[int]:
        """Messages are about to be posted together; returns their numbers."""
        posted = self._posts.add(messages)
        for (_, tensor, *_), message in zip(messages, posted, strict=True):
            self._outputs.sent(tensor, message["marks"])
        numbers = [message["message"] for message in posted]
        self._forwards.interrupt()
        self.posted = numbers
        self._engine_runs.sent |= {
            forward for m in posted if not m["weights"] and m["real"] for letter, forward in m["marks"] if letter == "B"
        }
        inside = ""
        if self.on_own_thread():
            self._engine_runs.post(numbers)
            for call in self._calls:
                call.communicates = True
            inside = self.caller if self.calling else "backward" if self.running else ""
        self.write("post", messages=posted, inside=inside, own=self.on_own_thread(), at=call_path())
        return numbers
