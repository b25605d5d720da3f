"""Flags of a command from a YAML file, and back: what a run was told, as a file that tells it again.

A file is one mapping from flags, without their dashes, to values. What it says is put before the arguments of the
command line, so that those win. Scalars are read as YAML 1.2 reads them: ``1e-5`` is a number, and ``on`` is a word.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import typing
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from pecker_fast.checkpoint import atomic_file
from pecker_fast.errors import FileFormatError

NAME = "config.yaml"
"""What a command's output folder calls the copy of its flags."""
MAX_BYTES = 64 * 1024
_LONGEST = 200
"""Characters of a value or of somebody else's message that an error quotes."""

_SCALARS = {
    "null": (r"~|null|", ["~", "n", ""]),
    "bool": (r"true|false", list("tf")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
}
_EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Numbers, texts, true, false, null, lists and mappings; a key that comes twice and an alias are refused."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if event.anchor is not None:  # aliases of aliases make megabytes out of a few bytes
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            problem = f"anchors and aliases are not read, write the value out: {sign}{_cut(event.anchor)}"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"{_shown(key.value)} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes what `_Loader` would take for something else."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}


_Dumper.add_representer(
    list, lambda to, values: to.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)
)
for _kind, (_pattern, _first) in _SCALARS.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), _first)


