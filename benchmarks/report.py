"""Write the tables of README.md and docs/benchmarks.md from the JSON files under benchmarks/results.

No figure is typed by hand.

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
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"


def headlines_table(results: dict[str, Any]) -> str:
    """The races that matter most."""
    return kernels_table(results | {"rows": [row for row in results["rows"] if row["headline"]]})


def kernels_table(results: dict[str, Any]) -> str:
    """One line a race."""
    head = ["what", "against", "density", "ours", "theirs", "ratio", "work, ours : theirs", "share of the limit"]
    rows = [
        [
            row["what"],
            row["against"],
            f"{row['density']:.2g}",
            f"{row['ours_ms']:.{int(row['ours_ms'] < 10)}f} ms",
            f"{row['theirs_ms']:.{int(row['theirs_ms'] < 10)}f} ms",
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
    README: {
        "kernels": ("cpu/kernels.json", headlines_table),
        "demo": ("cpu/demo.json", demo_table),
        "sparser demo": ("cpu/demo_density_0.1.json", demo_table),
    },
    BENCHMARKS: {"all kernels": ("cpu/kernels.json", kernels_table)},
}


def render(document: Path) -> str:
    """A document with every table between its markers written anew."""
    text = document.read_text(encoding="utf-8")
    for name, (file, table) in TABLES[document].items():
        begin, end = f"<!-- {name}: benchmarks/results/{file} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{document}: expected the markers {begin} and {end}")
        results = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        text = f"{before}{begin}\n{table(results)}\n{end}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the documents are up to date")
    check = parser.parse_args().check
    rendered = {document: render(document) for document in TABLES}
    if check:
        return int(any(text != document.read_text(encoding="utf-8") for document, text in rendered.items()))
    for document, text in rendered.items():
        document.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
