"""Write the tables of the README from the JSON files under benchmarks/results: no figure is typed by hand.

python -m pytest benchmarks/ --benchmark-only --rows benchmarks/results/cpu/kernels.json
pecker-fast demo --output_dir runs/demo && cp runs/demo/metrics.json benchmarks/results/cpu/demo.json
pecker-fast demo --mask_density 0.1 --output_dir runs/sparser  # and its metrics.json as demo_density_0.1.json
python benchmarks/report.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def kernels_table(results: dict[str, Any]) -> str:
    """One line a race."""
    head = ["what", "against", "density", "ours", "theirs", "ratio", "work, ours : theirs", "share of the limit"]
    rows = [
        [
            row["what"],
            row["against"],
            f"{row['density']:.2g}",
            f"{row['ours_ms']:.0f} ms",
            f"{row['theirs_ms']:.0f} ms",
            f"**{row['ratio']:.2f}x**",
            row["work"],
            row["share"],
        ]
        for row in results["rows"]
    ]
    return f"{_markdown(head, rows)}\n\n{results['machine']}; interleaved medians of one run."


def demo_table(metrics: dict[str, Any]) -> str:
    """The model before, and every run."""
    head = ["", "weights trained", "forgotten", "retained", "Fréchet distance", "steps to target", "seconds", "GFLOP"]
    before = metrics["before"]
    rows = [["before", "", *_quality(before), "", "", ""]]
    for name, run in metrics["runs"].items():
        trained = f"{run['trainable_parameters']:,} ({run['density']:.0%})"
        cost = [str(run["steps_to_target"] or "not reached"), f"{run['seconds']:.0f}", f"{run['flops'] / 1e9:.0f}"]
        rows.append([name, trained, *_quality(run), *cost])
    versions = metrics["versions"]
    note = (
        f"Digit {metrics['forget_class'][0]}, seed {metrics['seed']}; {versions['machine']}, torch {versions['torch']}."
    )
    return f"{_markdown(head, rows)}\n\n{note}"


def _quality(figures: dict[str, Any]) -> list[str]:
    low, high = figures["unlearning_accuracy_ci95"]
    forgotten = f"{figures['unlearning_accuracy']:.1%} ({low:.0%} to {high:.0%})"
    return [forgotten, f"{figures['retain_accuracy']:.1%}", f"{figures['frechet_distance']:.2f}"]


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLES = {
    "kernels": ("cpu/kernels.json", kernels_table),
    "demo": ("cpu/demo.json", demo_table),
    "sparser demo": ("cpu/demo_density_0.1.json", demo_table),
}


def render(readme: str) -> str:
    """The README with every table between its markers written anew."""
    for name, (file, table) in TABLES.items():
        begin, end = f"<!-- {name}: benchmarks/results/{file} -->", f"<!-- end of {name} -->"
        before, found, rest = readme.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{README}: expected the markers {begin} and {end}")
        results = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        readme = f"{before}{begin}\n{table(results)}\n{end}{after}"
    return readme


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    check = parser.parse_args().check
    old = README.read_text(encoding="utf-8")
    new = render(old)
    if check:
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
