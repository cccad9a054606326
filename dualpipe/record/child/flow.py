"""What happens on one rank, told from where its tensors come from.

A *forward* is a connected piece of an autograd graph that begins at leaves: tensors received, loaded, or cut off from
the stage before with ``detach``.  It is given a number when the first module is called on those leaves, and every
later call on what it made goes on with it.  Its *backward* is the first run of the autograd engine that starts from
what it made; its *weight gradient* is whatever adds to the ``.grad`` of a parameter, in that run or later.

Which stage, microbatch and lane a forward is of cannot be seen from one rank.  It is found out afterwards, from the
events of all ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.distributed import distributed_c10d as c10d
from torch.utils._pytree import tree_leaves

from .forwards import Forwards, Parameters, Trials
from .log import Sink, place
from .tags import NONE, Key, Marks, Table, key_of

_NODE = "dualpipe.record"  # the name of a forward's number in a graph node's metadata
_RAN = "dualpipe.record.ran"  # in the metadata of a node from which the engine has run
_REPLACED = frozenset({"copy_", "set_", "zero_", "fill_", "normal_", "uniform_", "random_", "bernoulli_"})


def _only_shaped_like(operator: str) -> bool:
    """Whether an operator takes from a tensor its shape and none of its values."""
    return operator.endswith("_like") or operator.startswith("new_")


def _is_cut(tensor: Tensor) -> bool:
    """Whether autograd begins at a tensor, or at the one that it is a view of: whatever made it has another graph."""
    base = tensor if tensor._base is None else tensor._base
    return base.is_leaf and base.requires_grad


def marks(letter: str, numbers: Iterable[int]) -> Marks:
    return frozenset((letter, number) for number in numbers)


class Flow:
    """The state of the watch on one rank; every method is one thing that the program does."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._table = Table()
        self._forwards = Forwards()
        self._trials = Trials()
        self._parameters = Parameters()
        self._input_of: dict[int, int] = {}  # message -> the forward that takes it
        self._gradient_of: dict[int, int] = {}  # message -> the forward whose backward takes it
        self._cut: dict[int, int] = {}  # forward -> the one on this rank that takes its output
        self._messages = 0
        self._batches = 0
        self._batch_of: dict[int, int] = {}  # message -> the batch that it was posted in
        self._calls: dict[tuple[int, int, bool], set[tuple[Key | None, ...]]] = {}  # of a forward: the inputs of calls
        self._groups: dict[tuple[int, ...], list[Any]] = {}  # ranks -> the groups of them, in the order of first use
        self._runs = 0
        self._context: Marks | None = None
        self.calling = 0  # depth of module calls
        self.running = 0  # depth of runs of the engine
        self._thread = threading.get_ident()
        self.caller = ""  # the class of the module that is being called

    def write(self, event: str, **fields: Any) -> None:
        self._sink({"event": event, **fields, "at": place()})

    def on_own_thread(self) -> bool:
        """Whether this is the thread that computes, and no helper that waits for messages beside it."""
        waiting_for = getattr(threading.current_thread(), "on_behalf_of", None)  # dualpipe's own, which waits for it
        return (waiting_for or threading.get_ident()) == self._thread

    def within(self, context: Marks | None) -> Marks | None:
        """Enter a context, whose marks everything made gets; returns the one left."""
        left, self._context = self._context, context
        return left

    # module calls

    def call(self, module: nn.Module, inputs: Sequence[Tensor]) -> Marks:
        """A module is about to be called, from outside any other; the marks of what it will make."""
        number, held = self._parameters.number(module)
        if held is not None:
            self.write("module", module=number, name=type(module).__qualname__, holds=held)
            for tensor in (*module.parameters(), *module.buffers()):  # weights that were copied from a rank are no data
                self._table.put(tensor, NONE)
        going_on: set[int] = set()
        messages: set[int] = set()
        cuts: set[int] = set()
        detached: set[int] = set()
        find = self._forwards.find
        for tensor in inputs:
            for letter, n in self._carried_by(tensor):
                if letter == "M":
                    messages.add(n)
                elif letter == "C":
                    cuts.add(find(n))
                elif letter == "F":
                    going_on.add(find(n))
                    if tensor.is_floating_point() and not self._is_joined_by_graph(tensor, n):
                        detached.add(find(n))
        going_on |= {find(self._input_of[m]) for m in messages if m in self._input_of}
        going_on |= {find(self._cut[c]) for c in cuts if c in self._cut}
        going_on = self._join(going_on)
        if len(going_on) > 1:  # a module that looks at several microbatches at once is no stage
            return marks("F", going_on)
        forward = next(iter(going_on)) if going_on else self._forwards.open()
        again = None if going_on or messages else self._trials.earlier(number, inputs, forward)
        self._forwards.called(forward, number)
        fresh, new_cuts = self._take(forward, messages, cuts)
        if not going_on or fresh or new_cuts:
            began = {"first": not going_on, "again": again, "grad": torch.is_grad_enabled()}
            self.write("forward", forward=forward, module=number, messages=fresh, after=new_cuts, **began)
        if detached and torch.is_grad_enabled() and self._parameters.trainable({number}):
            self.write("doubt", what="detached", forward=forward)
        calls = self._calls.setdefault((forward, number, torch.is_grad_enabled()), set())
        given = tuple(map(key_of, inputs))
        if given in calls:
            self.write("doubt", what="called again", forward=forward)
        calls.add(given)
        return marks("F", {forward})

    def _take(self, forward: int, messages: Iterable[int], cuts: Iterable[int]) -> tuple[list[int], list[int]]:
        """Let a forward have the messages, and the forwards that its leaves are cut from, that none had so far."""
        fresh = sorted(m for m in messages if m not in self._input_of)
        new_cuts = sorted(c for c in cuts if c not in self._cut and c != forward)
        self._input_of |= dict.fromkeys(fresh, forward)
        self._cut |= dict.fromkeys(new_cuts, forward)
        for message in fresh:
            self._forwards.takes(forward, self._batch_of[message])
        return fresh, new_cuts

    def _take_inside(self, found: Marks) -> None:
        """A module that is being called has read tensors that were not among its arguments."""
        if not self.calling or self._context is None or len(self._context) != 1:
            return
        ((_, forward),) = self._context
        forward = self._forwards.find(forward)
        messages = (n for letter, n in found if letter == "M")
        cuts = (self._forwards.find(n) for letter, n in found if letter == "C")
        fresh, new_cuts = self._take(forward, messages, cuts)
        if fresh or new_cuts:
            began = {"first": False, "again": None, "grad": torch.is_grad_enabled()}
            module = min(self._forwards.modules(forward))
            self.write("forward", forward=forward, module=module, messages=fresh, after=new_cuts, **began)

    def called(self, made: Marks, output: Any) -> None:
        """The module has returned."""
        if len(made) == 1:
            ((_, forward),) = made
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                    leaf.grad_fn.metadata[_NODE] = forward  # type: ignore[index] # typed as a method, and a property
                    self._forwards.put_in_graph(self._forwards.find(forward))

    def _join(self, forwards: set[int]) -> set[int]:
        for first, part in list(self._forwards.join(forwards)):
            self.write("join", forward=first, part=part)
        return {self._forwards.find(f) for f in forwards}

    # runs of the autograd engine

    def run(self, roots: Sequence[Any], grads: Sequence[Any], inputs: Sequence[Any]) -> tuple[Marks, dict[int, Any]]:
        """The engine is about to run from ``roots``; the marks of what it will make, and the gradients before."""
        self._runs += 1
        held = frozenset(mark for g in grads if isinstance(g, Tensor) for mark in self._table.get(g))
        made_by = [self._made_by(root) for root in roots]
        found = {forward for made in made_by for forward in made}
        if found:
            takes = self._gradients(made_by, grads)
            fresh = sorted(found - self._forwards.behind)
            if not (inputs and all(map(self._is_weight, inputs))):
                if self._ran_before(roots):
                    self.write("doubt", what="run again", forward=min(found))
                if fresh:
                    self._forwards.behind.update(fresh)
                    weightless = [f for f in fresh if not self._parameters.trainable(self._forwards.modules(f))]
                    self.write("backward", forwards=fresh, run=self._runs, weightless=weightless)
            if takes:
                self.write("gradients", forwards=list(takes), messages=list(takes.values()))
            if any(map(self._is_weight, inputs)):
                self.write("weighed", forwards=sorted(found), run=self._runs)
        else:
            found = self._owners(held, None)
        self._forwards.interrupt()
        return marks("B", found), self._parameters.versions()

    def _gradients(self, made_by: Sequence[set[int]], grads: Sequence[Any]) -> dict[int, list[int]]:
        """The messages that bring each forward the gradient of one of its outputs, and that none had so far."""
        takes: dict[int, list[int]] = {}
        for made, gradient in zip(made_by, grads, strict=False):
            if not made or not isinstance(gradient, Tensor):
                continue
            for message in sorted(n for letter, n in self._table.get(gradient) if letter == "M"):
                if message not in self._gradient_of:
                    self._gradient_of[message] = min(made)
                    for forward in sorted(made):
                        takes.setdefault(forward, []).append(message)
        return takes

    def _ran_before(self, roots: Sequence[Any]) -> bool:
        """Whether the engine has run from one of the roots already; from now on it has from all of them."""
        nodes: list[Any] = [root.node if isinstance(root, GradientEdge) else root.grad_fn for root in roots]
        outputs = [root.output_nr for root in roots]
        before = False
        for node, output in zip(nodes, outputs, strict=True):
            if node is not None:
                ran = node.metadata.setdefault(_RAN, set())
                before = before or output in ran
                ran.add(output)
        return before

    def ran(self, made: Marks, before: dict[int, Any]) -> None:
        """The engine has returned."""
        holders = self._parameters.changed(before)
        changed = {f for _, f in made if any(self._forwards.calls_one_of(f, held) for held in holders)}
        if changed:
            self.write("weights", forwards=sorted(changed), run=self._runs)

    def _made_by(self, root: Tensor | GradientEdge) -> set[int]:
        """The forwards that a tensor was made by: over the graph, since a sent tensor's memory may be gone by now."""
        found: set[int] = set()
        seen: set[Any] = set()
        nodes: list[Any] = [root.node if isinstance(root, GradientEdge) else root.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            number = node.metadata.get(_NODE)
            if number is None:
                nodes.extend(following for following, _ in node.next_functions)
            else:
                found.add(self._forwards.find(number))
        if found or isinstance(root, GradientEdge):
            return found
        return {self._forwards.find(n) for letter, n in self._table.get(root) if letter == "F"}

    def _is_weight(self, wanted: Any) -> bool:
        if isinstance(wanted, GradientEdge):
            wanted = getattr(wanted.node, "variable", None)
        return wanted in self._parameters

    # operators and gradients

    def operator(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """An operator has run: its results get the marks of the work that it belongs to, or else of its inputs."""
        mutable, name = func._schema.is_mutable, func._schema.name.rpartition("::")[2]
        memory = {key[0]: tensor for tensor in inputs if (key := key_of(tensor))}
        for output in outputs:
            key = key_of(output)
            if key is None:
                continue
            aliased = memory.get(key[0])
            if aliased is None:
                found = NONE if _only_shaped_like(name) else self._carried(inputs)
                self._take_inside(found)
                self._table.put(output, found if self._context is None else self._context)
            elif not mutable:
                if not self._table.get(output):
                    self._table.put(output, self._carried_by(aliased))
            elif self._context is not None:
                self._table.put(output, self._context)
            else:
                self._written(name, output, inputs)

    def _written(self, name: str, output: Tensor, inputs: list[Tensor]) -> None:
        """An operator outside all work has written to a tensor in place."""
        key = key_of(output)
        carried = self._carried([tensor for tensor in inputs if key_of(tensor) != key])
        parameter = self._parameters.with_gradient_at(key)
        if parameter is not None:
            self._weights(parameter, carried)
        else:
            self._table.put(output, carried if name in _REPLACED else self._table.get(output) | carried)

    def _carried(self, inputs: list[Tensor]) -> Marks:
        """The marks that results get from inputs; parameters and their gradients, which forwards share, give none."""
        carried = [
            (tensor, self._carried_by(tensor))
            for tensor in inputs
            if tensor not in self._parameters and self._parameters.with_gradient_at(key_of(tensor)) is None
        ]
        found = frozenset(mark for _, held in carried for mark in held)
        if len(found) > 1 and not any(letter == "B" for letter, _ in found):
            self._join(
                {
                    self._forwards.find(number)
                    for tensor, held in carried
                    for letter, number in held
                    if letter == "F" and self._is_joined_by_graph(tensor, number)
                }
            )
        return found

    def _carried_by(self, tensor: Tensor) -> Marks:
        """The marks of one tensor, as what is computed from it gets them."""
        found = self._table.get(tensor)
        if found and _is_cut(tensor):
            return frozenset(("C" if letter == "F" else letter, number) for letter, number in found)
        return found

    def _is_joined_by_graph(self, tensor: Tensor, forward: int) -> bool:
        """Whether what is computed from a tensor now goes on with the forward that made it.

        The autograd graph says so.  Of a forward without one, frozen or without gradients, everything goes on.
        """
        within = tensor.requires_grad and torch.is_grad_enabled()
        return within or not self._forwards.is_in_graph(self._forwards.find(forward))

    def assigned(self, parameter: Tensor, gradient: Tensor | None) -> None:
        """The program has set ``parameter.grad``."""
        if gradient is None or parameter not in self._parameters:
            return
        if self._parameters.with_gradient_at(key_of(gradient)) == id(parameter):
            return  # the second half of `p.grad += g`
        found = self._table.get(gradient)
        self._parameters.note_gradient(parameter)
        if self.running == 0:
            self._weights(id(parameter), found)

    def _weights(self, parameter: int, found: Marks) -> None:
        forwards = self._owners(found, self._parameters.holders(parameter))
        if forwards:
            self.write("weights", forwards=sorted(forwards), run=None)

    def _owners(self, found: Marks, holders: set[int] | None) -> set[int]:
        """The forwards that marked tensors belong to, by gradients before activations, among those of a parameter."""
        by_letter: dict[str, set[int]] = {"B": set(), "F": set()}
        for letter, number in found:
            if letter == "M":
                if number in self._gradient_of:
                    by_letter["B"].add(self._forwards.find(self._gradient_of[number]))
                elif number in self._input_of:
                    by_letter["F"].add(self._forwards.find(self._input_of[number]))
            elif letter == "C":
                by_letter["F"].add(self._forwards.find(self._cut.get(number, number)))
            else:
                by_letter[letter].add(self._forwards.find(number))
        for forwards in by_letter.values():
            kept = {f for f in forwards if holders is None or self._forwards.calls_one_of(f, holders)}
            if kept:
                return kept
        return set()

    # messages

    def post(self, messages: list[tuple[str, Tensor, int, Any, int]]) -> list[int]:
        """Messages are about to be posted together: (send or receive, tensor, peer, group, tag)."""
        numbers, told = [], []
        self._batches += 1
        for kind, tensor, peer, group, tag in messages:
            number = self._messages
            self._messages += 1
            self._batch_of[number] = self._batches
            ranks, group_number = self._group(group)
            numbers.append(number)
            held = self._table.get(tensor) if kind == "send" else NONE
            told.append(
                {
                    "message": number,
                    "kind": kind,
                    "peer": peer,
                    "group": ranks,
                    "group_number": group_number,
                    "tag": tag,
                    "marks": sorted(
                        ("F" if letter == "C" else letter, n if letter == "M" else self._forwards.find(n))
                        for letter, n in held
                    ),
                    "memory": key_of(tensor),
                    "form": f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}",
                    "real": tensor.is_floating_point(),
                }
            )
            if kind == "receive":
                self._table.put(tensor, frozenset({("M", number)}))
        self._forwards.interrupt()
        inside = self.caller if self.calling else "backward" if self.running else ""
        self.write("post", messages=told, inside=inside)
        return numbers

    def _group(self, group: Any) -> tuple[list[int], int]:
        """The ranks of a process group, and which of this rank's groups with these ranks it is."""
        group = group or c10d._get_default_group()
        ranks = c10d.get_process_group_ranks(group)
        known = self._groups.setdefault(tuple(ranks), [])
        if not any(other is group for other in known):
            known.append(group)
        return ranks, next(n for n, other in enumerate(known) if other is group)
