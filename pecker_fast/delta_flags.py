"""Arguments of ``pecker-fast delta`` and its actions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pecker_fast.flags import new_command, overwrite_flag

_EXAMPLES = """example:
  pecker-fast delta extract --before teacher --after out/model --mask_path out/mask.safetensors --output_dir three
  pecker-fast delta apply --model teacher --delta three five --output_dir edited
  pecker-fast delta revert --model edited --delta three --output_dir only_five
  pecker-fast delta info --delta three five"""


def delta_command(commands: Any) -> None:
    """The command with its four actions."""
    summary = "what an erasure changed, as a small file that is applied and taken back"
    parser = commands.add_parser(
        "delta", help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=_EXAMPLES
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for add in (_extract, _apply, _revert, _info):
        add(actions)


def _extract(actions: Any) -> None:
    parser = new_command(
        actions,
        "extract",
        "keep what changed from one model folder to another",
        "pecker-fast delta extract --before teacher --after out/model \\\n"
        "      --mask_path out/mask.safetensors --output_dir three",
    )
    add = parser.add_argument
    add("--before", type=Path, required=True, metavar="DIR", help="the base's model folder, or pipeline")
    add("--after", type=Path, required=True, metavar="DIR", help="the trained model's folder, or pipeline")
    add("--mask_path", type=Path, required=True, metavar="FILE", help="the mask that it was trained with")
    add("--name", metavar="NAME", help="of the delta, for messages (the name of its folder)")
    _output_flag(parser, "the delta's folder to write")


def _apply(actions: Any) -> None:
    parser = new_command(
        actions,
        "apply",
        "apply one delta or several to a model",
        "pecker-fast delta apply --model teacher --delta three five --output_dir edited",
    )
    _model_flags(parser)


def _revert(actions: Any) -> None:
    parser = new_command(
        actions,
        "revert",
        "take one delta or several back out of a model",
        "pecker-fast delta revert --model edited --delta three --output_dir only_five",
    )
    _model_flags(parser)


def _info(actions: Any) -> None:
    parser = new_command(
        actions,
        "info",
        "what deltas hold, and whether several change different weights",
        "pecker-fast delta info --delta three five",
    )
    _deltas_flag(parser)


def _model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a model folder, or pipeline")
    _deltas_flag(parser)
    _output_flag(parser, "the model folder to write")


def _deltas_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--delta", type=Path, nargs="+", required=True, metavar="DIR", help="folders of deltas")


def _output_flag(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help=text)
    overwrite_flag(parser)
