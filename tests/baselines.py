"""A tiny diffusion model, its data, and every baseline written out once more in plain torch."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecker_fast import Baseline, BaselineConfig, MaskConfig, NoiseSchedule
from pecker_fast.apply import dense_copy
from pecker_fast.data import ImageData

SCHEDULE = NoiseSchedule.linear(40)
SHAPE = (1, 4, 4)
CLASSES, NULL = 4, 4


class Tiny(nn.Module):
    """Predicts noise; has a null class, and dropout if asked for it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, 6, 3, padding=1)
        self.classes = nn.Embedding(CLASSES + 1, 6)
        self.time = nn.Linear(1, 6)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        embedding = self.classes(condition) + self.time(t[:, None].to(x_t.dtype) / 40)
        return self.conv_out(self.dropout(torch.tanh(self.conv_in(x_t) + embedding[:, :, None, None])))


def tiny(dtype: torch.dtype = torch.float64, **settings: float) -> Tiny:
    torch.manual_seed(0)
    return Tiny(**settings).to(dtype)


def images(per_class: int = 5) -> ImageData:
    rng = torch.Generator().manual_seed(1)
    labels = torch.arange(CLASSES).repeat(per_class)
    return ImageData(torch.rand((len(labels), *SHAPE), generator=rng) * 2 - 1, labels, tuple("abcd"))


def config(method: str, **settings: object) -> BaselineConfig:
    mask = settings.pop("mask", {"kind": "dense"})
    if not isinstance(mask, MaskConfig):
        mask = MaskConfig(
            **{"density": 0.3, "block": "row", "scope": "global", "lr_scale": "none", "batches": 2} | mask
        )
    small = {"forget": (3,), "num_classes": CLASSES, "sample_shape": SHAPE, "batch_size": 5, "sampling_steps": 4}
    few = {"fisher_samples": 1, "fisher_timesteps": 3, "replay_samples": 2, "learning_rate": 1e-2}
    return BaselineConfig(method=method, mask=mask, **small | few | settings)


def baseline(method: str, model: nn.Module | None = None, **settings: object) -> Baseline:
    return Baseline(model or tiny(), SCHEDULE, config(method, **settings), data=images(), **_fresh(method))


def _fresh(method: str) -> dict[str, nn.Module]:
    if method != "retrain":
        return {}
    torch.manual_seed(9)
    return {"fresh": Tiny().double()}


