"""Published checkpoints and masks become ours with the same output, or are refused by name; nothing in them is run."""

import os
import random
import zipfile

import published_model
import pytest
import torch

from pecker_fast import BlockMask
from pecker_fast.errors import FileFormatError
from pecker_fast.models.published import load_published
from pecker_fast.salun_mask import element_mask, load_salun_mask

T = torch.tensor([0, 440, 999, 17])
LABELS = torch.tensor([0, 9, 3, 5])
DROP = torch.tensor([False, False, True, False])
OURS = torch.where(DROP, torch.tensor(10), LABELS)


def _wrapped(weights):
    return {f"module.{name}": tensor for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return published_model.random_weights()


@pytest.fixture(scope="module")
def others():
    """Three networks of one block a level: quick to save."""
    torch.manual_seed(1)
    weights = [published_model.random_weights(multiples=(1,), blocks=1) for _ in range(3)]
    return [{name: tensor.float() for name, tensor in one.items()} for one in weights]


@pytest.fixture(scope="module")
def tiny():
    """A checkpoint of few bytes, and a mask of it."""
    torch.manual_seed(2)
    return {n: w.half() for n, w in published_model.random_weights(multiples=(1,), blocks=1).items()}


def _saved(tmp_path, values):
    torch.save(values, tmp_path / "ckpt.pth")
    return tmp_path / "ckpt.pth"


def _refusal(path, **how):
    with pytest.raises(FileFormatError) as caught:
        load_published(path, **how)
    assert str(path) in str(caught.value)
    return str(caught.value)


# -- parity ----------------------------------------------------------------------------------------


def _x():
    return torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_the_imported_network_predicts_what_the_published_one_does(tmp_path, weights):
    found = load_published(_saved(tmp_path, [weights, {}, 7, weights]))
    assert found.model.config == {
        "width": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": 2,
        "attention_resolutions": [16],
        "image_size": 16,
        "channels": 3,
        "num_classes": 10,
        "dropout": 0.1,
        "norm_groups": 32,
    }
    assert not found.model.training
    expected = published_model.forward(weights, _x(), T, LABELS, DROP)
    with torch.no_grad():
        got = found.model(_x(), T, OURS)
        # At timestep 0 no angle of the time embedding is rounded, which both do in float32.
        start = found.model(_x(), 0 * T, OURS)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    exact = published_model.forward(weights, _x(), 0 * T, LABELS, DROP)
    torch.testing.assert_close(start, exact, rtol=1e-12, atol=1e-12)
    kept = published_model.forward(weights, _x(), T, LABELS, torch.zeros(4, dtype=torch.bool))
    assert not torch.allclose(kept[2], expected[2], atol=1e-3)  # the null vector is another label than any


@pytest.mark.parametrize(
    ("form", "which", "index", "one_step", "wrap"),
    [
        ("trained", "model", 0, False, _wrapped),
        ("trained", "ema", 1, False, dict),
        ("no average", "model", 0, False, _wrapped),
        ("distilled", "fake_score", 0, False, dict),
        ("distilled", "generator", 1, True, _wrapped),
        ("distilled", "ema", 2, True, _wrapped),
        ("early", "ema", 2, True, dict),
        ("early", "generator", 1, True, dict),
    ],
)
def test_every_form_of_the_list(tmp_path, others, form, which, index, one_step, wrap):
    first, second, third = map(wrap, others)
    optimizer = {"state": {0: {"step": torch.ones(()), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    lists = {
        "trained": [first, optimizer, 11, second],
        "no average": [first, optimizer, 11],
        "distilled": [first, optimizer, second, optimizer, 11, third],
        "early": [None, None, second, None, 11, third],
    }
    found = load_published(_saved(tmp_path, lists[form]), which)
    assert (found.which, found.one_step, found.step) == (which, one_step, 11)
    wanted = dict(others[index])
    wanted["classes_emb.weight"] = torch.cat([wanted["classes_emb.weight"], wanted.pop("null_classes_emb")[None]])
    state = found.model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    with torch.no_grad():
        got = found.model(_x().float(), T, OURS)
    expected = published_model.forward(others[index], _x().float(), T, LABELS, DROP)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_network_without_a_null_vector(tmp_path, tiny):
    weights = {name: tensor for name, tensor in tiny.items() if name != "null_classes_emb"}
    table = load_published(_saved(tmp_path, [weights, {}, 0]), "model").model.classes_emb.weight
    assert torch.equal(table, torch.cat([weights["classes_emb.weight"], torch.zeros(1, 32).half()]))


def test_the_image_size_follows_from_the_level_with_attention(tmp_path):
    weights = published_model.random_weights(multiples=(1, 2, 1), size=32, blocks=1)
    path = _saved(tmp_path, [weights, {}, 0])
    config = load_published(path, "model").model.config
    assert (config["image_size"], config["attention_resolutions"]) == (32, [16])
    config = load_published(path, "model", image_size=64).model.config
    assert (config["image_size"], config["attention_resolutions"]) == (64, [32])
    path = _saved(tmp_path, [published_model.random_weights(size=24, blocks=1), {}, 0])  # attention nowhere
    with pytest.raises(ValueError, match="give image_size"):
        load_published(path, "model")
    assert load_published(path, "model", image_size=24).model.config["attention_resolutions"] == []


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w.pop("mid.attn_1.k.bias"), "1 of 109 missing (first: ['mid.attn_1.k.bias']), 0 unknown"),
        (lambda w: w.update(logvar=torch.zeros(5)), "0 of 109 missing (first: []), 1 unknown (first: ['logvar'])"),
        (lambda w: w.pop("conv_in.weight"), "has no conv_in.weight"),
        (
            lambda w: w.update({"conv_in.weight": torch.zeros(3)}),
            "conv_in.weight has shape (3,), expected 4 dimensions",
        ),
        (
            lambda w: w.update({"mid.block_1.conv1.bias": torch.zeros(7)}),
            "mid.block_1.conv1.bias has shape (7,), expected (32,)",
        ),
        (lambda w: w.update(null_classes_emb=torch.zeros(3)), "null_classes_emb has shape (3,), expected (32,)"),
        (
            lambda w: w.update(null_classes_emb=torch.zeros(32)),
            "one floating-point dtype, got ['torch.float16', 'torch.float32']",
        ),
        (lambda w: w["norm_out.bias"].fill_(torch.nan), "norm_out.bias has 32 of 32 values NaN or infinite"),
        (lambda w: w.update({"norm_out.bias": torch.zeros(32, dtype=torch.int64)}), "one floating-point dtype"),
        (
            lambda w: w.update({"norm_out.bias": torch.zeros(32).to_sparse()}),
            "norm_out.bias: expected an ordinary tensor",
        ),
        (lambda w: w.update({"norm_out.bias": [0.0] * 32}), "norm_out.bias: expected an ordinary tensor, got list"),
        (lambda w: w.update({3: torch.zeros(1)}), "expected names of weights, got 3"),
        (lambda w: w.update({"down.0.block.0.conv1.weight": torch.zeros(33, 32, 3, 3)}), "multiples of the 32"),
    ],
)
def test_wrong_weights_are_refused_by_name(tmp_path, tiny, change, text):
    weights = {name: tensor.clone() for name, tensor in tiny.items()}
    change(weights)
    message = _refusal(_saved(tmp_path, [weights, {}, 0]), which="model")
    assert text in message
    assert f"{tmp_path / 'ckpt.pth'}: model: " in message


@pytest.mark.parametrize(
    ("values", "which", "text"),
    [
        ({"model": {}}, "ema", "expected a list of 3 or 4 entries (a trained DDPM) or of 6 (a distillation), got dict"),
        ([{}, {}], "ema", "got list of 2 entries"),
        ([{}, {}, 1], "ema", "holds no ema; it has model"),
        ([{}, {}, 1, {}], "generator", "holds no generator; it has model and ema"),
        ([None, None, {}, None, 1, {}], "fake_score", "holds no fake_score; it has generator and ema"),
        ([None, None, {}, None, 1, {}], "model", "holds no model; it has generator and ema"),
        ([{}, {}, 1, {}], "ema", "expected a dict from names to tensors, got dict of 0 entries"),
        ([[1], {}, 1], "model", "expected a dict from names to tensors, got list of 1 entries"),
    ],
)
def test_other_lists_are_refused(tmp_path, values, which, text):
    assert text in _refusal(_saved(tmp_path, values), which=which)


def test_an_unknown_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected ema, model, generator or fake_score, got 'best'"):
        load_published(tmp_path / "nowhere.pth", "best")


class _Trap:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("read", [load_published, load_salun_mask])
def test_files_that_are_none(tmp_path, read, tiny):
    path = tmp_path / "ckpt.pth"
    torch.save([_Trap(tmp_path / "sprung"), {}, 0, {}], path)
    with pytest.raises(FileFormatError, match="nothing in it was run"):
        read(path)
    assert not (tmp_path / "sprung").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "sprung").exists()  # the trap works
    torch.save([tiny, {}, 0], path, _use_new_zipfile_serialization=False)
    with pytest.raises(FileFormatError, match="since torch 1.6"):
        read(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    assert path.stat().st_size < 10**5
    with pytest.raises(FileFormatError, match="has compressed entries"):
        read(path)
    with pytest.raises(FileFormatError, match="nowhere.pth: no such file"):
        read(tmp_path / "nowhere.pth")


def _mutations(data, count):
    """Cut short, a byte changed, a stretch lost, doubled or zeroed."""
    draw = random.Random(0)
    for number in range(count):
        at, length = draw.randrange(len(data)), draw.randrange(1, 200)
        if number % 2:
            at = max(0, len(data) - 1 - draw.randrange(6000))  # the index of the archive lies at its end
        kinds = {
            0: data[:at],
            1: data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :],
            2: data[:at] + data[at + length :],
            3: data[: at + length] + data[at:],
            4: data[:at] + bytes(length) + data[at + length :],
        }
        yield kinds[number % 5]


