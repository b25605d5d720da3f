"""Model folders, laid out as diffusers does it, and images from what they describe.

A folder holds ``diffusion_pytorch_model.safetensors`` and ``config.json``: the class, its constructor's
arguments and, under ``generation``, everything needed to sample from it::

    {"kind": "one_step", "t_init": 500, "schedule": {...}, "sample_shape": [1, 8, 8]}
    {"kind": "ddim", "steps": 20, "schedule": {...}, "sample_shape": [1, 8, 8]}

``schedule`` is `NoiseSchedule.to_dict`; ``sample_shape`` is (C, H, W). ``clip``, 1 where it is not given, is the
largest magnitude of a sample; latents, which have no bounds, take None. A model that carries deltas has
``pecker_deltas.json`` beside its weights (see `pecker_fast.delta.ledger`).

``class_names`` and ``classes_without_images`` are there where they are known (see `pecker_fast.classes`).

Weights may be stored in fewer bits than they are used in, and in several files: then ``config.json`` also has
``dtype``, what they are loaded in, and ``weights``, the index file (see `pecker_fast.models.shards`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast.checkpoint import (
    StrPath,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from pecker_fast.classes import CLASS_KEYS, Classes
from pecker_fast.errors import FileFormatError
from pecker_fast.foreign_weights import check_weights, unwrapped
from pecker_fast.maskable import STORE
from pecker_fast.models.classifier import DigitsClassifier
from pecker_fast.models.ddpm import DDPMUNet
from pecker_fast.models.resnet import ImageClassifier
from pecker_fast.models.shards import INDEX_NAME, divide, read_shards, rounded, write_shards
from pecker_fast.output_folder import claim
from pecker_fast.sampling import ddim_sample, one_step_sample
from pecker_fast.schedule import NoiseSchedule
from pecker_fast.settings import is_number

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
DELTAS_NAME = "pecker_deltas.json"
DELTAS_ATTRIBUTE = "_pecker_deltas"
"""Where a module keeps the content of that file."""
FORMAT_VERSION = 1

_CLASSES: dict[str, type[nn.Module]] = {
    network.__name__: network for network in (DDPMUNet, DigitsClassifier, ImageClassifier)
}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def save(
    model: nn.Module,
    folder: StrPath,
    generation: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model folder, complete or not at all (see `pecker_fast.output_folder`).

    Args:
        model: A `DDPMUNet`, `DigitsClassifier` or `ImageClassifier`, in any dtype and on any device.
        folder: Where to; what else is in it stays.
        generation: How to sample from the model, as in this module's docstring; None for a classifier.
        dtype: Round floating-point weights to this for storing; `load` gives them back in the model's own dtype.
        max_shard_size: Bytes that no file of weights exceeds; None writes one file.
        overwrite: Whether an older result there, of this function, may go.

    Raises:
        FileFormatError: The folder cannot be written, or has an older result or files of yours in the way.
        TypeError: The model is of another class.
        ValueError: ``generation`` is incomplete or out of range, the model carries the names of another number of
            classes, ``dtype`` cannot hold the weights, or ``max_shard_size`` not even one of them.
    """
    if _CLASSES.get(type(model).__name__) is not type(model):
        raise TypeError(
            f"expected {_known_classes()}, got {type(model).__name__}; unwrap it or save it with its own library"
        )
    with claim(folder, "models.save", (CONFIG_NAME, f"{Path(WEIGHTS_NAME).stem}*"), replace=overwrite) as unfinished:
        write_model(model, unfinished, generation, dtype=dtype, max_shard_size=max_shard_size)


