"""Where one request for erasure starts: what was distilled once, the requests that went before, the classes of all."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast import distilled
from pecker_fast.apply import check_mask
from pecker_fast.checkpoint import write_json
from pecker_fast.commands.classes import chosen, classes_of, same_classes
from pecker_fast.commands.earlier import RECORD, Earlier, mark_of, resolved, targets_of
from pecker_fast.commands.source import Source, torch_device
from pecker_fast.config import DistillConfig
from pecker_fast.delta import Delta
from pecker_fast.delta.pack import overlaps
from pecker_fast.distiller import MaskedDistiller
from pecker_fast.errors import FileFormatError
from pecker_fast.foreign_weights import check_finite
from pecker_fast.mask import BlockMask
from pecker_fast.maskable import survey
from pecker_fast.stopping import fresh_seed

_INHERITED = (
    "batch_size",
    "generator_lr",
    "fake_score_lr",
    "betas",
    "eps",
    "weight_decay",
    "clip_value",
    "warmup_steps",
    "ema_decay",
    "sid_alpha",
    "t_init",
    "t_min",
    "t_max",
)


@dataclass(frozen=True)
class Request:
    """One request for erasure.

    Attributes:
        forget: The classes that it is for.
        override: What takes their place, as it was given.
        retain: Classes that are kept; None are all others.
        start: What it starts from; None is the diffusion model itself.
        earlier: Requests whose deltas the generator carries already.
    """

    forget: tuple[int, ...]
    override: tuple[int, ...] | None
    retain: tuple[int, ...] | None
    start: distilled.Distilled | None
    earlier: tuple[Earlier, ...]

    @classmethod
    def read(cls, options: argparse.Namespace, source: Source) -> Request:
        """What ``--init`` and ``--earlier`` name, with the earlier deltas applied to the generator, in memory.

        Raises:
            FileFormatError: A folder is missing, damaged, or of another model.
            ValueError: Flags that do not go together.
        """
        asked = chosen(options, source.classes)
        if options.init is None:
            if options.earlier is not None:
                raise ValueError("--earlier: requests that add up start from one distilled model; give --init too")
            return cls(asked.forget, asked.override, asked.retain, None, ())
        if options.earlier is not None and options.mask == "dense":
            raise ValueError("--mask dense: trains every weight, those of --earlier too; take saliency or random")
        start = _start(options, source)
        earlier = tuple(Earlier.read(folder) for folder in options.earlier or ())
        for request in earlier:
            both = f"{options.init / 'model'} and {request.folder / 'delta'}"
            try:
                request.delta.apply(start.generator, progress=not options.quiet)
            except ValueError as error:
                raise FileFormatError(f"{both}: {error}") from error
            check_finite(both, start.generator.named_parameters())
        return cls(asked.forget, asked.override, asked.retain, start, earlier)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Arguments of the distiller."""
        return {} if self.start is None else {"generator": self.start.generator, "fake_score": self.start.fake_score}

    @property
    def defaults(self) -> dict[str, Any]:
        """Settings that go on as they were in the distillation, unless flags say otherwise."""
        return {} if self.start is None else {name: getattr(self.start.config, name) for name in _INHERITED}

    @property
    def classes(self) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Classes to forget in this run, with their overrides: its own, and the earlier ones, which stay forgotten.

        An earlier class whose override is forgotten now takes what takes that one's place.

        Raises:
            ValueError: A class is named twice or forgotten already, or overrides are given for some requests only.
        """
        if not self.earlier:
            return self.forget, self.override
        older: dict[int, int | None] = {}
        for request in self.earlier:
            if again := sorted(set(request.targets) & set(self.forget)):
                raise ValueError(f"--forget_class: class {again[0]} is forgotten already by {request.folder}")
            older |= request.targets
        own = targets_of(self.forget, self.override)
        if gone := sorted(older.keys() & own.values()):
            raise ValueError(f"--override_class: class {gone[0]} is forgotten by an earlier request; name another one")
        targets = own | {label: resolved(label, own | older) for label in older}
        if None not in targets.values():
            return tuple(targets), tuple(target for target in targets.values() if target is not None)
        if any(target is not None for target in targets.values()):
            raise ValueError(
                "--override_class: give it for all of the requests that add up or for none of them; "
                "without one a class becomes any retained class at random"
            )
        return tuple(targets), None

    def build_mask(self, distiller: MaskedDistiller) -> BlockMask:
        """The mask of this request: of its own classes, and of no weight that an earlier one changed."""
        mask = distiller.config.mask
        own = self.earlier and mask.looks and mask.saliency == "noise_prediction"
        batches = own_samples(distiller, self.forget) if own else None
        return distiller.build_mask(batches, exclude=[request.delta.mask for request in self.earlier])

    def check_mask(self, mask: BlockMask, model: nn.Module, options: argparse.Namespace) -> None:
        """Refuse a given mask of another model than ``model``, or with weights that an earlier request changed.

        Raises:
            FileFormatError: It does not fit.
            ValueError: It has such weights.
        """
        where = options.mask_path
        try:
            check_mask(model, mask, survey(model), adopted=())
        except ValueError as error:
            raise FileFormatError(f"{where}: does not fit {options.pretrained_model_name_or_path}: {error}") from error
        for request in self.earlier:
            if names := overlaps(mask.parameters, request.delta.mask.parameters):
                raise ValueError(
                    f"{where}: has weights of {names[0]} that {request.folder} changed; make one with exclude="
                )

    def write(self, folder: Path, options: argparse.Namespace) -> None:
        """The record, for requests that come later; without ``--init`` there is nothing to tell.

        Raises:
            FileFormatError: It cannot be written.
        """
        if self.start is not None:
            names = classes_of(self.start.generator).names_of(self.forget)
            values = {"forget": self.forget, "override": self.override, "init": self.start.record["generator"]}
            values |= {} if names is None else {"forget_names": names}
            values |= {"delta": mark_of(Delta.load(folder / "delta"))}
            write_json(folder / RECORD, values | {"earlier": [str(path) for path in options.earlier or ()]})


def _start(options: argparse.Namespace, source: Source) -> distilled.Distilled:
    start = distilled.load(options.init)
    same_classes({"the model": source.classes, str(options.init): classes_of(start.generator)})
    own = {"true_score": distilled.fingerprint_of(source.model), "schedule": source.schedule.to_dict()}
    for name, value in own.items():
        if start.record.get(name) != value:
            raise FileFormatError(
                f"{options.init}: was distilled from another model than {options.pretrained_model_name_or_path}: its "
                f"{name.replace('_', ' ')} is {start.record.get(name)}, here {value}"
            )
    if options.t_init not in (None, start.config.t_init):
        raise ValueError(
            f"--t_init {options.t_init}: the generator of {options.init} starts at {start.config.t_init}; leave it out"
        )
    for network in (start.generator, start.fake_score):
        network.to(torch_device(options.device))
    return start


def own_samples(distiller: MaskedDistiller, classes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the generator's samples of some classes, for the saliency pass."""
    config: DistillConfig = distiller.config
    rng = torch.Generator(distiller.device).manual_seed(fresh_seed("saliency", config.seed))
    size, table = config.mask.batch_size or config.forget_samples, torch.tensor(classes, device=distiller.device)
    for _ in range(config.mask.batches):
        labels = table[torch.randint(len(table), (size,), generator=rng, device=distiller.device)]
        noise = torch.randn((size, *config.sample_shape), generator=rng, device=distiller.device)
        yield distiller.sample(labels, noise=noise.to(distiller.dtype)), labels
