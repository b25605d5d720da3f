"""FLOPs of an iteration: cells against counts by hand, the real step and another counter; a run goes on unchanged."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from models import mask_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from pecker_fast import BlockMask, DistillConfig, MaskConfig, MaskedDistiller, NoiseSchedule, models
from pecker_fast.cli import main
from pecker_fast.flop_table import KINDS, count_by_network
from pecker_fast.flops import count_flops
from pecker_fast.iteration_flops import NETWORKS, describe
from pecker_fast.models import DDPMUNet
from pecker_fast.models.blocks import Attention

SCHEDULE = NoiseSchedule.linear()
BATCH = 5


def unet(**settings):
    torch.manual_seed(0)
    small = {"width": 8, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "image_size": 8}
    return DDPMUNet(**(small | {"channels": 1, "norm_groups": 4, "num_classes": 4} | settings))


def two_levels(**settings):
    return unet(channel_mult=(1, 2), attention_resolutions=(4,), **settings)


def distiller(network=None, kind="random", mask=None, **settings):
    chosen = MaskConfig(kind=kind, density=0.3, block="row", batches=3, batch_size=4)
    defaults = {"forget": (2,), "num_classes": 4, "sample_shape": (1, 8, 8), "batch_size": BATCH, "mask": chosen}
    made = MaskedDistiller(network or unet(), SCHEDULE, DistillConfig(**(defaults | settings)))
    made.build_mask() if mask is None else made.use_mask(mask)
    return made


class Layers:
    """What the layers of one forward pass multiply, by name, 2 a multiply-add.

    Attention is two products. Torch takes its kernel where channels lie innermost, whose backward has five, because it
    computes the scores again; elsewhere it writes the products out, and the backward has four.
    """

    def __init__(self, network, batch, size=8):
        self.flops, self.attention = {}, 0
        self.fused = network.mid.block_1.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        hooks = []
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                hooks.append(module.register_forward_hook(lambda m, _, out, name=name: self._product(name, m, out)))
            elif isinstance(module, Attention):
                hooks.append(module.register_forward_hook(lambda m, _, out: self._attention(out)))
        x, index = torch.randn(batch, 1, size, size), torch.zeros(batch, dtype=torch.long)
        with torch.no_grad():
            network(x, index, index)
        for hook in hooks:
            hook.remove()

    def _product(self, name, module, out):
        taps = math.prod(module.weight.shape[1:])
        self.flops[name] = 2 * taps * out.numel()

    def _attention(self, out):
        batch, channels, height, width = out.shape
        self.attention += 2 * 2 * batch * (height * width) ** 2 * channels  # scores, then their mix of the values

    @property
    def forward(self):
        return sum(self.flops.values()) + self.attention

    def input_gradient(self, without=()):
        products = 5 if self.fused else 4
        return sum(flops for name, flops in self.flops.items() if name not in without) + self.attention // 2 * products

    def weight_gradient(self):
        return sum(self.flops.values())


def counted_by_running(made):
    with count_flops() as counted:
        made.step()
    return counted.total


def embedding_layers(layers):
    return {name for name in layers.flops if "emb" in name}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_cell_of_the_dense_iteration(layout):
    network = two_levels().to(memory_format=layout)
    layers = Layers(network, 2 * BATCH)
    assert layers.fused == (layout is torch.channels_last)
    at_the_start = {"conv_in", "temb.dense.0"}  # noise and sinusoids want no gradient
    training = layers.input_gradient(at_the_start)
    serving = layers.input_gradient(embedding_layers(layers))  # frozen: nothing of the embedding wants one
    assert distiller(network, "dense").flops() == {
        "generator": {
            "forward": 2 * layers.forward,
            "input_gradient": training,
            "weight_gradient": layers.weight_gradient(),
        },
        "true_score": {"forward": layers.forward, "input_gradient": serving, "weight_gradient": 0},
        "fake_score": {
            "forward": 2 * layers.forward,
            "input_gradient": training + serving,
            "weight_gradient": layers.weight_gradient(),
        },
        "total": 5 * layers.forward + 2 * training + 2 * serving + 2 * layers.weight_gradient(),
        "mask": dict.fromkeys((*KINDS, "total"), 0),
    }


@pytest.mark.slow
def test_the_published_iteration_costs_22_forwards_at_width_128():
    made = distiller(
        DDPMUNet.cifar10(), mask=None, kind="dense", num_classes=10, sample_shape=(3, 32, 32), batch_size=128
    )
    flops = made.flops()
    forward = flops["true_score"]["forward"] / 2  # F: one network on the retained samples
    assert forward == pytest.approx(1.594e12, rel=1e-3)
    assert flops["total"] / forward == pytest.approx(22, rel=0.01)
    expected = {"generator": (4, 2, 2), "true_score": (2, 2, 0), "fake_score": (4, 4, 2)}
    for network, cells in expected.items():
        assert [flops[network][kind] / forward for kind in KINDS] == pytest.approx(cells, rel=0.04)


@pytest.mark.parametrize("kind", ["dense", "random", "saliency"])
def test_it_is_what_the_step_and_the_mask_really_do(kind):
    made = distiller(unet(), kind)
    flops = made.flops()
    assert counted_by_running(made) == flops["total"]
    with count_flops() as mask:
        again = distiller(unet(), kind)
    assert mask.total == flops["mask"]["total"] == sum(flops["mask"][name] for name in KINDS)
    assert again.mask == made.mask and (mask.total > 0) == (kind == "saliency")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_on_a_gpu_too_and_without_its_memory(layout):
    made = distiller(two_levels().to("cuda", memory_format=layout), "saliency")
    expected = counted_by_running(made)
    torch.cuda.synchronize()
    rng, allocated = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    assert made.flops()["total"] == expected
    assert torch.cuda.memory_allocated() == allocated and torch.equal(torch.cuda.get_rng_state(), rng)


def test_the_cost_of_the_mask_by_kind_and_amortised():
    flops = distiller(kind="saliency").flops(steps=7)
    layers = Layers(unet(), 4)
    once = {
        "forward": 2 * 3 * layers.forward,  # three batches of four, generated and then looked at
        "input_gradient": 3 * layers.input_gradient({"conv_in", "temb.dense.0"}),
        "weight_gradient": 3 * layers.weight_gradient(),
    }
    total = sum(once.values())
    assert flops["mask"] == {**once, "total": total, "steps": 7, "per_step": round(total / 7)}
    assert flops["total_with_mask"] == flops["total"] + round(total / 7)
    assert "total_with_mask" not in distiller().flops()


def above_a_frozen_way_down(network, layers):
    """Input gradients of the way up: none of the embedding, of skips only what shares a norm's group with others."""
    total = layers.input_gradient(set(layers.flops)) // 2  # attention: two of its four modules are on the way up
    own = 0  # the first block's input is frozen too
    for level in (1, 0):
        for index, block in enumerate(network.up[level].block):
            channels, group = block.conv1.in_channels, block.conv1.in_channels // block.norm1.num_groups
            name = f"up.{level}.block.{index}"
            total += layers.flops[f"{name}.conv1"] * (-(-own // group) * group) // channels
            total += layers.flops[f"{name}.nin_shortcut"] * own // channels + layers.flops[f"{name}.conv2"]
            own = block.conv2.out_channels
    attention = sum(flops for name, flops in layers.flops.items() if name.startswith("up.") and ".attn." in name)
    return total + attention + layers.flops["up.1.upsample.conv"] + layers.flops["conv_out"]


def test_a_mask_of_the_way_up_has_no_gradients_below_it():
    network = two_levels(dropout=0.0)
    # The norms stay frozen, so that skips from the frozen way down want no gradient.
    weights = [f"{name}.weight" for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    active = [name for name in weights if name.startswith(("up.", "conv_out"))]
    mask = mask_of(network, tuple(active), 0.25)
    made = distiller(network, mask=mask)
    flops, layers = made.flops(), Layers(two_levels(), 2 * BATCH)
    assert flops["generator"] == {
        "forward": 2 * layers.forward,
        "input_gradient": above_a_frozen_way_down(network, layers),
        "weight_gradient": sum(
            layers.flops[n.removesuffix(".weight")] * mask.parameters[n].numel // network.get_parameter(n).numel()
            for n in active
        ),
    }
    assert counted_by_running(made) == flops["total"]


def test_a_mask_of_the_last_layer_has_no_input_gradient_at_all():
    network = unet()
    made = distiller(network, mask=mask_of(network, ("conv_out.weight",), 1.0))
    assert made.flops()["generator"]["input_gradient"] == 0


def snapshot(made):
    state = {"rng": made.draws.rng.get_state(), "torch": torch.get_rng_state(), "ema": made.active.ema}
    for network in NETWORKS:
        module = getattr(made, network)
        state |= {f"{network}.{name}": value for name, value in module.state_dict().items()}
        state |= {f"{network}.{name}.value": p for name, p in module.named_parameters()}
        state |= {f"{network}.{name}.grad": p.grad for name, p in module.named_parameters() if p.grad is not None}
    for of, optimizer in {"generator": made.generator_optimizer, "fake": made.fake_score_optimizer}.items():
        state |= {f"{of} optimizer's {name}": torch.as_tensor(v) for name, v in optimizer._state().items()}
    return {name: value.detach().clone() for name, value in state.items()}


def plain(made):
    modules = [module for network in NETWORKS for module in getattr(made, network).modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
    flags = [(p.requires_grad, p.data_ptr()) for module in modules for p in module.parameters(recurse=False)]
    rates = [o.param_groups[0]["lr"] for o in (made.generator_optimizer, made.fake_score_optimizer)]
    return [type(module) for module in modules], [m.training for m in modules], hooks, flags, rates, made.steps_done


@pytest.mark.parametrize("kind", ["random", "saliency"])
def test_the_run_is_not_disturbed(kind):
    made = distiller(unet(dropout=0.2), kind)
    torch.manual_seed(5)
    made.step()
    before, others = snapshot(made), plain(made)
    first = made.flops(10)
    after = snapshot(made)
    assert before.keys() == after.keys() and plain(made) == others
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert made.flops(10) == first
    twin = distiller(unet(dropout=0.2), kind)  # the same run, never counted
    for run in (twin, twin, made):
        torch.manual_seed(5)
        run.step()
    other, going_on = snapshot(twin), snapshot(made)
    assert all(torch.equal(value, other[name]) for name, value in going_on.items())


def test_fvcore_agrees():
    """fvcore counts a multiply-add as one, and norms and upsampling besides; attention it does not know."""
    fvcore = pytest.importorskip("fvcore.nn")
    network = two_levels().eval()
    inputs = torch.randn(2 * BATCH, 1, 8, 8), torch.zeros(2 * BATCH).long(), torch.zeros(2 * BATCH).long()

    def attention(inputs, _):
        batch, heads, positions, channels = inputs[0].type().sizes()
        return 2 * batch * heads * positions**2 * channels

    analysis = fvcore.FlopCountAnalysis(network, inputs).unsupported_ops_warnings(False)
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention)
    counted = analysis.by_operator()
    products = sum(counted.pop(name) for name in ("conv", "linear", "scaled_dot_product_attention"))
    assert 2 * products == distiller(two_levels()).flops()["true_score"]["forward"]
    assert set(counted) == {"group_norm", "upsample_nearest2d"}


# -- what the table is made of ---------------------------------------------------------------------


class Products(nn.Module):
    """Attention written out, a linear layer on three dimensions without and with bias, a projection transposed."""

    def __init__(self):
        super().__init__()
        self.free, self.biased = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.projection = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        h = self.biased(self.free(x)).bfloat16().float()
        h = (h @ h.transpose(1, 2)).softmax(-1) @ h
        return h.flatten(0, 1) @ self.projection.t()


def test_products_are_what_they_produce():
    network, x = Products(), torch.randn(2, 3, 6, requires_grad=True)
    linear, attention = 2 * 6 * 6 * 6, 2 * 2 * 3 * 3 * 6
    with count_by_network({"net": network}) as table:
        (network(x).sum() + (x[0] @ x[1].t()).sum()).backward()
    forward = {"forward": 3 * linear + 2 * attention, "input_gradient": 3 * linear + 4 * attention}
    assert table.counts == {"net": {**forward, "weight_gradient": 3 * linear}}
    outside = 2 * 3 * 3 * 6  # x[0] @ x[1].t(), its two gradients, of no network
    assert table.outside == 3 * outside and table.total == sum(table.counts["net"].values()) + table.outside


def test_a_cast_weight_is_a_weight():
    network, x = nn.Linear(6, 4), torch.randn(5, 6, requires_grad=True)
    with count_by_network({"net": network}) as table, torch.autocast("cpu", torch.bfloat16):
        network(x).float().sum().backward()
    assert table.counts["net"] == dict.fromkeys(KINDS, 2 * 5 * 6 * 4)


def test_a_pass_done_again_is_a_forward_pass():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(2, 2, 1), nn.Linear(4, 4)

        def forward(self, x):
            return checkpoint(lambda x: F.silu(self.linear(F.silu(self.conv(x)))), x, use_reentrant=False)

    with count_by_network({"net": (network := Twice())}) as table:
        network(torch.randn(1, 2, 4, 4, requires_grad=True)).square().sum().backward()
    once = 2 * 2 * 2 * 16 + 2 * 8 * 4 * 4
    assert table.counts["net"] == {"forward": 2 * once, "input_gradient": once, "weight_gradient": once}


def test_networks_that_feed_each_other_and_inference_mode():
    first, second = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 5, 1)
    with count_by_network({"first": first, "second": second}) as table:
        second.requires_grad_(False)
        second(first(torch.randn(1, 2, 4, 4)).tanh()).sum().backward()
        with torch.inference_mode():
            first(torch.randn(1, 2, 4, 4))
    one, two = 2 * 2 * 3 * 16, 2 * 3 * 5 * 16
    assert table.counts == {
        "first": {"forward": 2 * one, "input_gradient": 0, "weight_gradient": one},
        "second": {"forward": two, "input_gradient": two, "weight_gradient": 0},
    }
    assert not first._forward_hooks and not first._forward_pre_hooks


# -- other networks, bad input, the command --------------------------------------------------------


def test_a_diffusers_unet():
    diffusers = pytest.importorskip("diffusers")
    small = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "num_class_embeds": 4}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    network = diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **small, **blocks)
    made = distiller(network)
    flops = made.flops()
    assert counted_by_running(made) == flops["total"] == sum(sum(flops[name].values()) for name in NETWORKS)
    assert flops["true_score"]["weight_gradient"] == 0 < flops["generator"]["weight_gradient"]


