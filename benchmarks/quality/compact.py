r"""Keep of the runs what tables and figures need, in one committed file.

python benchmarks/quality/compact.py build/quality/*.jsonl --seconds build/quality/seconds.json \
    --erasures build/quality/erasures.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from arms import STUDIES
from run import read
from tables import verdicts

OUT = Path(__file__).resolve().parents[1] / "results" / "cpu" / "quality.json"
_KEPT = ("arm", "factor", "forget", "seed", "density", "mass", "fake_score_density", "generator_lr", "fake_score_lr")
KEY = ("arm", "factor", "forget", "seed")
"""What tells runs apart; files of several parts may share some."""
_JUDGED = ("unlearning_accuracy", "retain_accuracy", "frechet_distance")


def compact(line: dict[str, Any]) -> dict[str, Any]:
    """One run, four digits a figure."""
    rounded = [{"step": point["step"], **_figures(point)} for point in line["curve"]]
    flops = {"step": line["flops"]["total"], "mask": line["flops"]["mask"]["total"]}
    kept = {name: _round(line[name]) for name in _KEPT}
    return {**kept, "flops": flops, "curve": rounded, "final": _figures(line["final"])}


def _figures(point: dict[str, Any]) -> dict[str, float]:
    return {name: _round(point[name]) for name in _JUDGED}


def _round(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--seconds", type=Path, required=True, help="what seconds.py measured")
    parser.add_argument("--erasures", type=Path, required=True, help="what erasures.py measured")
    options = parser.parse_args()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(options.runs):
        study = found.setdefault(path.stem.rstrip("0123456789"), {})
        for line in map(compact, read(path)):
            study.setdefault(json.dumps([line[name] for name in KEY]), line)
    order = {arm.name: place for place, arm in enumerate(arm for study in STUDIES.values() for arm in study)}

    def place(line: dict[str, Any]) -> tuple[Any, ...]:
        return order.get(line["arm"], len(order)), line["factor"], line["forget"], line["seed"]

    studies = {name: sorted(lines.values(), key=place) for name, lines in found.items()}
    facts = {"machine": json.loads(options.seconds.read_text()), "erasures": json.loads(options.erasures.read_text())}
    facts = {"verdicts": verdicts(facts | studies), **facts}
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items()]
    parts += [f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, runs)) + "\n]" for name, runs in studies.items()]
    OUT.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
