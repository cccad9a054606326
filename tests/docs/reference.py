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
import types
import typing
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import typer

from dualpipe.cli import app
from tests.docs.docstrings import in_a_list, markdown
from tests.docs.snippets import ROOT

FOLDER = ROOT / "docs" / "reference"
HOW_MADE = "<!-- made by `make docs`; edit what it is made from, not this page -->"

MODULES: dict[str, tuple[str, str]] = {
    "dualpipe": ("Schedules", "Needs the standard library alone, the names of DeepSeek's package aside."),
    "dualpipe.lower": ("Messages for an order of computes", "Pure; needs the standard library alone."),
    "dualpipe.torchcsv": (
        "Tables of torch.distributed.pipelining",
        "Pure; needs the standard library alone.",
    ),
    "dualpipe.simulate": ("Simulation on ideal ranks", "Pure; needs the standard library alone."),
    "dualpipe.picture": ("Pictures", "Needs matplotlib."),
    "dualpipe.page": ("The report page", "Pure; needs the standard library alone."),
    "dualpipe.pipeline": ("Running a schedule", "Needs torch."),
    "dualpipe.megatron": ("Megatron-core", "Needs megatron-core once a name is used."),
    "dualpipe.testing": ("Recording in tests", "Needs torch."),
    "dualpipe.errors": ("Errors", "Every error about input is a `RuleError`."),
    "proofs.prove": ("Proving one schedule", "Needs z3 where the solver is asked."),
    "proofs.verdict": ("Verdicts", "Pure."),
    "proofs.story": ("Stories", "Pure."),
}

TYPES: dict[str, tuple[str, ...]] = {
    "dualpipe": ("dualpipe.schedule.op:Program", "dualpipe.schedule.op:Slot"),
    "dualpipe.lower": ("dualpipe.schedule:Placed",),
    "dualpipe.picture": ("dualpipe.timeline.picture:Form",),
    "dualpipe.pipeline": (
        "dualpipe.runtime.executor:Boundary",
        "dualpipe.runtime.executor:Observer",
        "dualpipe.runtime.executor:StepError",
        "dualpipe.runtime.executor:Tensors",
        "dualpipe.runtime.modules:Criterion",
        "dualpipe.runtime.transport:DisagreementError",
        "dualpipe.runtime.transport:MessageError",
        "dualpipe.runtime.transport:Transport",
    ),
    "dualpipe.megatron": (
        "dualpipe.megatron.iterators:LaneData",
        "dualpipe.megatron.training_loop:Function",
        "dualpipe.megatron.model:Provider",
        "dualpipe.megatron.rules:SettingsError",
    ),
    "dualpipe.testing": ("dualpipe.record.child.log:Sink", "dualpipe.record.recording:Recording"),
    "proofs.prove": (
        "proofs.memory:Held",
        "proofs.memory:PeakBytes",
        "proofs.models:Model",
        "proofs.prefix:Prefix",
        "proofs.prove:Begin",
        "proofs.findings:Live",
    ),
    "proofs.verdict": ("proofs.findings:Finding", "proofs.verdict:Verdict"),
}
"""Types that signatures and docstrings of a module name, and that are at home in others."""


def command_line() -> str:
    """The page of the command line, from the application itself."""
    root: Any = typer.main.get_command(app)
    commands: dict[str, Any] = dict(sorted(root.commands.items()))
    lines = ["# The command line", "", HOW_MADE, "", *_prose(root.help), ""]
    lines += ["| command | what it does |", "|---|---|"]
    lines += [f"| [`{name}`](#dualpipe-{name}) | {_first_sentence(command)} |" for name, command in commands.items()]
    lines += ["", *_table(root.params, "option", {})]
    for name, command in commands.items():
        types_of = typing.get_type_hints(inspect.unwrap(command.callback))
        lines += [f"## dualpipe {name}", "", *_prose(command.help), ""]
        groups: dict[str, list[Any]] = {}
        for parameter in command.params:
            groups.setdefault(parameter.rich_help_panel or parameter.param_type_name, []).append(parameter)
        for title, parameters in groups.items():
            lines += _table(parameters, title, types_of)
        lines += _examples(command.epilog or "")
    return "\n".join(lines).rstrip() + "\n"