def test_bad_input():
    unbuilt = MaskedDistiller(unet(), SCHEDULE, DistillConfig(forget=(2,), num_classes=4, sample_shape=(1, 8, 8)))
    with pytest.raises(RuntimeError, match="call build_mask"):
        unbuilt.flops()
    for steps in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="steps: expected a positive integer"):
            distiller().flops(steps)


def test_described_for_people():
    lines = describe(distiller(kind="saliency").flops(100)).splitlines()
    assert lines[0] == "one iteration, MFLOP" and [line.split()[0] for line in lines[2:6]] == [*NETWORKS, "all"]
    assert "over 100 steps" in lines[-1]
    assert describe(distiller().flops()).endswith("choosing the mask computes nothing")


def test_doctor_counts_a_given_model(tmp_path, capsys):
    generation = {"kind": "ddim", "steps": 2, "schedule": SCHEDULE.to_dict(), "sample_shape": [1, 8, 8]}
    models.save(unet(), tmp_path / "model", generation)
    arguments = ["doctor", "--flops", "--model", str(tmp_path / "model"), "--mask_density", "0.3", "--block", "row"]
    assert main([*arguments, "--device", "cpu", "--max-train-steps", "20", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["flops"]
    network = unet().to(memory_format=torch.channels_last)
    config = DistillConfig(forget=(0,), num_classes=4, sample_shape=(1, 8, 8), mask=MaskConfig(density=0.3))
    made = MaskedDistiller(network, SCHEDULE, config)
    made.use_mask(BlockMask.random(copy.deepcopy(network), 0.3, "row"))
    expected = made.flops(20)
    assert {name: values[name] for name in expected} == expected
    assert values["density"] == made.mask.density and values["batch_size"] == 128
    assert main([*arguments, "--device", "cpu"]) == 0
    assert "weight gradient" in capsys.readouterr().out
    assert main(["doctor", "--block", "row"]) == 2
    assert "--block says what --flops counts" in capsys.readouterr().err
