"""Tables and a picture of what digits_concepts.py found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from pecker_fast.metrics import wilson_interval

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHOWN = ("pecker", "esd", "salun")
"""Runs in the picture."""


def everything(results: Mapping[str, Any]) -> str:
    """All tables, in Markdown."""
    return "\n\n".join([erasures(results), by_digit(results), exactness(results), machine(results)])


def headline(results: Mapping[str, Any]) -> str:
    """What the README shows: the three methods, and what is the same to the bit."""
    before = others(results, results["before"]["judged"])
    head = ["", "what comes out", "weights trained", "forgotten (95 %)", "others recognised", "delta"]
    rows = [["before", "", "", *_unlearned(results, [results["before"]["judged"]]), f"{before:.1%}", ""]]
    for name in SHOWN:
        runs = list(results["runs"][name].values())
        command, judged = runs[0]["unlearn"], [run["judged"] for run in runs]
        what = "a one-step generator" if command["one_step"] else "the ordinary UNet"
        kept = fmean(others(results, each) for each in judged)
        share = f"{command['trainable_parameters']:,} ({command['density']:.1%})"
        size = f"{runs[0]['delta']['delta_bytes'] / 1e6:.2f} of {runs[0]['delta']['unet_bytes'] / 1e6:.2f} MB"
        rows.append([name, what, share, *_unlearned(results, judged), f"{kept:.1%}", size])
    return f"{markdown(head, rows)}\n\n{machine(results)}"


def erasures(results: Mapping[str, Any]) -> str:
    """One line a method: what it forgot, what it kept, how soon it is taught again, what it cost."""
    head = ["", "sampling steps", "weights trained", "unlearned (95 %)", "others recognised", "of before"]
    head += ["Fréchet distance", "back after", "seconds"]
    original = results["before"]["judged"]
    before, distance = others(results, original), f"{original['frechet_distance']:.1f}"
    rows = [["before", "20", "", *_unlearned(results, [original]), f"{before:.1%}", "", distance, "", ""]]
    for name, seeds in results["runs"].items():
        runs = list(seeds.values())
        kept = fmean(others(results, run["judged"]) for run in runs)
        command = runs[0]["unlearn"]
        rows.append(
            [
                name,
                "1" if command["one_step"] else "20",
                f"{command['trainable_parameters']:,} ({command['density']:.1%})",
                *_unlearned(results, [run["judged"] for run in runs]),
                f"{kept:.1%}",
                f"{kept / before:.2f}" if before else "",
                f"{fmean(run['judged']['frechet_distance'] for run in runs):.1f}",
                ", ".join(_back(results, run["relearned"]) for run in runs),
                f"{fmean(run['unlearn']['training_seconds'] for run in runs):.0f}",
            ]
        )
    attack, many = results["attack"], results["sampling"]["many_steps"]
    note = (
        f'Prompts with "{WORDS[results["forget"]]}" drew "{WORDS[results["override"]]}" instead (esd: anything else). '
        f"{results['samples']} images of each digit, with guidance {many['guidance_scale']:g} where they take many "
        f"steps. Fréchet distance: of the other digits to real ones, in the judge's features. Back after: steps of "
        f"Adam on {attack['images']} real images (rate {attack['lr']:g}, batch {attack['batch_size']}, looked at "
        f"every {attack['every']}) until the judge sees the digit in half of {attack['samples']} images. Seconds: of "
        f"mask and training."
    )
    return f"{markdown(head, rows)}\n\n{note}"


def by_digit(results: Mapping[str, Any]) -> str:
    """Share recognised of each digit: what happened to the neighbours."""
    rows = [["before", *_shares([results["before"]["judged"]])]]
    rows += [[name, *_shares([run["judged"] for run in seeds.values()])] for name, seeds in results["runs"].items()]
    return markdown(["recognised", *WORDS], rows)


def exactness(results: Mapping[str, Any]) -> str:
    """What must be the same to the bit."""
    head = ["", "same images in a new process", "delta applied", "delta reverted", "delta", "UNet"]
    rows = [["before", _yes([results["before"]["reloaded"]["same_in_new_process"]]), "", "", "", ""]]
    for name, seeds in results["runs"].items():
        runs = [run for run in seeds.values() if "delta" in run]
        if not runs:
            continue
        flags = [
            [run["reloaded"]["same_in_new_process"] for run in runs],
            [run["delta"]["applied_bit_for_bit"] for run in runs],
            [run["delta"]["reverted_bit_for_bit"] for run in runs],
        ]
        sizes = [f"{runs[0]['delta'][part] / 1e6:.2f} MB" for part in ("delta_bytes", "unet_bytes")]
        rows.append([name, *map(_yes, flags), *sizes])
    return markdown(head, rows)


def machine(results: Mapping[str, Any]) -> str:
    """Where, when, with what, and how long."""
    known = ", ".join(f"{name} {results['versions'][name]}" for name in ("pecker_fast", "diffusers", "transformers"))
    return (
        f"{results['machine']}, {known}, {results['date']}. Training the pipeline took "
        f"{results['pipeline']['seconds']:.0f} s; that and {', '.join(SHOWN)} of the first seed, with all that is "
        f"checked of them, {_minutes_of_shown(results):.0f} minutes; everything {sum(_seconds(results)) / 60:.0f}."
    )


def others(results: Mapping[str, Any], judged: Mapping[str, Any]) -> float:
    """Share recognised, over the digits that were not to be forgotten."""
    kept = [digit for digit in range(len(WORDS)) if digit != results["forget"]]
    return fmean(judged["seen"][digit][digit] / sum(judged["seen"][digit]) for digit in kept)


def unlearned(results: Mapping[str, Any], judged: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Images of the forgotten prompts without the digit, and how many there are."""
    rows = [each["seen"][results["forget"]] for each in judged]
    count = sum(map(sum, rows))
    return count - sum(row[results["forget"]] for row in rows), count


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def picture(before: Path, after: Mapping[str, Path], file: Path, samples: int = 6) -> None:
    """Images of the same prompts and the same noise, one column a pipeline."""
    import digits_pipelines as digits
    import torch.nn.functional as F

    from pecker_fast.report import new_figure, write_figure

    columns, rows, width = {"before": before, **after}, len(WORDS), 2.4
    figure = new_figure((width * len(columns) + 0.6, width * rows / samples + 0.4))
    for place, (name, folder) in enumerate(columns.items(), 1):
        images = F.pad(digits.draw(digits.load(folder), samples), (1, 1, 1, 1), value=1.0)
        size = images.shape[-1]
        mosaic = images.view(rows, samples, 3, size, size).permute(0, 3, 1, 4, 2).reshape(rows * size, -1, 3)
        axes = figure.add_subplot(1, len(columns), place)
        axes.imshow(mosaic.numpy(), interpolation="nearest")
        axes.set_title(name)
        axes.set_xticks([])
        axes.set_yticks([size * (row + 0.5) for row in range(rows)], WORDS if place == 1 else [""] * rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    write_figure(figure, file)


def _unlearned(results: Mapping[str, Any], judged: list[Mapping[str, Any]]) -> list[str]:
    gone, count = unlearned(results, judged)
    low, high = wilson_interval(gone, count)
    return [f"{gone / count:.1%} ({low:.1%} to {high:.1%})"]


def _shares(judged: list[Mapping[str, Any]]) -> list[str]:
    shares = [
        fmean(each["seen"][digit][digit] / sum(each["seen"][digit]) for each in judged) for digit in range(len(WORDS))
    ]
    return [f"{share:.2f}" for share in shares]


def _back(results: Mapping[str, Any], relearned: Mapping[str, Any]) -> str:
    steps = relearned["steps_to_return"]
    return f"more than {results['attack']['max_steps']}" if steps is None else str(steps)


def _yes(flags: list[bool]) -> str:
    return "yes" if all(flags) else "NO"


def _minutes_of_shown(results: Mapping[str, Any]) -> float:
    runs = [next(iter(results["runs"][name].values())) for name in SHOWN if name in results["runs"]]
    return sum(sum(_seconds(part)) for part in (results["pipeline"], results["before"], *runs)) / 60


def _seconds(found: Any) -> Iterable[float]:
    """Of all parts."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            if key == "seconds":
                yield value
            else:
                yield from _seconds(value)
