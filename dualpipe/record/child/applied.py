"""What one operator applies to what: which tensors it makes or writes to, and from which.

Most operators return what they make.  Others return nothing and write to their arguments, such as ``_foreach_add_``.
Those on lists apply one operation to the first tensors of all lists, to the second ones, and so on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

_ON_LISTS = ("_foreach", "_fused", "_amp_foreach")
_ADDS = frozenset({"add", "copy", "sub", "addcmul", "addcdiv"})
_REPLACES = frozenset({"copy", "set", "zero", "fill", "normal", "uniform", "random", "bernoulli"})


class Kind(NamedTuple):
    """What an operator does to the tensors that it writes to: it ``adds``, ``replaces`` their values, or ``zeroes``."""

    name: str
    mutable: bool
    adds: bool
    replaces: bool
    zeroes: bool


Made = Callable[[Kind, Tensor, Sequence[Tensor]], None]
"""Called with an operator, a tensor that it has made or written to, and its inputs."""


@functools.cache
def kind_of(func: Any) -> Kind:
    schema = func._schema
    name = schema.name.rpartition("::")[2]
    base = name.removeprefix("_foreach_").rstrip("_")
    out = any(each.kwarg_only and each.alias_info and each.alias_info.is_write for each in schema.arguments)
    return Kind(name, schema.is_mutable, base in _ADDS, out or base in _REPLACES, base == "zero")


def applied(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """The inputs and the outputs of each operation that an operator has applied."""
    on_lists, written = _form(func)
    if not on_lists and not written:
        yield [*tensors(args), *tensors(kwargs.values())], [*tensors((output,))]
        return
    given = {
        argument.name: args[at] if at < len(args) else kwargs.get(argument.name)
        for at, argument in enumerate(func._schema.arguments)
    }
    made = [each for name, each in given.items() if name in written] if written else [output]
    read = [each for name, each in given.items() if name not in written]
    if not on_lists:
        yield [*tensors(read)], [*tensors((output,))]
        for each in tensors(made):
            yield [*tensors(read), each], [each]
        return
    lists = [each for each in (*read, *made) if isinstance(each, (list, tuple))]
    for at in range(max(map(len, lists), default=0)):
        inputs = [*tensors(_at(each, at) for each in given.values())]
        yield inputs, [*tensors(_at(each, at) for each in made)]


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of an operator, which are nested only in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)


@functools.cache
def _form(func: Any) -> tuple[bool, frozenset[str]]:
    """Whether an operator works on lists, and the arguments that it writes to and does not return.

    What torch's own operators write beside their results is a state of their module, as that of a batch norm.
    """
    schema = func._schema
    on_lists = schema.name.rpartition("::")[2].startswith(_ON_LISTS)
    if schema.returns and func.namespace == "aten":
        return on_lists, frozenset()
    returned = {name for each in schema.returns if each.alias_info for name in each.alias_info.before_set}
    written = {
        each.name
        for each in schema.arguments
        if each.alias_info and each.alias_info.is_write and returned.isdisjoint(each.alias_info.before_set)
    }
    return on_lists, frozenset(written)


def _at(value: Any, at: int) -> Any:
    """The part of an argument for one operation: its element, if the argument is a list."""
    return (value[at] if at < len(value) else None) if isinstance(value, (list, tuple)) else value
