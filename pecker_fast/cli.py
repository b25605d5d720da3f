"""The command ``pecker-fast``: arguments in, one outcome or one clear error out.

Exit codes: 0 done, 2 usage (also settings that make no sense, or a package that is missing), 3 a file or
folder that cannot be read or written, 4 NaN or infinite values, 5 out of time with a checkpoint to go on from,
130 interrupted, 1 anything else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from pecker_fast.commands import Outcome
from pecker_fast.commands.notes import listening
from pecker_fast.commands.together import COMMANDS, UNEXPECTED, Ended, launched
from pecker_fast.commands.together import run as run_together
from pecker_fast.errors import FileFormatError, NonFiniteError, OutOfTimeError, PeckerFastWarning
from pecker_fast.parser import build_parser

USAGE, BAD_FILE, NON_FINITE, OUT_OF_TIME, INTERRUPTED = 2, 3, 4, 5, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    try:
        options, rest = build_parser().parse_known_args(_underscored(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:  # how argparse ends: help was asked for, or the usage is wrong
        return stop.code if isinstance(stop.code, int) else USAGE
    if rest:
        return _fail(options, f"unknown arguments: {' '.join(rest)} (see pecker-fast {options.command} --help)", USAGE)
    with _told(options):
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    """Run it, here or together with other processes, and report."""
    if not launched():
        return _report(_attempt(options), options)
    if options.command not in COMMANDS:
        return _fail(options, f"runs in one process; only {' and '.join(COMMANDS)} run in several", USAGE)
    try:
        ended = run_together(options, _attempt_quietly)
    except ValueError as error:  # what a launcher should have set is missing
        return _fail(options, error, USAGE)
    return _report(ended, options) if os.environ["RANK"] == "0" else ended.code


@contextmanager
def _told(options: argparse.Namespace) -> Iterator[None]:
    """Within the block the package's own warnings are one line each, told once, at once, and by one process of several.

    A training may take days from there. Other warnings come as ever.
    """
    told: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", PeckerFastWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if not issubclass(category, PeckerFastWarning):
                others(message, category, *where)
            elif os.environ.get("RANK", "0") == "0" and str(message) not in told:
                told.add(str(message))
                _warn(options, str(message))

        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _warn(options: argparse.Namespace, text: str) -> None:
    print(f"pecker-fast {options.command}: warning: {' '.join(text.split())}", file=sys.stderr)


def _attempt(options: argparse.Namespace) -> Ended:
    """Run the command; what users can mend comes back as a text and an exit code."""
    _start_dropout(options)
    try:
        # Imported only now, so that --help and usage errors come at once.
        with listening() as notes:
            outcome = importlib.import_module(f"pecker_fast.commands.{options.command}").run(options)
        return Ended(0, outcome=replace(outcome, notes=tuple(notes)))
    except KeyboardInterrupt as interrupt:
        return Ended(INTERRUPTED, f"interrupted; {str(interrupt) or 'nothing was written'}")
    except NonFiniteError as error:
        return Ended(NON_FINITE, str(error))
    except OutOfTimeError as error:
        return Ended(OUT_OF_TIME, str(error))
    except (FileFormatError, OSError) as error:
        return Ended(BAD_FILE, str(error))
    except (ValueError, TypeError, ImportError) as error:
        return Ended(USAGE, str(error))


def _start_dropout(options: argparse.Namespace) -> None:
    """Start torch's own generator, from which dropout draws, where the seed says: torch starts it anywhere."""
    rank = int(os.environ["RANK"]) if launched() else 0
    torch.manual_seed((getattr(options, "seed", None) or 0) + rank)


def _attempt_quietly(options: argparse.Namespace) -> Ended:
    """As ``_attempt``, and also what nobody expects comes back, for other processes to hear of it."""
    try:
        return _attempt(options)
    except Exception:
        return Ended(UNEXPECTED, traceback.format_exc())


def _report(ended: Ended, options: argparse.Namespace) -> int:
    """Print what came out, or what went wrong."""
    if ended.outcome is None:
        return _fail(options, ended.message, ended.code)
    if ended.outcome.warning is not None:
        _warn(options, ended.outcome.warning)
    try:
        _print(ended.outcome, options)
    except BrokenPipeError:  # the reader of stdout went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ended.code


def _print(outcome: Outcome, options: argparse.Namespace) -> None:
    if options.json:
        notes = {"notes": list(outcome.notes)} if outcome.notes else {}
        print(json.dumps({**outcome.values, **notes}, indent=2, default=str))
    elif not options.quiet:
        text = "\n".join(_lines(outcome.values, outcome.shown)) if outcome.text is None else outcome.text
        print("\n".join([text, *(f"note: {note}" for note in outcome.notes)]))


def _lines(values: Mapping[str, Any], shown: Mapping[str, str], indent: str = "") -> list[str]:
    """Nested values for people, one a line; those that are ``shown`` in another way as they are there."""
    lines: list[str] = []
    for key, value in values.items():
        if key in shown and not indent:
            lines.append(shown[key])
        elif isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, shown, indent + "  ")]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            lines.append(f"{indent}{key}: {text}")
    return lines


def _fail(options: argparse.Namespace, error: object, code: int) -> int:
    message = str(error) if code == UNEXPECTED else " ".join(str(error).split())  # a traceback keeps its lines
    print(f"pecker-fast {options.command}: error: {message}", file=sys.stderr)
    return code


def _underscored(argv: Sequence[str]) -> list[str]:
    """Flags with ``_`` for ``-``, so that both spellings are understood; values stay as they are."""
    arguments = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        known = flag.startswith("--") and len(flag) > 2
        arguments.append("--" + flag[2:].replace("-", "_") + equals + value if known else argument)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
