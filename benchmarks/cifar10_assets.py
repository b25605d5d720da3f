"""OUT/assets of benchmarks/cifar10_gpu.sh: both models, what was measured of them, and a card that says it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from pecker_fast import models
from pecker_fast.commands.sample import draw
from pecker_fast.data import ImageData, load_dataset
from pecker_fast.metrics import FeatureStatistics, frechet_distance, wilson_interval

CARD = Path(__file__).with_name("cifar10_card.md")
REHEARSAL = "**A rehearsal: networks of no use, made to see that everything works. Its numbers mean nothing.**\n\n"
BATCH = 500


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
    """Both models and the card in OUT/assets, made aside and renamed once they are complete."""
    aside = out / "assets.new"
    for older in (aside, out / "assets"):  # first: OUT has no room for three copies of the weights
        shutil.rmtree(older, ignore_errors=True)
    aside.mkdir()
    for name in ("teacher", "judge"):
        shutil.copytree(out / name, aside / name)
    measured = measure(out, data, images)
    (aside / "measured.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    (aside / "README.md").write_text(card(aside, measured), encoding="utf-8")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=500, help="of each class that the teacher draws")
    options = parser.parse_args()
    write_assets(options.out, options.data, options.images)


if __name__ == "__main__":
    main()
