"""Flags that commands share, and the values that they take."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from pecker_fast import config_file
from pecker_fast.blocks import Block
from pecker_fast.classes import ClassLabel
from pecker_fast.errors import FileFormatError
from pecker_fast.regions import Region

BLOCK_HELP = "row, element, auto, or OUTxIN such as 64x64 ({})"


class Parser(argparse.ArgumentParser):
    """Errors in one line; exact flags only, so that a mistyped one is never taken for another."""

    def __init__(self, **settings: Any) -> None:
        """Arguments are ``ArgumentParser``'s."""
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is, and end with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As ``ArgumentParser``, with what ``--config`` names before the arguments of the command line."""
        if args is not None and "--config" in self._option_string_actions:
            try:
                args = config_file.expand(self, args)
            except FileFormatError as error:
                self.exit(3, f"{self.prog}: error: {error}\n")
            except ValueError as error:
                self.error(str(error))
        return super().parse_known_args(args, namespace)


def new_command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """A command with the flags that all have, and an example under its help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML with values of flags, which flags override")
    parser.set_defaults(parser=parser)
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout, and nothing else there")
    parser.add_argument("--dry_run", action="store_true", help="show settings, sizes and files to write; touch nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no report")
    return parser


def overwrite_flag(parser: argparse.ArgumentParser) -> None:
    """Whether an older result may go."""
    parser.add_argument("--overwrite", action="store_true", help="replace an older result of this command")


def source_flag(parser: argparse.ArgumentParser) -> None:
    """The model to start from."""
    parser.add_argument(
        "--pretrained_model_name_or_path",
        type=Path,
        required=True,
        metavar="DIR",
        help="the diffusion model's folder",
    )


def forget_flag(parser: Any, default: list[int] | None = None, *, required: bool | None = None) -> None:
    """Classes to forget, required unless there is a default; ``required`` says otherwise."""
    shown = f" ({default[0]})" if default else ""
    parser.add_argument(
        "--forget_class",
        type=class_label,
        nargs="+",
        default=default,
        required=default is None if required is None else required,
        metavar="C",
        help=f"classes to forget, by number or name{shown}",
    )


def override_flag(parser: argparse.ArgumentParser) -> None:
    """What takes their place."""
    parser.add_argument(
        "--override_class",
        type=class_label,
        nargs="+",
        metavar="C",
        help="what to draw instead: one for each, or one for all",
    )


def retain_flag(parser: Any) -> None:
    """What is kept."""
    parser.add_argument(
        "--retain_class",
        type=class_label,
        nargs="+",
        metavar="C",
        help="classes that are kept and looked at (all that are not forgotten)",
    )


def density_flag(parser: argparse.ArgumentParser, default: float | None) -> None:
    """How many weights train."""
    shown = "" if default is None else f" ({default:g})"
    parser.add_argument(
        "--mask_density",
        "--density",
        type=float,
        default=default,
        metavar="X",
        help=f"share of all weights that train, above 0 and at most 1{shown}",
    )


def mask_flags(parser: argparse.ArgumentParser, kinds: tuple[str, ...]) -> None:
    """Which weights train; what is not given is left to ``MaskConfig``."""
    add = parser.add_argument
    add("--mask", choices=kinds, help="which weights train (saliency)")
    density_flag(parser, None)
    add("--block", type=block, metavar="BLOCK", help=BLOCK_HELP.format("auto"))
    add(
        "--mask_scope",
        choices=("global", "layer"),
        help="rank over the whole network or within layers (layer)",
    )
    add("--mask_region", type=region, metavar="REGION", help="encoder, middle, decoder, or PREFIX,PREFIX... (all)")
    add("--mask_norms", type=on_off, metavar="{on,off}", help="whether norms may train (on)")
    add("--mask_budget", choices=("parameters", "flops"), help="what the density is a share of (parameters)")
    add("--mask_rank", choices=("weight", "flop"), help="saliency per weight, or per FLOP of its gradient (weight)")
    add("--mask_accumulate", choices=("signed_sum", "abs", "square"), help="how gradients add up (signed_sum)")
    add("--mask_batches", type=positive_int, metavar="N", help="batches of the saliency pass (8)")
    add("--mask_batch_size", type=positive_int, metavar="N", help="samples in each (forget_batch_size)")
    add("--mask_lr_scale", choices=("none", "density", "mass"), help="scale the learning rate to the mask (mass)")
    add("--mask_lr_scale_max", type=positive_float, metavar="X", help="by at most this (no limit)")
    losses = ("noise_prediction", "distillation", "forget_specific")
    add("--saliency", choices=losses, help="whose gradient says what matters (noise_prediction)")
    add("--saliency_warmup", type=int, metavar="N", help="updates of the fake score before the last two look (20)")


