"""What the judge, the metrics and the attacks say of a contestant."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pecker_fast.attacks import probe, relearn
from pecker_fast.checkpoint import atomic_file
from pecker_fast.compare.contestants import Runner, trained
from pecker_fast.compare.task import Task
from pecker_fast.evaluation import sides
from pecker_fast.metrics import (
    FeatureStatistics,
    denoising_scores,
    density_coverage,
    frechet_distance,
    inception_score,
    label_entropy,
    membership_inference,
    precision_recall,
    retain_accuracy,
    unlearning_accuracy,
    wilson_interval,
)
from pecker_fast.stopping import fresh_seed

_BATCH = 512
_NEIGHBOURS = 2000
"""Images of either set in precision, recall, density and coverage: their cost goes with the square."""
ATTACKED = (0.05, 0.15, 0.3, 0.5)
"""Timesteps at which membership is looked for, as shares of the schedule."""
RELEARN_IMAGES, RELEARN_STEPS, RELEARN_EVERY = 10, 100, 5
"""Images of each class that the relearning attack has, steps it may take, and how often it looks."""
START_SHARES, NOISE_SCALES = (0.5, 0.8, 1.2, 1.5), (0.8, 1.2)
"""Other starts that a generator is probed from: shares of its timestep, and of the noise's size."""


@dataclass(frozen=True)
class Seen:
    """Images as the judge sees them.

    Attributes:
        labels: What they were asked for, (n,).
        logits: (n, classes).
        features: (n, d).
    """

    labels: Tensor
    logits: Tensor
    features: Tensor

    def of(self, chosen: Tensor) -> Seen:
        """Some of them."""
        return Seen(self.labels[chosen], self.logits[chosen], self.features[chosen])