def _first_sentence(command: Any) -> str:
    return _cell(inspect.cleandoc(command.help).split("\n\n")[0])


def _prose(help_text: str) -> list[str]:
    """Help as Markdown: ``0: proved`` are rows of a table of exit codes, ``- `` items of a list."""
    lines: list[str] = []
    for line in inspect.cleandoc(help_text).replace("\f", "").splitlines():
        code = re.fullmatch(r"\s*([0-9]+): (.+)", line)
        if code:
            if lines and not lines[-1].startswith("|"):
                lines += ["", "| exit code | meaning |", "|---|---|"]
            lines.append(f"| {code[1]} | {_cell(code[2])} |")
        else:
            starts_list = line.startswith("- ") and lines and lines[-1] and not lines[-1].startswith("- ")
            after_table = line and lines and lines[-1].startswith("|")
            lines += ["", line] if starts_list or after_table else [line]
    return lines


def _table(parameters: list[Any], title: str, types_of: dict[str, Any]) -> list[str]:
    rows = [f"| {_names(p, types_of.get(p.name, bool))} | {_meaning(p)} | {_default(p)} |" for p in parameters]
    return [f"| {title} | meaning | default |", "|---|---|---|", *rows, ""]


def _names(parameter: Any, annotation: Any) -> str:
    """The names of an option and what it takes; of an argument what stands for it."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}`"
    names = ", ".join(f"`{name}`" for name in sorted(parameter.opts, key=len))
    told = parameter.metavar or _value(annotation)
    return f"{names} {told}".rstrip()


def _value(annotation: Any) -> str:
    """What an option of a type takes; nothing for a switch."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) in (typing.Union, list):
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
        return _value(annotation)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return " or ".join(f"`{member.value}`" for member in annotation)
    return {bool: "", int: "*integer*", float: "*number*", str: "*text*"}.get(annotation, "*path*")


_DEFAULT_IN_WORDS = re.compile(r"\s*\[default: (.+)\]$")


def _meaning(parameter: Any) -> str:
    return _cell(_DEFAULT_IN_WORDS.sub("", parameter.help or ""))


def _default(parameter: Any) -> str:
    if in_words := _DEFAULT_IN_WORDS.search(parameter.help or ""):
        return _cell(in_words[1])
    if isinstance(parameter.show_default, str):
        return _cell(parameter.show_default)
    if parameter.required:
        return "required"
    default = getattr(parameter.default, "value", parameter.default)
    return "" if default is None or default is False or not parameter.show_default else f"`{default}`"


def _examples(epilog: str) -> list[str]:
    commands = re.findall(r"\$ (dualpipe .*?)\[/", epilog)
    note = "<!-- not run: examples of the help, whose options are checked by tests/cli -->"
    return [note, "```bash", *commands, "```", ""] if commands else []


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
    """A type that is named and not exported: a class like any other, an alias as its source has it."""
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


def _member(told: str, value: object) -> str:
    doc = _own_doc(value)
    return f"- `{told}`" + (f": {in_a_list(doc)}" if doc else "")


def _own_doc(value: object) -> str:
    """A docstring; empty where a dataclass or a NamedTuple made it up."""
    doc = inspect.getdoc(value) or ""
    name = getattr(value, "__name__", "")
    made_up = (
        doc == type.__call__.__doc__
        or doc.startswith(f"{name}(")
        or (isinstance(value, type) and "__doc__" not in vars(value))
    )
    return "" if made_up else doc


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


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


PAGES: dict[str, Callable[[], str]] = {"cli.md": command_line, "python.md": python_api}


def main() -> None:
    """Write the pages."""
    for name, render in PAGES.items():
        (FOLDER / name).write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
