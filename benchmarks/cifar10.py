"""What benchmarks/cifar10_gpu.sh does besides running commands: what is left, the model card, and made-up images."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pecker_fast import models
from pecker_fast.commands.sample import draw
from pecker_fast.data import ImageData, load_dataset
from pecker_fast.metrics import FeatureStatistics, frechet_distance, wilson_interval

CARD = Path(__file__).with_name("cifar10_card.md")
REHEARSAL = "**A rehearsal: networks of no use, made to see that everything works. Its numbers mean nothing.**\n\n"
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCH = 500


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


def measure(out: Path, data: Path, images: int) -> dict[str, Any]:
    """The teacher's images as the judge sees them; real ones for comparison."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher, judge = (models.load(out / name, torch.float32).to(device) for name in ("teacher", "judge"))
    generation = models.load_config(out / "teacher")["generation"]
    train, test = (load_dataset(data, split=split) for split in ("train", "test"))
    labels = torch.arange(len(train.class_names)).repeat_interleave(images)
    drawn = ImageData(draw(teacher, generation, labels, 0), labels, train.class_names)
    seen = {name: look(judge, part, device) for name, part in (("drawn", drawn), ("train", train), ("test", test))}
    found = {"images": len(drawn), "ddim_steps": generation["steps"]}
    for name, (_, right) in seen.items():
        count = int(right.sum())
        found[f"{name}_accuracy"] = count / len(right)
        found[f"{name}_accuracy_ci95"] = list(wilson_interval(count, len(right)))
    for name in ("drawn", "train"):
        found[f"frechet_{name}_test"] = frechet_distance(seen[name][0], seen["test"][0])
    return found


@torch.no_grad()
def look(judge: Any, data: ImageData, device: torch.device) -> tuple[FeatureStatistics, torch.Tensor]:
    """Statistics of the judge's features, and which images it is right on."""
    statistics, right = FeatureStatistics(), []
    for images, labels in zip(data.images.split(BATCH), data.labels.split(BATCH), strict=True):
        features = judge.features(images.to(device).clamp(-1, 1))
        statistics.update(features)
        right.append(judge.head(features).argmax(1).cpu() == labels)
    return statistics, torch.cat(right)


def write_assets(out: Path, data: Path, images: int) -> None:
    """Both models, a sheet of images and the card in OUT/assets, made aside and renamed once they are complete."""
    aside = out / "assets.new"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name in ("teacher", "judge"):
        shutil.copytree(out / name, aside / name)
    measured = measure(out, data, images)
    (aside / "measured.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    (aside / "README.md").write_text(card(aside, measured), encoding="utf-8")
    shutil.rmtree(out / "assets", ignore_errors=True)
    aside.rename(out / "assets")
    print((out / "assets" / "README.md").read_text(encoding="utf-8"))


def card(folder: Path, measured: dict[str, Any]) -> str:
    """The model card: the template, with what was measured."""
    reports = {
        n: json.loads((folder / n / f"{f}.json").read_text()) for n, f in (("teacher", "pretrain"), ("judge", "judge"))
    }
    counts = {f"{n}_parameters": sum(w.numel() for w in models.load(folder / n).parameters()) for n in reports}
    sizes = {f"{n}_mb": sum(f.stat().st_size for f in (folder / n).glob("*.safetensors")) / 1e6 for n in reports}
    restarts = reports["teacher"]["restarts"]
    values = {**measured, **{f"{n}_{key}": value for n, report in reports.items() for key, value in report.items()}}
    rehearsal = os.environ.get("PECKER_FAST_REHEARSE") == "1"
    return CARD.read_text(encoding="utf-8").format(
        **values | counts | sizes,
        rehearsal=REHEARSAL if rehearsal else "",
        restarted=f"after the steps {', '.join(map(str, restarts))}" if restarts else "never",
        epochs=reports["teacher"]["steps"] * reports["teacher"]["batch_size"] / reports["teacher"]["images"],
    )


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
    assets = commands.add_parser("assets")
    assets.add_argument("out", type=Path)
    assets.add_argument("data", type=Path)
    assets.add_argument("--images", type=int, default=500, help="of each class that the teacher draws")
    commands.add_parser("made_up").add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "left":
        done, text = left(options.part, options.out)
        print(text)
        return 0 if done else 5
    if options.command == "assets":
        write_assets(options.out, options.data, options.images)
    else:
        made_up(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