def expand(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """``arguments`` with those of the file that ``--config`` names before them.

    Args:
        parser: Of the command; it has the flag ``--config``.
        arguments: Of the command line. Flags that are among them take the place of the file's, and so do flags that
            cannot be given together with them.

    Raises:
        FileFormatError: The file is missing, too long, or not a YAML mapping.
        ValueError: It has a key that is no flag of this command, a value of another type than its flag takes, or is for
            another command.
    """
    path = _named(arguments)
    if path is None or "--help" in arguments or "-h" in arguments:
        return list(arguments)
    values = read(path)
    command = " ".join(parser.prog.split()[1:])
    if values.pop("command", command) != command:
        raise ValueError(f"{path}: is for another command than {command}; see its key command")
    flags = _flags(parser)
    chosen: dict[argparse.Action, list[str]] = {}
    for key, value in values.items():
        action = flags.get(key.replace("-", "_"))
        if action is None:
            near = difflib.get_close_matches(key.replace("-", "_"), flags, 1)
            raise ValueError(f"{path}: unknown key {_cut(key)}{f'; did you mean {near[0]}?' if near else ''}")
        if action in chosen:
            raise ValueError(f"{path}: {key} is given twice, by two of its names: {', '.join(action.option_strings)}")
        chosen[action] = [] if value is None else _tokens(f"{path}: {key}", action, value)
    overridden = _overridden(parser, arguments)
    return [token for action, tokens in chosen.items() if action not in overridden for token in tokens] + list(
        arguments
    )


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read one YAML mapping with texts as keys; nothing but plain values is ever made of it.

    Raises:
        FileFormatError: The file is missing, longer than 64 KiB, not YAML, has a key twice, or holds something else.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > MAX_BYTES:
        raise FileFormatError(f"{path}: longer than {MAX_BYTES} bytes, which no configuration is")
    try:
        values = yaml.load(content.decode("utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: not YAML that is read here ({_problem(error)})") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        got = type(values).__name__ if not isinstance(values, dict) else f"the keys {_shown(list(values))}"
        raise FileFormatError(f"{path}: expected a mapping from flags to values, got {got}")
    return values


def write(
    folder: str | os.PathLike[str],
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    *,
    shown: str | os.PathLike[str] | None = None,
) -> None:
    """Write every flag with its value to ``config.yaml`` in a folder, so that ``--config`` runs the same again.

    Args:
        folder: Where to.
        parser: Of the command.
        options: Its flags.
        shown: What the folder will be called, if it is another name.

    Raises:
        FileFormatError: It cannot be written.
    """
    path = Path(folder) / NAME
    values = {"command": " ".join(parser.prog.split()[1:]), **resolved(parser, options)}
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=120, allow_unicode=True)
    with atomic_file(path) as unfinished:
        try:
            unfinished.write_text(f"# {parser.prog} --config {Path(shown or folder) / NAME}\n{text}", encoding="utf-8")
        except OSError as error:
            raise FileFormatError(f"{path}: cannot be written ({error.strerror})") from error


def resolved(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """Every flag of a command with the value that ``options`` has, as plain YAML values."""
    names: dict[argparse.Action, str] = {}
    for name, action in _flags(parser).items():
        names.setdefault(action, name)
    return {name: _plain(action, getattr(options, action.dest)) for action, name in names.items()}


def _named(arguments: Sequence[str]) -> str | None:
    """What ``--config`` names; the last one counts, as for all flags."""
    path = None
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--config":
            path = value if equals else next(iter(arguments[index + 1 :]), None)
    return path


def _flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Flag without its dashes -> what it does, for all that a file may have."""
    return {
        option.removeprefix("--").replace("-", "_"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and action.dest not in ("help", "config") and not _is_negation(action, option)
    }


def _is_negation(action: argparse.Action, option: str) -> bool:
    return isinstance(action, argparse.BooleanOptionalAction) and option.startswith("--no-")


def _overridden(parser: argparse.ArgumentParser, arguments: Iterable[str]) -> set[argparse.Action]:
    """Flags of the command line, and those that exclude one of them."""
    options = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    given = {action for action in parser._actions if options & set(action.option_strings)}
    groups = [set(group._group_actions) for group in parser._mutually_exclusive_groups]
    return given.union(*(group for group in groups if group & given))


def _tokens(where: str, action: argparse.Action, value: Any) -> list[str]:
    """What the command line would say."""
    flag = next(option for option in action.option_strings if option.startswith("--"))
    if action.nargs == 0:
        _check_type(where, (bool,), value)
        if isinstance(action, argparse.BooleanOptionalAction) and not value:
            return [next(option for option in action.option_strings if _is_negation(action, option))]
        return [flag] if value else []
    if action.nargs in (None, "?"):
        return [f"{flag}={_text(where, action, value)}"]
    values = value if isinstance(value, list) else [value]
    if not values and action.nargs != "*":
        raise ValueError(f"{where}: expected at least one value, got an empty list")
    return [flag, *(_text(where, action, one) for one in values)]


def _text(where: str, action: argparse.Action, value: Any) -> str:
    """One value as text, after a look at what the flag makes of it."""
    kinds = _kinds_of(action)
    if kinds == (bool,):
        kinds, value = (str,), ("on" if value else "off") if isinstance(value, bool) else value
    _check_type(where, kinds, value)
    text = repr(value) if isinstance(value, float) else str(value)
    convert = action.type if callable(action.type) else str
    try:
        converted = convert(text)
    except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: {_cut(str(error))}") from error
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"{where}: expected one of {', '.join(map(str, action.choices))}, got {_shown(value)}")
    return text


def _kinds_of(action: argparse.Action) -> tuple[type, ...]:
    """Some of int, float, bool (a switch, on or off) and str, by what the flag's type returns."""
    if action.type in (int, float):
        return (typing.cast(type, action.type),)
    if action.type is None or isinstance(action.type, type):
        return (str,)
    returned = typing.get_type_hints(action.type).get("return")
    kinds = typing.get_args(returned) or (returned,)  # a class is a number or a name
    return kinds if set(kinds) <= set(_EXPECTED) else (str,)


def _check_type(where: str, kinds: tuple[type, ...], value: object) -> None:
    fits = type(value) in ((int, float) if kinds == (float,) else kinds)
    if not fits:
        expected = " or ".join(_EXPECTED[kind] for kind in kinds)
        raise ValueError(f"{where}: expected {expected}, got {_shown(value)}")


def _problem(error: Exception) -> str:
    """What a parser says, with the line."""
    text = " ".join(str(getattr(error, "problem", None) or error).split())
    mark = getattr(error, "problem_mark", None)
    return _cut(text) if mark is None else f"line {mark.line + 1}: {_cut(text)}"


def _shown(value: object) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _plain(action: argparse.Action, value: Any) -> Any:
    """The value that a file has to hold."""
    if isinstance(value, list) and action.nargs not in (None, "?"):
        return [_plain(action, one) for one in value]
    if action.nargs == 0 and not isinstance(action, argparse.BooleanOptionalAction):
        return value == action.const
    if isinstance(value, tuple):  # a block such as 64x64, or prefixes of names
        return ("x" if all(isinstance(part, int) for part in value) else ",").join(map(str, value))
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
