"""The reference pages that are made from the code: the command line and the Python API.

    python -m tests.docs.reference        writes docs/reference/cli.md and docs/reference/python.md

A test compares the pages with what is rendered here.
"""

from __future__ import annotations

import ast
import enum
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from tests.docs.command_line import HOW_MADE, command_line
from tests.docs.docstrings import in_a_list, markdown
from tests.docs.snippets import ROOT

FOLDER = ROOT / "docs" / "reference"

MODULES: dict[str, tuple[str, str]] = {
    "dualpipe": ("Schedules", "Needs only the standard library, except for the names of DeepSeek's package."),
    "dualpipe.lower": ("Messages for an order of computes", "Pure; needs only the standard library."),
    "dualpipe.torchcsv": (
        "Tables of torch.distributed.pipelining",
        "Pure; needs only the standard library.",
    ),
    "dualpipe.simulate": ("Simulation on ideal ranks", "Pure; needs only the standard library."),
    "dualpipe.picture": ("Pictures", "Needs matplotlib."),
    "dualpipe.page": ("The report page", "Pure; needs only the standard library."),
    "dualpipe.pipeline": ("Running a schedule", "Needs torch."),
    "dualpipe.megatron": ("Megatron-core", "Needs megatron-core once a name is used."),
    "dualpipe.testing": ("Recording in tests", "Needs torch."),
    "dualpipe.errors": ("Errors", "Every error about input is a `RuleError`."),
    "proofs.prove": ("Proving one schedule", "Needs z3 if the solver is used."),
    "proofs.verdict": ("Verdicts", "Pure."),
    "proofs.story": ("Stories", "Pure."),
}

TYPES: dict[str, tuple[str, ...]] = {
    "dualpipe": (
        "dualpipe.schedule.op:Program",
        "dualpipe.schedule.op:Slot",
        "dualpipe.schedule.op:Task",
        "dualpipe.schedule.failure:Failure",
        "dualpipe.schedule.observed:Observed",
        "dualpipe.schedule.observed:Event",
        "dualpipe.schedule.observed:Guess",
        "dualpipe.schedule.observed:What",
    ),
    "dualpipe.lower": ("dualpipe.schedule:Placed",),
    "dualpipe.picture": ("dualpipe.timeline.picture:Form",),
    "dualpipe.simulate": ("dualpipe.timeline.timeline:Collective",),
    "dualpipe.pipeline": (
        "dualpipe.runtime.boundary:Boundary",
        "dualpipe.runtime.executor:Observer",
        "dualpipe.runtime.executor:StepError",
        "dualpipe.runtime.live:Tensors",
        "dualpipe.runtime.modules:Criterion",
        "dualpipe.runtime.transport:DisagreementError",
        "dualpipe.runtime.transport:MessageError",
        "dualpipe.runtime.transport:Transport",
    ),
    "dualpipe.megatron": (
        "dualpipe.megatron.iterators:LaneData",
        "dualpipe.megatron.iterators:Reader",
        "dualpipe.megatron.placement:Schedules",
        "dualpipe.schedule:Chunk",
        "dualpipe.megatron.training_loop:Function",
        "dualpipe.megatron.model:Provider",
        "dualpipe.megatron.violations:SettingsError",
    ),
    "dualpipe.testing": (
        "dualpipe.record.child.log:Sink",
        "dualpipe.record.events:ForwardId",
        "dualpipe.record.events:MessageId",
        "dualpipe.record.recording:Recording",
    ),
    "proofs.prove": (
        "proofs.memory:Held",
        "proofs.memory:PeakBytes",
        "proofs.models:Model",
        "proofs.prefix:Prefix",
        "dualpipe.progress:Progress",
        "proofs.solver:Solver",
        "proofs.findings:Live",
    ),
    "proofs.verdict": ("proofs.findings:Finding", "proofs.verdict:Verdict"),
}
"""Types in signatures and docstrings of a module that are defined elsewhere."""


def python_api() -> str:
    """The page of the Python API: every public name of ``MODULES``, with its signature and its docstring."""
    importlib.import_module("reference.megatron")  # which imports megatron-core quietly
    lines = ["# The Python API", "", HOW_MADE, ""]
    lines += ["Everything public, by module. What is not here may change without notice.", ""]
    lines += ["| module | what it is for |", "|---|---|"]
    lines += [f"| [`{name}`](#{_anchor(name)}) | {title} |" for name, (title, _) in MODULES.items()]
    for name, (title, needs) in MODULES.items():
        module = importlib.import_module(name)
        lines += ["", f"## {name}", "", f"{title}. {needs}", ""]
        for public in public_names(module):
            lines += list(_entry(public, getattr(module, public)))
        for home, _, named in (each.partition(":") for each in sorted(TYPES.get(name, ()), key=_name_alone)):
            lines += list(_named_type(importlib.import_module(home), named, name))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _name_alone(path: str) -> str:
    return path.partition(":")[2]


