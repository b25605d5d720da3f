"""Write the tables of README.md and docs/ from the files under benchmarks/results and docs/results.

No figure of a table is typed by hand.

python -m pytest benchmarks/ --benchmark-only --rows benchmarks/results/cpu/kernels.json
pecker-fast demo --output_dir runs/demo --overwrite && cp runs/demo/metrics.json benchmarks/results/cpu/demo.json
pecker-fast demo --mask_density 0.1 --output_dir runs/sparser --overwrite  # metrics.json: demo_density_0.1.json
python benchmarks/digits_concepts.py --output_dir OUT --seeds 1 2 3 --results_dir docs/results/concepts
python benchmarks/count_text_to_image.py && python benchmarks/step_text_to_image.py
benchmarks/gpu.sh OUT  # on a machine with a GPU; its optimizer.json, wgrad.json, ... as benchmarks/results/<gpu>/*.json
python benchmarks/report.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent / "quality"), str(Path(__file__).resolve().parent)]

import comparisons  # noqa: E402
import digits_concepts_tables as concepts  # noqa: E402
import tables as quality  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BENCHMARKS, MEMORY, QUALITY = (ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "memory", "quality"))
RESULTS = ROOT / "benchmarks" / "results"
DIGITS, CIFAR16, CONCEPTS = (ROOT / "docs" / "results" / f"{name}.md" for name in ("digits", "cifar16", "concepts"))


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


def distill_table(results: dict[str, Any]) -> str:
    """An iteration of the distiller: times, then what is counted."""
    figures = "\n".join(_figure(figure) for figure in results["figures"])
    return f"{kernels_table(results)}\n\n{figures}"


def text_to_image_table(results: dict[str, Any]) -> str:
    """FLOPs of an iteration switch by switch, then memory by part; counted, not timed."""
    head = ["an iteration", "F", "of the published", "generator", "true score", "fake score"]
    networks = ("generator", "true_score", "fake_score")
    forward = results["flops"][0]["total"] / results["flops"][0]["forwards"]
    rows = [
        [row["what"], f"{row['forwards']:.1f}", f"{row['share']:.3f}"]
        + [f"{sum(row[network].values()) / forward:.1f}" for network in networks]
        for row in results["flops"]
    ]
    note = (
        f"Counted, not timed: tensors without data, torch {results['versions']['torch']}; "
        f"{results['batch_size']} retained and {results['batch_size']} forgotten prompts, latents of 64 x 64; "
        f"F = {forward / 1e12:.3f} TFLOP, one forward of one network on {results['batch_size']} prompts"
    )
    return (
        f"{_markdown(head, rows)}\n\n{note}, attention as products.\n\n"
        f"{_memory_table('GB', results['memory'])}\n\nNetworks in bfloat16, attention fused.\n\n"
        f"{_memory_table('GB, Stable Diffusion XL, latents of 128 x 128', results['memory_xl'])}"
    )


def _memory_table(title: str, memory: list[dict[str, Any]]) -> str:
    """Each part of at least 5 MB, in GB."""
    parts = list(dict.fromkeys(part for row in memory for part, size in row["parts"].items() if size >= 5e6))
    titles = [part.replace("_", " ") for part in (*parts, "activations", "peak")]
    held = [[f"{row['parts'].get(part, 0) / 1e9:.2f}" for part in parts] for row in memory]
    rows = [
        [row["what"], *own, f"{row['activations'] / 1e9:.2f}", f"**{row['peak'] / 1e9:.1f}**"]
        for row, own in zip(memory, held, strict=True)
    ]
    return _markdown([title, *titles], rows)


def text_to_image_headlines(results: dict[str, Any]) -> str:
    """Forwards and peak memory of some iterations; counted, not timed."""
    flops = {row["what"]: row for row in results["flops"]}
    memory, memory_xl = (
        {row["what"].removeprefix("exact, "): row for row in results[name]} for name in ("memory", "memory_xl")
    )
    thrifty = ", checkpointing, micro-batches of 2"
    attention = "cross-attention of both networks"
    whole = next(name for name in flops if attention in name)
    rows = []
    for title, counted, held in (
        ("every weight", "exact, dense", "dense"),
        ("rows, a tenth of both networks", "exact, rows 0.1 of both networks", "rows 0.1 of both networks"),
        (attention, whole, attention),
    ):
        peaks = [memory.get(held), memory.get(held + thrifty), memory_xl.get(held + thrifty)]
        gigabytes = ["" if row is None else f"{row['peak'] / 1e9:.1f}" for row in peaks]
        rows.append([title, f"{flops[counted]['forwards']:.1f}", *gigabytes])
    head = ["what trains", "forwards an iteration", "GB at its height", "the same, thriftily", "XL, thriftily"]
    note = (
        f"Counted on tensors without data, not timed: {results['batch_size']} retained and {results['batch_size']} "
        f"forgotten prompts, networks in bfloat16; thriftily: with gradient checkpointing, in micro-batches of 2."
    )
    return f"{_markdown(head, rows)}\n\n{note}"


def peak_table(results: dict[str, Any]) -> str:
    """A real step's memory by torch's allocator, beside the estimate."""
    rows = [
        [
            title,
            *(f"{results[what][by] / 1e9:.2f}" for by in ("allocated", "estimated")),
            f"{_ratio(results[what]):.3f}",
        ]
        for title, what in (("at its height", "peak"), ("between two steps", "held"))
    ]
    batch = results["batch_size"]
    note = (
        f"{results['what']}; {batch} retained and {batch} forgotten prompts; {results['machine']}, "
        f"{results['seconds'] / 60:.0f} minutes a step."
    )
    return f"{_markdown(['GB', 'allocated', 'estimated', 'ratio'], rows)}\n\n{note}"


def _ratio(size: dict[str, int]) -> float:
    return size["estimated"] / size["allocated"]


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


def gpu_headlines(results: dict[str, Any]) -> str:
    """The races that matter most, on every GPU that was measured."""
    return _on_every_gpu(results, headlines=True)


def gpu_tables(results: dict[str, Any]) -> str:
    """All races and figures, on every GPU that was measured."""
    return _on_every_gpu(results, headlines=False)


def _on_every_gpu(results: dict[str, Any], headlines: bool) -> str:
    tables = [
        table for topics in results.values() for topic in TOPICS if (table := _topic(topics.get(topic), headlines))
    ]
    return "\n\n".join(tables) if tables else NO_GPU


def _topic(results: dict[str, Any] | None, headlines: bool) -> str:
    """One file of a GPU; nothing where it has no row to show."""
    rows = [row for row in (results or {"rows": []})["rows"] if row["headline"] or not headlines]
    if results is None or not rows:
        return ""
    head = [
        "what",
        "against",
        "density",
        "ours",
        "theirs",
        "ratio",
        "spread",
        "work, ours : theirs",
        "share of the limit",
    ]
    lines = [
        [
            row["what"],
            row["against"],
            f"{row['density']:.2g}",
            _duration(row["ours_ms"]),
            _duration(row["theirs_ms"]),
            f"**{row['ratio']:.2f}x**",
            f"{max(row.get('ours_spread', 0.0), row.get('theirs_spread', 0.0)):.1%}",
            row["work"],
            row["share"],
        ]
        for row in rows
    ]
    figures = [] if headlines else [_figure(figure) for figure in results["figures"]]
    notes = [] if headlines else [f"* {note}" for note in results["notes"]]
    return "\n".join([_markdown(head, lines), "", *figures, *notes, *([""] if figures or notes else []), _run(results)])


def _figure(figure: dict[str, Any]) -> str:
    ours, theirs = (v if isinstance(v, str) else f"{v:,.4g}" for v in (figure["ours"], figure["theirs"]))
    return (
        f"* {figure['what']}, density {figure['density']:.2g}: {ours} {figure['unit']}, {figure['against']}: {theirs}"
    )


def _run(results: dict[str, Any]) -> str:
    """Where and when a file was measured, and what the card does at best."""
    limits, versions = results["limits"], results["versions"]
    return (
        f"{results['machine']}, triton {versions['triton']}, {results['date']}; interleaved medians of one run, spread "
        f"between quartiles; copy {limits['copy'] / 1e12:.2f} TB/s, in the L2 cache {limits['l2'] / 1e12:.2f} TB/s, "
        f"bfloat16 product {limits['matmul'] / 1e12:.0f} TFLOP/s."
    )


def _duration(ms: float) -> str:
    return f"{1e3 * ms:.1f} µs" if ms < 1 else f"{ms:.2f} ms"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TOPICS = ("optimizer", "wgrad", "step", "select", "sweep", "distill", "sd")
"""Files of a GPU, in the order in which they are shown."""
NO_GPU = "No GPU has measured these kernels yet; on a machine with one, `benchmarks/gpu.sh OUT` tests and times them."
ON_GPUS = "<gpu>/*.json"

TABLES = {
    README: {
        "kernels": ("cpu/kernels.json", headlines_table),
        "demo": ("cpu/demo.json", demo_table),
        "sparser demo": ("cpu/demo_density_0.1.json", demo_table),
        "kernels on a GPU": (ON_GPUS, gpu_headlines),
        "distillation": ("cpu/distill.json", distill_table),
        "comparison": ("docs/results/digits", comparisons.headlines),
        "concepts": ("docs/results/concepts/concepts.json", concepts.headline),
        "text to image": ("cpu/text_to_image.json", text_to_image_headlines),
    },
    DIGITS: {"comparison": ("docs/results/digits", comparisons.everything)},
    CIFAR16: {"comparison": ("docs/results/cifar16", comparisons.everything)},
    CONCEPTS: {"concepts": ("docs/results/concepts/concepts.json", concepts.everything)},
    BENCHMARKS: {
        "all kernels": ("cpu/kernels.json", kernels_table),
        "all kernels on a GPU": (ON_GPUS, gpu_tables),
        "text to image": ("cpu/text_to_image.json", text_to_image_table),
    },
    MEMORY: {"a real step": ("cpu/text_to_image_peak.json", peak_table)},
    QUALITY: {
        "switches": ("cpu/quality.json", quality.switches),
        "masked": ("cpu/quality.json", quality.masked),
        "density": ("cpu/quality.json", quality.density),
        "erasures": ("cpu/quality.json", quality.erasures),
        "stacked": ("cpu/quality.json", quality.stacked),
    },
}


def load(source: str) -> Any:
    """One result file, a comparison's folder, or of every GPU that has a folder its files by topic, no rehearsal."""
    if source.startswith("docs/") and source.endswith(".json"):
        return json.loads((ROOT / source).read_text(encoding="utf-8"))
    if source.startswith("docs/"):
        return comparisons.load(ROOT / source)
    if source != ON_GPUS:
        return dict(json.loads((RESULTS / source).read_text(encoding="utf-8")))
    found: dict[str, Any] = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        if path.parent.name != "cpu":
            results = json.loads(path.read_text(encoding="utf-8"))
            if results["rehearsal"]:
                raise SystemExit(f"{path}: a rehearsal on a CPU is no result; remove it")
            found.setdefault(path.parent.name, {})[path.stem] = results
    return found


def render(document: Path) -> str:
    """A document with every table between its markers written anew."""
    text = document.read_text(encoding="utf-8")
    for name, (file, table) in TABLES[document].items():
        place = file if file.startswith("docs/") else f"benchmarks/results/{file}"
        begin, end = f"<!-- {name}: {place} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{document}: expected the markers {begin} and {end}")
        text = f"{before}{begin}\n{table(load(file))}\n{end}{after}"
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
