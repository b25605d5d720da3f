"""What benchmarks/cifar10_gpu.sh does besides running commands: it tells what is left, and makes images up."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def left(part: str, out: Path) -> tuple[bool, str]:
    """Whether a part is done, and what there is to say."""
    if part == "compare":
        return runs_left(out)
    path = out / part / {"teacher": "pretrain.json", "judge": "judge.json"}[part]
    if not path.exists():
        return False, "not begun"
    report = json.loads(path.read_text(encoding="utf-8"))
    if part == "judge":
        return True, f"right on {report['held_out_accuracy']:.1%} of held-out images"
    done, steps, seconds = report["steps_done"], report["steps"], report["seconds"]
    per_step = f"{1e3 * seconds / done:.1f} ms a step"
    if done == steps:
        return True, f"all {steps} steps done in {seconds:.0f} s, {per_step}"
    return (
        False,
        f"{done} of {steps} steps done, {steps - done} left: {(steps - done) * seconds / done:.0f} s, {per_step}",
    )


def runs_left(out: Path) -> tuple[bool, str]:
    """Of the comparison, whose plan a dry run left."""
    plan = json.loads((out / "compare.plan.json").read_text(encoding="utf-8"))["settings"]
    path = out / "compare" / "runs.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    runs = [json.loads(line) for line in lines]
    texts, missing, seconds = [], 0, [run["seconds"] for run in runs if "seconds" in run]
    for phase, total in plan["runs"].items():
        own = [run for run in runs if run["phase"] == phase and run["method"] in plan["methods"]]
        if phase == "reported":
            own = [run for run in own if run["seed"] in plan["seeds"]]
        missing += total - len(own)
        texts.append(f"{len(own)} of {total} {phase} runs")
    slowest = f", training takes up to {max(seconds):.0f} s of each" if seconds else ""
    done = missing == 0 and (out / "compare" / "report.html").exists()
    return done, f"{' and '.join(texts)} done, {missing} left{slowest}"


def made_up(folder: Path, count: int = 60) -> None:
    """Noise in the form of CIFAR-10's binary version, for rehearsals."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for name in ("data_batch_1.bin", "test_batch.bin"):
        labels = np.arange(count, dtype=np.uint8)[:, None] % 10
        pixels = draw.integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(np.concatenate([labels, pixels], 1).tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    what = commands.add_parser("left")
    what.add_argument("part", choices=("teacher", "judge", "compare"))
    what.add_argument("out", type=Path)
    commands.add_parser("made_up").add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "made_up":
        made_up(options.folder)
        return 0
    done, text = left(options.part, options.out)
    print(text)
    return 0 if done else 5


if __name__ == "__main__":
    sys.exit(main())