def write_model(
    model: nn.Module,
    folder: StrPath,
    generation: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
) -> None:
    """Write the files of `save` into an existing folder, for callers that put more beside them.

    Unlike `save` it takes any module: one with ``save_pretrained`` (diffusers) writes its own files, its own way, and
    ``generation.json``; of one that this version cannot build again, ``architecture`` is None.
    """
    if generation is not None:
        _check_generation(generation)
    for module in model.modules():
        if STORE in vars(module):
            vars(module)[STORE].sync_()
    if DELTAS_ATTRIBUTE in model.__dict__:
        write_json(Path(folder) / DELTAS_NAME, model.__dict__[DELTAS_ATTRIBUTE])
    classes = Classes.of_module(model)
    known = {} if classes is None else classes.to_dict()
    save_pretrained = getattr(model, "save_pretrained", None)
    if callable(save_pretrained):
        save_pretrained(folder)
        write_json(Path(folder) / "generation.json", dict(generation or {}) | known)
        return
    name = type(model).__name__
    if classes is not None and _CLASSES.get(name) is type(model):
        Classes.from_dict(known, int(model.config["num_classes"]))  # type: ignore[index]  # refuses others' names
    config: dict[str, Any] = {
        "_class_name": name,
        "_format_version": FORMAT_VERSION,
        "architecture": model.config if _CLASSES.get(name) is type(model) else None,
        "generation": None if generation is None else dict(generation),
        **known,
    }
    weights = model.state_dict()
    if dtype is not None:
        own = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} or {dtype}
        if len(own) > 1:
            raise ValueError(f"dtype: the weights are in several, {sorted(map(str, own))}; convert the model first")
        weights, config["dtype"] = rounded(weights, dtype), str(own.pop()).removeprefix("torch.")
    groups = [weights] if max_shard_size is None else divide(weights, max_shard_size)
    if len(groups) > 1:
        config["weights"] = INDEX_NAME
        write_shards(Path(folder), groups, {"format": "pt"})
    else:
        write_safetensors(Path(folder) / WEIGHTS_NAME, weights, {"format": "pt"})
    write_json(Path(folder) / CONFIG_NAME, config)


def load_config(folder: StrPath) -> dict[str, Any]:
    """Read and check ``config.json``: ``_class_name``, ``architecture`` and ``generation`` (a dict or None).

    `classes_in` gives the classes that it names.

    Raises:
        FileFormatError: The file is missing or damaged, or describes something that this version cannot load.
    """
    path = Path(folder) / CONFIG_NAME
    if not Path(folder).is_dir():
        raise FileFormatError(f"{folder}: no such folder; expected a model folder with {CONFIG_NAME}")
    config = read_json(path)
    name, version = config.get("_class_name"), config.get("_format_version")
    if not isinstance(name, str) or name not in _CLASSES:
        raise FileFormatError(
            f"{path}: _class_name is {name!r}, expected {_known_classes()}; load it with its own library"
        )
    if version != FORMAT_VERSION:
        raise FileFormatError(
            f"{path}: _format_version is {version!r}, expected {FORMAT_VERSION}; if it is newer, upgrade pecker_fast"
        )
    if not isinstance(config.get("architecture"), dict):
        raise FileFormatError(f"{path}: architecture is missing; expected the arguments of {name}")
    if config.get("dtype") not in (None, *_DTYPES):
        raise FileFormatError(f"{path}: dtype is {config['dtype']!r}, expected one of {', '.join(_DTYPES)}")
    if config.get("weights") not in (None, INDEX_NAME):
        raise FileFormatError(f"{path}: weights is {config['weights']!r:.80}, expected {INDEX_NAME!r} or nothing")
    try:
        if CLASS_KEYS & config.keys():
            classes_in(config)
        if config.setdefault("generation", None) is not None:
            _check_generation(config["generation"])
    except ValueError as error:
        raise FileFormatError(f"{path}: {error}") from error
    return config


def classes_in(config: Mapping[str, Any]) -> Classes:
    """The classes of a model, from what `load_config` read.

    Raises:
        ValueError: Their number is missing, or their names are damaged.
    """
    count = config["architecture"].get("num_classes")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"num_classes must be a positive integer, got {count!r}")
    return Classes.from_dict(config, count)


