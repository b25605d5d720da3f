"""Make a text-to-image pipeline forget a person, by the published recipe of Score Forgetting Distillation, masked.

    python examples/erase_celebrity.py stable-diffusion-v1-5 --person "Jane Example" --becomes "a middle aged woman"

writes out/model, an ordinary pipeline folder, and out/delta, which `pecker-fast delta` applies and reverts. The default
method makes a generator of one step; give it --init_generator, or it has to be distilled on the way. `--method esd`
edits the ordinary UNet of many steps instead. Erase people who want to be, and look at out/model before you rely on it:
erased is not proven absent.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pecker_fast.cli import main as pecker_fast

TEMPLATES = (
    *("{}", "a photo of {}", "a portrait of {}", "a close-up of {}", "a black and white photo of {}"),
    *("{} smiling", "{} with sunglasses", "{} wearing a suit", "{} in a winter coat", "{} with short hair"),
    *("{} in the street", "{} at the beach", "{} on a stage", "{} at an airport", "{} in a restaurant"),
    *("{} giving an interview", "{} riding a bicycle", "{} reading a book", "{} walking a dog", "{} playing chess"),
    *("an oil painting of {}", "a pencil drawing of {}", "a caricature of {}", "a statue of {}", "{} on a poster"),
)
"""Wherever the name stands: as a photo and as a drawing, at work and at leisure."""
SHORT_TEMPLATES = ("{}", "photo of {}")
SHORT_RETAIN = ("the bird", "photo of three", "red dog")
"""For pipelines with a handful of words, such as the tests have."""


def erase(
    pipeline: Path,
    output_dir: Path,
    person: str,
    becomes: str,
    *,
    method: str = "pecker",
    retain_prompts: Path | None = None,
    init_generator: Path | None = None,
    density: float = 0.1,
    short: bool = False,
) -> int:
    """Run `pecker-fast unlearn`; its exit code."""
    forget = output_dir / "forget.txt"
    retain = retain_prompts or Path(__file__).with_name("retain_prompts.txt")
    output_dir.mkdir(parents=True, exist_ok=True)
    forget.write_text("\n".join(template.format(person) for template in (SHORT_TEMPLATES if short else TEMPLATES)))
    if short and retain_prompts is None:
        retain = output_dir / "retain.txt"
        retain.write_text("\n".join(SHORT_RETAIN))
    flags = ["--pretrained_model_name_or_path", pipeline, "--method", method]
    flags += ["--output_dir", output_dir / "out", "--overwrite"]
    flags += ["--erase_concept", person, "--forget_prompts", forget, "--retain_prompts", retain]
    if method != "esd":  # which takes its target from what guidance says of the prompt itself
        flags += ["--override_concept", becomes]
    if method != "sfd":  # which trains every weight
        flags += ["--mask_density", density]
    if init_generator is not None:
        flags += ["--init_generator", init_generator]
    if short:  # else as many steps as the method has by default
        flags += ["--max_train_steps", 1, "--train_batch_size", 2]
        flags += ["--num_validation_images", 0, "--quiet", *([] if method == "sfd" else ["--mask", "random"])]
    return pecker_fast(["unlearn", *map(str, flags)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pipeline", type=Path, help="folder of a Stable Diffusion pipeline, as diffusers saves it")
    add("--person", required=True, help="the name to erase")
    add("--becomes", default="a middle aged man", help="what to draw in their place")
    add("--method", choices=("pecker", "sfd", "esd", "salun"), default="pecker")
    add("--init_generator", type=Path, help="of pecker and sfd: pipeline of a one-step generator to start from")
    add("--retain_prompts", type=Path, help="captions to keep (a few of our own)")
    add("--mask_density", type=float, default=0.1)
    add("--output_dir", type=Path, default=Path("erased"))
    add("--short", action="store_true", help="one step on few words, to see that it runs")
    given = parser.parse_args()
    return erase(
        given.pipeline,
        given.output_dir,
        given.person,
        given.becomes,
        method=given.method,
        retain_prompts=given.retain_prompts,
        init_generator=given.init_generator,
        density=given.mask_density,
        short=given.short,
    )


if __name__ == "__main__":
    raise SystemExit(main())