@dataclass(frozen=True, eq=False)
class Panel:
    """Judges whatever forgets one set of classes.

    Attributes:
        task: What it is about.
        forget: The classes.
        samples: Images of each class that a verdict is made of.
        seed: Of the noise that they are drawn from, the same for every method.
    """

    task: Task
    forget: tuple[int, ...]
    samples: int
    seed: int

    def glance(self, contestant: Runner) -> dict[str, float]:
        """Accuracies and Fréchet distance, for curves, from a quarter of the images."""
        return self._verdict(self._drawn(contestant, max(2, self.samples // 4)))

    def verdict(self, contestant: Runner) -> dict[str, Any]:
        """Everything that images alone show."""
        seen = self._drawn(contestant, self.samples)
        forgotten, retained = (seen.of(side) for side in self._sides(seen.labels))
        entropy = label_entropy(forgotten.logits, self.forget)
        count, generated = len(forgotten.labels), _spread(retained.features)
        found: dict[str, Any] = self._verdict(seen)
        interval = wilson_interval(round(found["unlearning_accuracy"] * count), count)
        real = _spread(self._real.features)
        near, around = (
            precision_recall(real=real, generated=generated),
            density_coverage(real=real, generated=generated),
        )
        return found | {
            "unlearning_accuracy_ci95": list(interval),
            "inception_score": inception_score(retained.logits)[0],
            "precision": near.precision,
            "recall": near.recall,
            "density": around.density,
            "coverage": around.coverage,
            "entropy": entropy.entropy,
            "forgotten_probability": entropy.forgotten_probability,
        }

    def attacks(self, contestant: Runner) -> dict[str, Any]:
        """What can be got out of the weights: membership, the class itself after a few steps, other starts."""
        generation, judge = contestant.generation, self.task.judge
        current = {name: weight.clone() for name, weight in trained(contestant).state_dict().items()}
        network = copy.deepcopy(self.task.true_score).eval()  # an ordinary model, as it would be published
        with contestant.averaged() as averaged:
            network.load_state_dict(averaged.state_dict())
        starts: dict[str, Any] = {"noise_scales": NOISE_SCALES}
        if generation["kind"] == "one_step":
            last = self.task.schedule.num_train_timesteps - 1
            starts["t_inits"] = [min(round(share * generation["t_init"]), last) for share in START_SHARES]
        probes = probe(
            network, generation, self.forget, judge=judge, weights={"not averaged": current}, seed=self.seed, **starts
        )
        images, labels = (tensor.to(contestant.device) for tensor in self._few())
        lr, most = self.task.relearning_lr, {"max_steps": RELEARN_STEPS, "every": RELEARN_EVERY}
        relearned = relearn(network, generation, images, labels, judge=judge, lr=lr, seed=self.seed, **most)
        found: dict[str, Any] = self._membership(network, generation)
        return found | {"relearning_steps": relearned.steps_to_return, "relearning": relearned.curve, "probes": probes}

    def save_picture(self, contestant: Runner, path: Path) -> None:
        """One image of every class, from the same noise whatever draws, as an npz with ``images`` (uint8, N H W C)."""
        labels = torch.arange(self.task.num_classes, device="cpu")
        images = contestant.sample(labels.to(contestant.device), seed=self._noise_seed).clamp(-1, 1).cpu()
        pixels = images.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as unfinished, unfinished.open("wb") as file:
            names = np.array(self.task.train.class_names, dtype=np.str_)
            np.savez_compressed(file, images=pixels, labels=labels.numpy(), class_names=names)

    @torch.no_grad()
    def look(self, images: Tensor, labels: Tensor) -> Seen:
        """Through the judge, in pieces."""
        judge: Any = self.task.judge
        device = next(judge.parameters()).device
        features = torch.cat([judge.features(part.to(device).clamp(-1, 1)) for part in images.split(_BATCH)])
        return Seen(labels.to(device), judge.head(features), features)

    @cached_property
    def _real(self) -> Seen:
        """Real images of the retained classes, those that the model knows."""
        data = self.task.train
        _, kept = self._sides(data.labels)
        return self.look(data.images[kept], data.labels[kept])

    @cached_property
    def _real_statistics(self) -> FeatureStatistics:
        statistics = FeatureStatistics()
        statistics.update(self._real.features)
        return statistics

    def _drawn(self, contestant: Runner, samples: int) -> Seen:
        """From the same noise whatever draws."""
        labels = torch.arange(self.task.num_classes, device="cpu").repeat_interleave(samples)
        return self.look(contestant.sample(labels.to(contestant.device), seed=self._noise_seed), labels)

    def _verdict(self, seen: Seen) -> dict[str, float]:
        forgotten, retained = self._sides(seen.labels)
        generated = FeatureStatistics()
        generated.update(seen.features[retained])
        return {
            "unlearning_accuracy": unlearning_accuracy(seen.logits[forgotten], self.forget),
            "retain_accuracy": retain_accuracy(seen.logits[retained], seen.labels[retained]),
            "frechet_distance": frechet_distance(generated, self._real_statistics),
        }

    def _membership(self, network: nn.Module, generation: Mapping[str, Any]) -> dict[str, Any]:
        """Of the forgotten classes: images that the diffusion model was trained on, against images it never saw.

        A generator is looked at where it is run, at its own timestep.
        """
        device = next(network.parameters()).device
        scores = []
        for data in (self.task.train, self.task.held_out):
            chosen, _ = self._sides(data.labels)
            images, labels = data.images[chosen].to(device), data.labels[chosen].to(device)
            predict = lambda x, t, c: network(x, t, c)  # noqa: E731
            timesteps = [round(share * self.task.schedule.num_train_timesteps) for share in ATTACKED]
            how: dict[str, Any] = {"timesteps": timesteps, "seeds": (0, 1)}
            if generation["kind"] == "one_step":
                how = {"timesteps": [generation["t_init"]], "seeds": range(len(timesteps) * 2)}
            scores.append(denoising_scores(predict, self.task.schedule, images, labels, **how))
        found = membership_inference(*scores)
        low, high = found.interval or (None, None)
        bounds = {"mia_auc_low": low, "mia_auc_high": high, "mia_p_value": found.p_value}
        return {"mia_auc": found.auc, "mia_tpr": found.tpr, "mia_shuffled_auc": found.shuffled_auc, **bounds}

    def _few(self) -> tuple[Tensor, Tensor]:
        """Images of each forgotten class that the attacker has: held out, so that they are its own."""
        data, rng = self.task.held_out, torch.Generator().manual_seed(self.seed)
        chosen = []
        for label in self.forget:
            own = (data.labels == label).nonzero().flatten()
            chosen.append(own[torch.randperm(len(own), generator=rng, device="cpu")[:RELEARN_IMAGES]])
        return data.images[torch.cat(chosen)], data.labels[torch.cat(chosen)]

    @property
    def _noise_seed(self) -> int:
        return fresh_seed("judging", self.seed)

    def _sides(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which are of forgotten and which of retained classes."""
        return sides(labels, self.forget, self.task.retained(self.forget))


def _spread(features: Tensor) -> Tensor:
    """At most so many of them, evenly, for what costs their number squared."""
    if len(features) <= _NEIGHBOURS:
        return features
    return features[torch.linspace(0, len(features) - 1, _NEIGHBOURS, device="cpu").round().long().to(features.device)]
