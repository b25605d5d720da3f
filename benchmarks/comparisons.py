"""Tables of a committed comparison: a folder that ``pecker-fast compare`` wrote, with compare.json and runs.jsonl."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from pecker_fast.compare import tables
from pecker_fast.compare.falsification import CLAIMS, falsification
from pecker_fast.compare.methods import methods
from pecker_fast.compare.plan import Plan
from pecker_fast.compare.results import Results, selected
from pecker_fast.compare.store import RUNS, SETTINGS, read_lines
from pecker_fast.compare.tuning import best_factors


def load(folder: Path) -> Results:
    """What the folder's lines say."""
    settings, lines = json.loads((folder / SETTINGS).read_text()), read_lines(folder / RUNS)
    block = settings["block"]
    known = methods(settings["density"], tuple(block) if isinstance(block, list) else block)
    reported = [line for line in lines if line["phase"] == "reported"]
    names = tuple(name for name in known if any(line["method"] == name for line in reported))
    seeds = tuple(sorted({line["seed"] for line in reported}))
    own = {name: settings[name] for name in ("steps", "samples")}
    own |= {name: tuple(settings[name]) for name in ("forget", "tuning_forget", "tuning_seeds", "factors")}
    plan = Plan(methods=names, seeds=seeds, **own)
    tuned = sorted({known[name].tuned_as or name for name in names if not known[name].own_length})
    jobs = plan.reported(known, best_factors(lines, plan.factors, tuned))
    return Results(selected(lines, jobs), plan, dict(known))


def everything(results: Results) -> str:
    """All tables."""
    return tables.markdown(tables.every(results)).rstrip()


def headlines(results: Results) -> str:
    """Does the mask help, and what came out at equal seconds, in short."""
    asked = falsification(results)
    first = {f"{ours} against {theirs}" for ours, theirs in CLAIMS[:3]}
    short = replace(asked, rows=tuple(row for row in asked.rows if row[0] in first))
    found = tables.quality(results, "equal_seconds")
    found = replace(found, head=found.head[:6], rows=tuple(row[:6] for row in found.rows))
    return f"{short.markdown()}\n\n{found.markdown()}"