class Plain:
    """The published update rules with the same draws, and the mistakes that published code makes.

    ``bug`` is one of "step first", "gradients kept", "target attached", "sum of pixels".
    """

    def __init__(self, run: Baseline, bug: str | None = None) -> None:
        self.config, self.bug = run.config, bug
        self.network, self.frozen = dense_copy(run.network), copy.deepcopy(run.true_score)
        self.network.requires_grad_(True)
        self.rng = torch.Generator().manual_seed(self.config.seed)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.config.learning_rate)
        data, self.memory, self.replay = images(), run.work.memory, run.work.images.get("retain")
        kept = data.labels != 3
        self.data = {
            "retain": (data.images[kept], data.labels[kept]),
            "forget": (data.images[~kept], data.labels[~kept]),
        }
        if run.config.method == "selective_amnesia":
            self.data["retain"] = (self.replay.images, self.replay.labels)

    def draw(self, part: str) -> tuple[Tensor, Tensor]:
        x0, labels = self.data[part]
        index = torch.randint(len(x0), (self.config.batch_size,), generator=self.rng)
        return x0[index].double(), labels[index]

    def noise(self) -> Tensor:
        return torch.randn((self.config.batch_size, *SHAPE), generator=self.rng).double()

    def noised(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = torch.randint(40, (3,), generator=self.rng)
        t = torch.cat([half, 39 - half])[:5]
        epsilon = self.noise()
        a = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1, 1)
        return a.sqrt() * x0 + (1 - a).sqrt() * epsilon, t, epsilon

    def dropped(self, labels: Tensor) -> Tensor:
        if not self.config.class_dropout:
            return labels
        return torch.where(torch.rand(5, generator=self.rng) < self.config.class_dropout, NULL, labels)

    def denoising(self, x0: Tensor, labels: Tensor) -> Tensor:
        x_t, t, epsilon = self.noised(x0)
        squares = (epsilon - self.network(x_t, t, self.dropped(labels))) ** 2
        return squares.sum() / len(x0) if self.bug == "sum of pixels" else squares.mean()

    def on_the_way(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        stop = int(torch.randint(4, (), generator=self.rng))
        x, scale, times = self.noise(), self.config.sampling_guidance, [39, 29, 19, 9]
        for now, then in list(zip(times, times[1:], strict=False))[:stop]:
            t = torch.full((5,), now)
            epsilon = self.frozen(x, t, labels)
            if self.config.null_class:
                null = self.frozen(x, t, torch.full_like(labels, NULL))
                epsilon = null + scale * (epsilon - null)
            a, b = SCHEDULE.alphas_cumprod[now].sqrt(), (1 - SCHEDULE.alphas_cumprod[now]).sqrt()
            x0 = ((x - b * epsilon) / a).clamp(-1, 1)
            epsilon = (x - a * x0) / b
            x = SCHEDULE.alphas_cumprod[then].sqrt() * x0 + (1 - SCHEDULE.alphas_cumprod[then]).sqrt() * epsilon
        return x, torch.full((5,), times[stop])

    def rehearsal(self) -> Tensor | float:
        weight = self.config.retain_weight
        return weight * self.denoising(*self.draw("retain")) if weight else 0.0

    def losses(self) -> Tensor:
        c = self.config
        if c.method in ("fine_tune", "retrain"):
            return self.rehearsal()
        if c.method == "gradient_ascent":
            ascent = -c.forget_weight * self.denoising(*self.draw("forget"))
            return ascent + self.rehearsal()
        if c.method == "random_label":
            x0, labels = self.draw("forget")
            x_t, t, _ = self.noised(x0)
            target = self.network(x_t, t, self.dropped(torch.zeros_like(labels)))  # class 0 follows class 3
            target = target if self.bug == "target attached" else target.detach()
            forget = c.forget_weight * F.mse_loss(self.network(x_t, t, self.dropped(labels)), target)
            return forget + self.rehearsal()
        return self.esd() if c.method == "esd" else self.selective_amnesia()

    def esd(self) -> Tensor:
        labels = torch.full((5,), 3)
        torch.randint(1, (5,), generator=self.rng)
        with torch.no_grad():
            x_t, t = self.on_the_way(labels)
            concept = self.frozen(x_t, t, labels)
            other = self.frozen(x_t, t, torch.full_like(labels, NULL if self.config.null_class else 0))
            start = concept if self.config.null_class else other
            target = start - self.config.negative_guidance * (concept - other)
        loss = F.mse_loss(self.network(x_t, t, labels), target)
        if self.config.retain_weight:
            labels = torch.randint(3, (5,), generator=self.rng)
            with torch.no_grad():
                x_t, t = self.on_the_way(labels)
                target = self.frozen(x_t, t, labels)
            loss = loss + self.config.retain_weight * F.mse_loss(self.network(x_t, t, labels), target)
        return loss

    def selective_amnesia(self) -> Tensor:
        c = self.config
        torch.randint(1, (5,), generator=self.rng)
        x0 = torch.rand((5, *SHAPE), generator=self.rng).double() * 2 - 1
        loss = c.forget_weight * self.denoising(x0, torch.full((5,), 3))
        loss = loss + self.rehearsal()
        parameters = dict(self.network.named_parameters())
        for name, then, fisher in zip(self.names, self.memory.anchors, self.memory.fisher, strict=True):
            now = parameters[name].reshape(then.shape)
            loss = loss + c.ewc_weight * (fisher * (now - then) ** 2).sum()
        return loss

    def steps(self, count: int, names: tuple[str, ...]) -> nn.Module:
        self.names = names
        for step in range(count):
            if self.bug != "gradients kept":
                self.optimizer.zero_grad()
            loss = self.losses()
            if self.bug == "step first" and step:
                self.optimizer.step()
            loss.backward()
            if self.config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm)
            if self.bug != "step first":
                self.optimizer.step()
        return self.network
