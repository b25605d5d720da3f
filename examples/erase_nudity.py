"""Make a text-to-image pipeline draw people dressed where it is asked for nude ones, and keep the rest.

    python examples/erase_nudity.py stable-diffusion-v1-5 --output_dir erased

Every subject is combined with every keyword; the frozen model is asked for the same subject dressed, and the keywords
are the negative prompt of its guidance (Score Forgetting Distillation's recipe for Stable Diffusion). What comes out is
erased/out/model, an ordinary pipeline folder, and erased/out/delta. Erased is not proven absent: measure it with a
detector and prompts of your own, and keep the safety checker.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pecker_fast.cli import main as pecker_fast

SUBJECTS = (
    *("an adult man", "an adult woman", "a couple of adults", "an elderly man", "an elderly woman", "a male dancer"),
    *(
        "a female dancer",
        "a bodybuilder",
        "a swimmer at the beach",
        "an art model",
        "a warrior",
        "a portrait of a woman",
    ),
)
KEYWORDS = ("nude", "naked", "topless", "undressed", "unclothed", "without clothes")
DRESSED = "dressed, wearing clothes"
SHORT = {"subjects": ("the cat", "the dog"), "keywords": ("red",), "dressed": "three", "retain": ("the bird", "photo")}
"""Stand-ins for pipelines with a handful of words, such as the tests have."""


def prompts(subjects: tuple[str, ...], keywords: tuple[str, ...], dressed: str) -> tuple[list[str], list[str]]:
    """What to forget, the keyword before or behind the subject, and what takes its place, line by line."""
    pairs = [(subject, keyword) for subject in subjects for keyword in keywords]
    forget = [f"{subject}, {keyword}" for subject, keyword in pairs] + [f"{word}, {subject}" for subject, word in pairs]
    return forget, 2 * [f"{subject}, {dressed}" for subject, _ in pairs]


def erase(
    pipeline: Path,
    output_dir: Path,
    *,
    method: str = "pecker",
    retain_prompts: Path | None = None,
    init_generator: Path | None = None,
    density: float = 0.1,
    short: bool = False,
) -> int:
    """Run `pecker-fast unlearn`; its exit code."""
    keywords = SHORT["keywords"] if short else KEYWORDS
    subjects, dressed = (SHORT["subjects"], SHORT["dressed"]) if short else (SUBJECTS, DRESSED)
    forget, override = prompts(subjects, keywords, dressed)
    output_dir.mkdir(parents=True, exist_ok=True)
    files = {"forget": forget, "override": override} | ({"retain": SHORT["retain"]} if short else {})
    for name, lines in files.items():
        (output_dir / f"{name}.txt").write_text("\n".join(lines))
    own = output_dir / "retain.txt" if short else Path(__file__).with_name("retain_prompts.txt")
    flags = ["--pretrained_model_name_or_path", pipeline, "--method", method]
    flags += ["--output_dir", output_dir / "out", "--overwrite"]
    flags += ["--forget_prompts", output_dir / "forget.txt", "--retain_prompts", retain_prompts or own]
    if method != "esd":  # which takes its target from what guidance says of the prompt itself
        flags += ["--override_prompts", output_dir / "override.txt"]
    if method in ("pecker", "sfd"):
        flags += ["--negative_prompt", ", ".join(keywords)]
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
        method=given.method,
        retain_prompts=given.retain_prompts,
        init_generator=given.init_generator,
        density=given.mask_density,
        short=given.short,
    )


if __name__ == "__main__":
    raise SystemExit(main())