def switch_flags(parser: argparse.ArgumentParser) -> None:
    """How an iteration computes; what is not given is left to the preset."""
    add = parser.add_argument
    add("--preset", choices=("published", "exact", "fast"), help="what switches not given are (exact)")
    add("--merge_batches", type=on_off, metavar="{on,off}", help="retained and forgotten samples in one batch")
    add("--closed_form_loss", type=on_off, metavar="{on,off}", help="SiD's loss and gradient in one pass")
    add("--skip_frozen", type=on_off, metavar="{on,off}", help="no gradients into what is frozen")
    add("--reuse_generator_forward", type=on_off, metavar="{on,off}", help="one forward for both updates")
    add("--stop_gradient", type=on_off, metavar="{on,off}", help="follow the score difference as it is")


def checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Checkpoints on the way, in the output folder."""
    add = parser.add_argument
    add("--checkpointing_steps", type=positive_int, metavar="N", help="write a checkpoint every N steps (never)")
    add("--checkpoints_total_limit", type=positive_int, metavar="N", help="remove the oldest beyond N (keep all)")
    add("--resume_from_checkpoint", metavar="DIR", help="continue from this checkpoint, or from the latest one")


def storage_flags(parser: argparse.ArgumentParser) -> None:
    """How weights are stored."""
    add = parser.add_argument
    add("--save_dtype", choices=("float16", "bfloat16"), help="round weights to this for storing (as they are)")
    add("--max_shard_size", type=size, metavar="SIZE", help="no file of weights is larger, such as 16MB (one file)")


def cache_flags(parser: argparse.ArgumentParser) -> None:
    """The networks of the digits."""
    parser.add_argument(
        "--cache_dir", type=Path, metavar="DIR", help="where the trained digits model and judge are kept"
    )
    parser.add_argument("--short", action="store_true", help="tiny trainings, to see that everything works")


def device_flag(parser: argparse.ArgumentParser) -> None:
    """Where the networks run."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto: CUDA if there is any)"
    )


def on_off(text: str) -> bool:
    """A switch."""
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"expected on or off, got {text!r}")
    return text == "on"


def class_label(text: str) -> ClassLabel:
    """A class's number, or its name; ``index:2`` and ``name:2`` say which, where that is not clear."""
    return int(text) if re.fullmatch(r"-?(0|[1-9][0-9]*)", text) else text


def size(text: str) -> int:
    """Bytes: an integer, perhaps with KB, MB, GB, KiB, MiB or GiB."""
    units = {"": 1}
    for power, prefix in enumerate("KMG", 1):
        units |= {f"{prefix}B": 1000**power, f"{prefix}iB": 1 << (10 * power)}
    number = text.rstrip("KMGiB")
    unit = text[len(number) :]
    if not number.isdecimal() or int(number) < 1 or unit not in units:
        raise argparse.ArgumentTypeError(f"expected a size such as 16MB, got {text!r}")
    return int(number) * units[unit]


def positive_int(text: str) -> int:
    """An integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """An integer from 0 that torch takes as a seed."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**63 - 1, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def share(text: str) -> float:
    """A number from 0, below 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0, below 1, got {text!r}")
    return value


def region(text: str) -> Region:
    """A region's name, or prefixes of weights' names."""
    if text in ("all", "encoder", "middle", "decoder"):
        return text  # type: ignore[return-value]
    prefixes = tuple(text.split(","))
    if not all("." in prefix for prefix in prefixes):
        raise argparse.ArgumentTypeError(
            f"expected all, encoder, middle, decoder, or prefixes of names such as up.0.,norm_out., got {text!r}"
        )
    return prefixes


def block(text: str) -> Block:
    """A block's name, or its size as OUTxIN."""
    if text in ("row", "element", "auto"):
        return text  # type: ignore[return-value]
    out, _, inside = text.partition("x")
    if not (out.isdecimal() and inside.isdecimal() and int(out) and int(inside)):
        raise argparse.ArgumentTypeError(f"expected row, element, auto or OUTxIN such as 64x64, got {text!r}")
    return int(out), int(inside)