def load(folder: StrPath, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a model that `save` wrote, in eval mode on the CPU.

    Args:
        folder: The model folder.
        dtype: Of floating-point weights; None takes the dtype that the model had when it was saved, also where it was
            stored in another one.

    Raises:
        FileFormatError: A file is missing, truncated or foreign, or the weights do not fit the architecture, are
            quantized, or are NaN or infinite.
    """
    config = load_config(folder)
    try:
        # On "meta" nothing is allocated or initialised: weights that do not fit are refused for free.
        with torch.device("meta"):
            model = _CLASSES[config["_class_name"]](**config["architecture"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise FileFormatError(f"{folder}: {CONFIG_NAME} cannot be built: {error}") from error
    path = Path(folder) / (config.get("weights") or WEIGHTS_NAME)
    weights = read_shards(Path(folder)) if path.name == INDEX_NAME else read_safetensors(path)[0]
    weights = unwrapped(str(path), weights)
    check_weights(str(path), weights)
    _check_weights(path, model.state_dict(), weights)
    wanted = dtype or _DTYPES.get(config.get("dtype") or "")
    if wanted is not None:
        weights = {
            name: weight.to(wanted) if weight.is_floating_point() else weight for name, weight in weights.items()
        }
    model.load_state_dict(weights, assign=True)
    Classes.from_dict(config, int(model.config["num_classes"])).put_on(model)  # type: ignore[index]
    deltas = Path(folder) / DELTAS_NAME
    if deltas.exists():
        model.__dict__[DELTAS_ATTRIBUTE] = read_json(deltas)
    return model.eval()


def generate(
    model: nn.Module,
    generation: Mapping[str, Any],
    condition: Tensor,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one image per label as ``generation`` says, without gradients.

    Args:
        model: ``(x_t, t, condition) -> epsilon``, in eval mode.
        generation: As in this module's docstring, e.g. ``load_config(folder)["generation"]``.
        condition: (B,) int64 labels on the model's device.
        noise: (B, C, H, W) standard normal; drawn if not given.
        generator: Source of the noise, on the model's device; torch's global one if not given.

    Returns:
        (B, C, H, W) images clamped to [-clip, clip], in the dtype of ``noise`` (float32 if it was drawn).

    Raises:
        ValueError: ``generation`` is incomplete or out of range, ``noise`` has another shape, or both
            ``noise`` and ``generator`` are given.
    """
    schedule = _check_generation(generation)
    shape = (len(condition), *generation["sample_shape"])
    if noise is None:
        noise = torch.randn(shape, generator=generator, device=condition.device)
    elif generator is not None:
        raise ValueError("give noise or generator, not both")
    elif noise.shape != shape:
        raise ValueError(f"noise must have shape {shape} (one per label), got {tuple(noise.shape)}")
    clip = generation.get("clip", 1.0)
    if generation["kind"] == "one_step":
        images = one_step_sample(model, schedule, noise, condition, t_init=generation["t_init"])
    else:
        images = ddim_sample(model, schedule, noise, condition, steps=generation["steps"], clip=clip)
    return images if clip is None else images.clamp(-clip, clip)


def _check_generation(generation: Mapping[str, Any]) -> NoiseSchedule:
    """Check every entry and return the schedule."""
    if not isinstance(generation, Mapping) or not isinstance(generation.get("schedule"), Mapping):
        raise ValueError("generation must be a mapping with kind, schedule, sample_shape and t_init or steps")
    schedule = NoiseSchedule.from_dict(generation["schedule"])
    total = schedule.num_train_timesteps
    kind = generation.get("kind")
    if kind == "one_step":
        _check_integer(generation, "t_init", range(total))
    elif kind == "ddim":
        _check_integer(generation, "steps", range(1, total + 1))
    else:
        raise ValueError(f"generation kind must be 'one_step' or 'ddim', got {kind!r}")
    clip = generation.get("clip", 1.0)
    if clip is not None and not is_number(clip, "a positive number"):
        raise ValueError(f"generation clip must be a positive number, or None for latents, got {clip!r}")
    match generation.get("sample_shape"):
        case [int(c), int(h), int(w)] if min(c, h, w) > 0:
            return schedule
        case shape:
            raise ValueError(f"generation sample_shape must be positive integers (C, H, W), got {shape!r}")


def _check_integer(generation: Mapping[str, Any], name: str, allowed: range) -> None:
    value = generation.get(name)
    if not isinstance(value, int) or value not in allowed:
        raise ValueError(
            f"generation of kind {generation['kind']!r} needs an integer {name} in "
            f"[{allowed[0]}, {allowed[-1]}], got {value!r}"
        )


def _check_weights(path: Path, expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse weights of other names, shapes or kinds of number, naming the first."""
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        raise FileFormatError(
            f"{path}: weights do not fit {CONFIG_NAME}: {len(missing)} missing (first: {missing[:1]}), "
            f"{len(unexpected)} unexpected (first: {unexpected[:1]})"
        )
    for name, tensor in weights.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            raise FileFormatError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {tuple(wanted.shape)}")
        if tensor.is_floating_point() != wanted.is_floating_point():
            raise FileFormatError(f"{path}: {name} holds {tensor.dtype}, expected {wanted.dtype}")


def _known_classes() -> str:
    return " or ".join(_CLASSES)
