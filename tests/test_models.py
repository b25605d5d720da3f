"""The networks: published sizes, names and formulas, in every layout and dtype."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pecker_fast.models import DDPMUNet, DigitsClassifier
from pecker_fast.models.blocks import Attention, Downsample, ResnetBlock, Upsample, sinusoidal_embedding


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # for networks as small as these a second one only waits


def _tiny(**changes):
    arguments = {"width": 4, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,)}
    return DDPMUNet(**{**arguments, "image_size": 8, "channels": 1, "norm_groups": 2, **changes})


def _inputs(batch=3):
    return torch.randn(batch, 1, 8, 8), torch.tensor([0, 500, 999])[:batch], torch.tensor([0, 9, 10])[:batch]


@pytest.mark.parametrize(
    ("build", "parameters", "tensors"),
    # One tensor less than published: the null vector is a row of the embedding table.
    [(DDPMUNet.cifar10, 38_632_323, 333), (DDPMUNet.stl10, 83_159_683, 395)],
)
def test_published_sizes(build, parameters, tensors):
    with torch.device("meta"):
        model = build()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(list(model.parameters())) == tensors


def test_published_names_and_shapes():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in DDPMUNet.cifar10().state_dict().items()}
    expected = {
        "temb.dense.0.weight": (512, 128),
        "cemb.dense.1.bias": (512,),
        "classes_emb.weight": (11, 128),
        "conv_in.weight": (128, 3, 3, 3),
        "down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "down.1.block.0.temb_cemb_proj.weight": (256, 1024),
        "down.1.attn.1.q.weight": (256, 256, 1, 1),
        "down.2.downsample.conv.weight": (256, 256, 3, 3),
        "mid.block_1.norm2.weight": (256,),
        "mid.attn_1.proj_out.bias": (256,),
        "mid.block_2.conv2.weight": (256, 256, 3, 3),
        "up.0.block.2.conv1.weight": (128, 256, 3, 3),
        "up.1.attn.2.norm.weight": (256,),
        "up.3.block.0.conv1.weight": (256, 512, 3, 3),
        "up.3.upsample.conv.weight": (256, 256, 3, 3),
        "norm_out.weight": (128,),
        "conv_out.weight": (3, 128, 3, 3),
    }
    assert {name: shapes[name] for name in expected} == expected
    absent = (
        "down.0.attn",
        "down.2.attn",
        "down.3.downsample",
        "up.0.upsample",
        "down.0.block.0.nin_shortcut",
    )
    assert not [name for name in shapes if name.startswith(absent)]


def test_timestep_embedding():
    value = sinusoidal_embedding(torch.tensor([0, 7]), 8)
    frequencies = torch.tensor([1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3), 1e-4])
    assert torch.equal(value[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    torch.testing.assert_close(value[1], torch.cat([(7 * frequencies).sin(), (7 * frequencies).cos()]))


def test_attention_is_single_head_with_inverse_root_scale():
    layer = Attention(6, norm_groups=3).double()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    q, k, v = (project(layer.norm(x)).flatten(2) for project in (layer.q, layer.k, layer.v))
    weights = torch.softmax(q.transpose(1, 2) @ k / 6**0.5, dim=2)
    expected = x + layer.proj_out((v @ weights.transpose(1, 2)).view_as(x))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), expected)


def test_residual_block_adds_the_embedding_after_the_first_convolution():
    block = ResnetBlock(4, 6, 5, dropout=0.5, norm_groups=2).eval()
    x, embedding = torch.randn(2, 4, 3, 3), torch.randn(2, 5)
    h = block.conv1(F.silu(block.norm1(x))) + block.temb_cemb_proj(embedding)[:, :, None, None]
    expected = block.conv2(F.silu(block.norm2(h))) + block.nin_shortcut(x)
    torch.testing.assert_close(block(x, embedding), expected)
    assert isinstance(ResnetBlock(4, 4, 5, dropout=0.0, norm_groups=2).nin_shortcut, nn.Identity)
    assert not torch.equal(block.train()(x, embedding), expected)


def test_resampling_pads_right_and_bottom_and_repeats_pixels():
    down, up = Downsample(1), Upsample(1)
    for layer in (down, up):
        nn.init.zeros_(layer.conv.bias)
        nn.init.dirac_(layer.conv.weight)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    # The centre of the first window is pixel (1, 1): nothing was padded above or to the left.
    assert torch.equal(down(x), x[:, :, 1::2, 1::2])
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_every_parameter_matters():
    model = _tiny()
    model(*_inputs()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    # A row of the embedding per label in the batch, the null class among them.
    rows = model.classes_emb.weight.grad.abs().sum(1) > 0
    assert rows.nonzero().flatten().tolist() == [0, 9, 10]


def test_label_and_time_change_the_output_per_sample():
    model = _tiny().eval()
    x, t, c = _inputs()
    base = model(x, t, c)
    other = model(x, torch.tensor([0, 500, 998]), torch.tensor([1, 9, 10]))
    changed = (base != other).flatten(1).any(1)
    assert changed.tolist() == [True, False, True]


def test_channels_last_and_bfloat16_and_autocast():
    model = _tiny().eval()
    x, t, c = _inputs()
    expected = model(x, t, c)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x, t, c).float(), expected, rtol=0.1, atol=0.1)
    half = copy.deepcopy(model).bfloat16()
    torch.testing.assert_close(half(x.bfloat16(), t, c).float(), expected, rtol=0.1, atol=0.1)
    last = model.to(memory_format=torch.channels_last)
    output = last(x.contiguous(memory_format=torch.channels_last), t, c)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_forward_is_one_graph():
    model = _tiny().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    inputs = _inputs()
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


def test_config_rebuilds_the_network():
    for model in (_tiny(dropout=0.2), DigitsClassifier(width=4)):
        config = json.loads(json.dumps(model.config))
        again = type(model)(**config)
        again.load_state_dict(model.state_dict())
        assert again.config == model.config


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"width": 5}, "width"),
        ({"width": 2}, "width"),
        ({"width": 4.0}, "width"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"channel_mult": (1, 0)}, "channel_mult"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
        ({"image_size": 9}, "image_size"),
        ({"attention_resolutions": (-4,)}, "attention_resolutions"),
        ({"num_classes": True}, "num_classes"),
        ({"dropout": 1.0}, "dropout"),
        ({"norm_groups": 0}, "norm_groups"),
    ],
)
def test_bad_architectures_are_named(changes, name):
    with pytest.raises(ValueError, match=name):
        _tiny(**changes)


def test_classifier():
    model = DigitsClassifier().eval()
    images = torch.randn(5, 1, 8, 8)
    assert model(images).shape == (5, 10)
    assert model.features(images).shape == (5, 64)
    torch.testing.assert_close(model.head(model.features(images)), model(images))
    for changes, name in (({"image_size": 6}, "image_size"), ({"width": 0}, "width")):
        with pytest.raises(ValueError, match=name):
            DigitsClassifier(**changes)
