"""A short table of what a GPU run found, from the JSON files in its folder: python benchmarks/summary.py OUT."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LINES = 56


def read(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Topic and results of every file with rows."""
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(results, dict) and "rows" in results:
            yield path.stem, results


def lines(folder: Path) -> Iterator[str]:
    for topic, results in read(folder):
        limits = results.get("limits")
        if limits:
            copy, l2, matmul = limits["copy"] / 1e12, limits["l2"] / 1e12, limits["matmul"] / 1e12
            yield f"[{topic}] copy {copy:.2f} TB/s, L2 copy {l2:.2f} TB/s, matmul {matmul:.0f} TFLOP/s"
        rows = [row for row in results["rows"] if row["headline"]] or results["rows"]
        for row in sorted(rows, key=lambda row: "dense + gather" in row["against"]):
            spread = max(row.get("ours_spread", 0.0), row.get("theirs_spread", 0.0))
            times = f"{1e3 * row['ours_ms']:.0f} : {1e3 * row['theirs_ms']:.0f} us"
            yield (
                f"{row['what'][:44]:<44} {row['against'][:26]:<26} {row['density']:.2f} {row['ratio']:6.2f}x "
                f"{times:>20} +-{spread:.0%} {row['share'][:40]}"
            )
        for figure in results.get("figures", []):
            yield f"{figure['what'][:44]:<44} {figure['against'][:26]:<26} {figure['unit']}: " + " : ".join(
                value if isinstance(value, str) else f"{value:.4g}" for value in (figure["ours"], figure["theirs"])
            )


def main() -> int:
    found = list(lines(Path(sys.argv[1])))
    print("\n".join(found[:LINES]))
    if len(found) > LINES:
        print(f"... and {len(found) - LINES} lines more in {sys.argv[1]}/*.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
