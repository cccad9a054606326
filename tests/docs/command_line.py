"""The reference page of the command line, made from the application itself."""

from __future__ import annotations

import enum
import inspect
import re
import types
import typing
from typing import Any

import typer

from dualpipe.cli import app

HOW_MADE = "<!-- made by `make docs`; edit what it is made from, not this page -->"


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
    """The names of an option with its kind of value; for an argument its metavar."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}`"
    names = ", ".join(f"`{name}`" for name in sorted(parameter.opts, key=len))
    value = parameter.metavar or _value(annotation)
    return f"{names} {value}".rstrip()


def _value(annotation: Any) -> str:
    """The kind of value of an option; empty for a switch."""
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


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")