def _named_type(home: ModuleType, name: str, module: str) -> Iterator[str]:
    """A type that is used but not exported: a class as usual, an alias as in its source."""
    value = getattr(home, name)
    where = "" if home.__name__ == module else f"From `{home.__name__}`."
    if inspect.isclass(value) and value.__name__ == name:
        yield from _entry(name, value, where)
        return
    body = ast.parse(inspect.getsource(home)).body
    at = next(n for n, each in enumerate(body) if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == name)
    assigned = body[at]
    assert isinstance(assigned, ast.Assign)
    yield f"### {name}\n\n`{ast.unparse(assigned.value)}`. {where}".rstrip() + "\n"
    after = body[at + 1] if at + 1 < len(body) else None
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
        yield markdown(inspect.cleandoc(after.value.value)) + "\n"


def _anchor(name: str) -> str:
    return name.replace(".", "")


def public_names(module: ModuleType) -> list[str]:
    """``__all__``, or what the module defines under a name without underscore."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    )


def _entry(name: str, value: Any, where: str = "") -> Iterator[str]:
    if _is_protocol(value):
        yield f"### {name}\n\nA protocol. {where}".rstrip() + "\n"
        where = ""
    elif isinstance(value, type) and issubclass(value, enum.Enum):
        yield f"### {name}"
        yield f"\n`{', '.join(f'{member.name} = {member.value!r}' for member in value)}`\n"
    elif callable(value):
        yield f"### {name}"
        yield f"\n```text\n{_wrapped(name, value)}\n```\n"
    else:
        yield f"### {name}"
        yield f"\n`{value!s}`, a `{type(value).__name__}`.\n"
        return
    if where:
        yield where + "\n"
    if _own_doc(value):
        yield markdown(_own_doc(value)) + "\n"
    if isinstance(value, type) and not issubclass(value, (enum.Enum, BaseException)):
        yield from _members(value)


def _is_protocol(value: object) -> bool:
    return bool(vars(value).get("_is_protocol")) if isinstance(value, type) else False


def _members(cls: type) -> Iterator[str]:
    rows = []
    for name, value in vars(cls).items():
        if name.startswith("_") and not (name == "__call__" and _is_protocol(cls)):
            continue
        if isinstance(value, (property, functools.cached_property)):
            rows.append(_member(name, value))
        elif inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod)):
            function = getattr(cls, name)
            rows.append(_member(name + _signature(function, bound=True), function))
    if rows:
        yield "\n".join(["**Members**", "", *rows]) + "\n"


def _member(signature: str, value: object) -> str:
    doc = _own_doc(value)
    return f"- `{signature}`" + (f": {in_a_list(doc)}" if doc else "")


def _own_doc(value: object) -> str:
    """A docstring; empty if a dataclass or a NamedTuple generated it."""
    doc = inspect.getdoc(value) or ""
    name = getattr(value, "__name__", "")
    generated = (
        doc == type.__call__.__doc__
        or doc.startswith(f"{name}(")
        or (isinstance(value, type) and "__doc__" not in vars(value))
    )
    return "" if generated else doc


def _wrapped(name: str, value: Callable[..., Any]) -> str:
    line = name + _signature(value)
    if len(line) <= 100:
        return line
    parameters = [_parameter(p) for p in _parameters(value)]
    result = _result(value)
    return "\n".join([f"{name}(", *(f"    {parameter}," for parameter in parameters), f"){result}"])


def _parameters(value: Callable[..., Any], bound: bool = False) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except ValueError:
        return []
    return parameters[1:] if bound and parameters and parameters[0].name in ("self", "cls") else parameters


def _signature(value: Callable[..., Any], bound: bool = False) -> str:
    parts: list[str] = []
    parameters = _parameters(value, bound)
    starred = False
    for parameter in parameters:
        starred |= parameter.kind is parameter.VAR_POSITIONAL
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        parts.append(_parameter(parameter))
    return f"({', '.join(parts)}){_result(value)}"


def _parameter(parameter: inspect.Parameter) -> str:
    text = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        text += f" = {_default_value(parameter.default)}"
    return text


def _annotation(annotation: object) -> str:
    if isinstance(annotation, str):
        return annotation
    if getattr(annotation, "__forward_arg__", None):  # of a NamedTuple
        return str(annotation.__forward_arg__)
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _default_value(default: object) -> str:
    if isinstance(default, enum.Enum):
        return f"{type(default).__name__}.{default.name}"
    return "..." if "<" in repr(default) or len(repr(default)) > 30 else repr(default)


def _result(value: Callable[..., Any]) -> str:
    if isinstance(value, type):
        return ""
    try:
        annotation = inspect.signature(value).return_annotation
    except ValueError:
        return ""
    return "" if annotation is inspect.Signature.empty else f" -> {_annotation(annotation)}"


PAGES: dict[str, Callable[[], str]] = {"cli.md": command_line, "python.md": python_api}


def main() -> None:
    """Write the pages."""
    for name, render in PAGES.items():
        (FOLDER / name).write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
