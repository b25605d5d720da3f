"""The command ``pecker-fast``: arguments in, one outcome or one clear error out.

Exit codes: 0 done, 2 usage (also settings that make no sense, or a package that is missing), 3 a file or
folder that cannot be read or written, 4 NaN or infinite values, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from pecker_fast.commands import Outcome
from pecker_fast.errors import FileFormatError, NonFiniteError
from pecker_fast.parser import build_parser

USAGE, BAD_FILE, NON_FINITE, INTERRUPTED = 2, 3, 4, 130


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
    try:
        # Imported only now, so that --help and usage errors come at once.
        outcome = importlib.import_module(f"pecker_fast.commands.{options.command}").run(options)
        _print(outcome, options)
    except KeyboardInterrupt as interrupt:
        return _fail(options, f"interrupted; {str(interrupt) or 'nothing was written'}", INTERRUPTED)
    except NonFiniteError as error:
        return _fail(options, error, NON_FINITE)
    except BrokenPipeError:  # the reader of stdout went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FileFormatError, OSError) as error:
        return _fail(options, error, BAD_FILE)
    except (ValueError, TypeError, ImportError) as error:
        return _fail(options, error, USAGE)
    return 0


def _print(outcome: Outcome, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(outcome.values, indent=2, default=str))
    elif not options.quiet:
        print("\n".join(_lines(outcome.values)) if outcome.text is None else outcome.text)


def _lines(values: Any, indent: str = "") -> list[str]:
    """Nested values for people, one a line."""
    lines: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            lines.append(f"{indent}{key}: {shown}")
    return lines


def _fail(options: argparse.Namespace, error: object, code: int) -> int:
    message = " ".join(str(error).split())
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