def _small():
    """The least network whose file still has everything."""
    weights = published_model.random_weights(multiples=(1,), blocks=1, classes=2)
    return {name: tensor.half() for name, tensor in weights.items()}


def test_a_damaged_checkpoint_is_refused_or_the_same(tmp_path):
    path = _saved(tmp_path, [_small(), {}, 3])
    expected = load_published(path, "model").model.state_dict()
    refused = 0
    for data in _mutations(path.read_bytes(), 200):
        path.write_bytes(data)
        try:
            state = load_published(path, "model").model.state_dict()
        except FileFormatError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert refused > 150


# -- masks -----------------------------------------------------------------------------------------


def _zeros_and_ones(weights, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {name: (torch.rand(w.shape, generator=draw) < 0.4).long() for name, w in weights.items()}


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_published_mask_selects_the_same_weights(tmp_path, tiny, dtype):
    masks = _zeros_and_ones(tiny)
    path = tmp_path / "with_0.5.pt"
    torch.save(_wrapped({name: mask.to(dtype) for name, mask in masks.items()}), path)
    mask = load_salun_mask(path)
    mask.check()
    table = torch.cat([masks.pop("classes_emb.weight"), masks.pop("null_classes_emb")[None]])
    for name, wanted in {**masks, "classes_emb.weight": table}.items():
        assert torch.equal(mask.to_dense(name), wanted.bool()), name
    assert mask.total == sum(w.numel() for w in tiny.values())
    assert 0.39 < mask.density == mask.density_asked < 0.41
    mask.save(tmp_path / "mask.safetensors")
    assert BlockMask.load(tmp_path / "mask.safetensors") == mask
    torch.save([tiny, {}, 0], tmp_path / "ckpt.pth")
    model = load_published(tmp_path / "ckpt.pth", "model").model
    assert load_salun_mask(path, model) == mask
    assert BlockMask.random(model, 0.5, "element").parameters.keys() == mask.parameters.keys()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m["norm_out.bias"].fill_(2), "norm_out.bias has 32 of 32 values that are neither 0 nor 1"),
        (lambda m: m.update({"norm_out.bias": torch.full((32,), torch.nan)}), "32 of 32 values that are neither"),
        (lambda m: m.pop("conv_out.bias"), "1 of 109 missing (first: ['conv_out.bias'])"),
        (lambda m: m.update({"conv_out.bias": torch.ones(4)}), "conv_out.bias has shape (4,), expected (3,)"),
        (lambda m: [mask.zero_() for mask in m.values()], "no value is 1"),
    ],
)
def test_wrong_masks_are_refused(tmp_path, tiny, change, text):
    masks = _zeros_and_ones(tiny)
    change(masks)
    torch.save(masks, tmp_path / "m.pt")
    with pytest.raises(FileFormatError) as caught:
        load_salun_mask(tmp_path / "m.pt")
    assert text in str(caught.value)
    assert f"{tmp_path / 'm.pt'}: " in str(caught.value)


def test_a_mask_of_another_network_is_refused(tmp_path, tiny):
    model = torch.nn.Linear(3, 2)
    torch.save(_zeros_and_ones(tiny), tmp_path / "m.pt")
    with pytest.raises(FileFormatError, match="2 missing"):
        load_salun_mask(tmp_path / "m.pt", model)
    mask = element_mask({"weight": torch.eye(2, 3), "bias": torch.zeros(2)}, model)
    assert mask.to_dense("weight").tolist() == [[True, False, False], [False, True, False]]
    assert mask.numel == 2
    with pytest.raises(ValueError, match=r"1 unknown \(first: \['gain'\]\)"):
        element_mask({"weight": torch.eye(2, 3), "bias": torch.zeros(2), "gain": torch.ones(1)}, model)


def test_a_damaged_mask_is_refused_or_the_same(tmp_path):
    model = torch.nn.Linear(40, 9)
    masks = _zeros_and_ones(dict(model.named_parameters()))
    path = tmp_path / "with_0.5.pt"
    torch.save(masks, path)
    expected = load_salun_mask(path, model)
    refused = 0
    for data in _mutations(path.read_bytes(), 200):
        path.write_bytes(data)
        try:
            assert load_salun_mask(path, model) == expected
        except FileFormatError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100
