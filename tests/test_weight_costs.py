"""weight_gradient_flops: against torch's counter and counts by hand; the model comes back untouched."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import Zoo, conv_net, zoo_batch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from pecker_fast import BlockMask, apply_mask, weight_gradient_flops
from pecker_fast.flop_table import count_by_network
from pecker_fast.maskable import survey
from pecker_fast.models import DDPMUNet


class Ragged(nn.Module):
    """Strides, paddings, taps and sizes that do not divide one another."""

    def __init__(self, groups=1):
        super().__init__()
        self.first = nn.Conv2d(3, 10, (3, 5), stride=(2, 3), padding=(1, 2))
        self.second = nn.Conv2d(10, 14, 2, stride=2, dilation=2, groups=groups, bias=False)
        self.out = nn.Linear(14, 7)

    def forward(self, x):
        return self.out(self.second(torch.relu(self.first(x))).mean(2).transpose(1, 2))


def run_zoo(model):
    return model(*zoo_batch())


def counted(model, run):
    """FLOPs of the weight gradients of a real backward pass, as torch counts them."""
    with count_by_network({"model": model}) as table:
        run(model).square().mean().backward()
    return table.counts["model"]["weight_gradient"]


def products(model, costs):
    kinds = nn.Conv2d | nn.Linear
    return sum(costs[f"{name}.weight"] * m.weight.numel() for name, m in model.named_modules() if isinstance(m, kinds))


def run_unet(model, batch=3):
    channels, size = model.config["channels"], model.config["image_size"]
    labels = torch.arange(batch) % model.config["num_classes"]
    return model(torch.randn(batch, channels, size, size), torch.zeros(batch, dtype=torch.long), labels)


@pytest.mark.parametrize(
    ("model", "run"),
    [(DDPMUNet.digits, run_unet), (Ragged, lambda model: model(torch.randn(3, 3, 17, 29)))],
    ids=["unet", "ragged"],
)
def test_products_cost_what_torch_counts(model, run):
    network = model()
    costs = weight_gradient_flops(network, run)
    assert list(costs) and set(costs) == set(survey(network).maskable)
    assert products(network, costs) == counted(network, run) > 0


def test_of_grouped_convolutions_every_weight_costs_as_much_as_of_others():
    def run(model):
        return model(torch.randn(3, 3, 17, 29))

    plain, grouped = weight_gradient_flops(Ragged(), run), weight_gradient_flops(Ragged(groups=2), run)
    assert plain == grouped
    second = 2 * 3 * 4 * 4  # the map of 9 x 10 that the first layer leaves, in taps of 2 that reach over 3
    assert grouped["second.weight"] == second
    # torch counts each weight of the second layer as if it saw both groups
    model = Ragged(groups=2)
    assert counted(model, run) - products(model, grouped) == second * model.second.weight.numel()


def test_costs_by_hand():
    costs = weight_gradient_flops(Zoo(), run_zoo)
    batch, positions, small = 6, 6 * 9 * 9, 6 * 5 * 5
    assert costs == {
        "conv_in.weight": 2 * positions,
        "conv_in.bias": positions,
        "norm.weight": 2 * positions,
        "norm.bias": positions,
        "strided.weight": 2 * small,
        "strided.bias": small,
        "grouped.weight": 2 * small,
        "batch_norm.weight": 2 * small,
        "batch_norm.bias": small,
        "classes.weight": batch / 7,
        "hidden.weight": 2 * batch,
        "hidden.bias": batch,
        "layer_norm.weight": 2 * batch,
        "layer_norm.bias": batch,
        "out.weight": 2 * batch,
    }


def test_layers_cost_once_for_every_call_and_nothing_without_one():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.often, self.never = nn.Linear(4, 4), nn.Linear(4, 4)
            self.plain = nn.LayerNorm(4, elementwise_affine=False)

        def forward(self, x):
            return self.often(self.plain(self.often(x)))

    assert weight_gradient_flops(Shared(), lambda model: model(torch.ones(5, 2, 4))) == {
        "often.weight": 2 * 2 * 10,
        "often.bias": 2 * 10,
    }
    assert weight_gradient_flops(nn.Linear(4, 3), lambda model: model(torch.ones(4))) == {"weight": 2, "bias": 1}


@pytest.mark.parametrize("run", [lambda model: None, lambda model: model(torch.ones(0, 4))])
def test_a_run_that_reaches_nothing_is_refused(run):
    with pytest.raises(ValueError, match="put nothing through the Linear's layers"):
        weight_gradient_flops(nn.Linear(4, 4), run)


def test_the_model_is_untouched_even_after_an_error():
    model = Zoo().train()
    model.norm.eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    seen = []

    def run(model):
        seen.append((model.training, torch.is_grad_enabled(), len(model.conv_in._forward_hooks)))
        run_zoo(model)
        if len(seen) == 2:
            raise RuntimeError("in the middle")

    weight_gradient_flops(model, run)
    with pytest.raises(RuntimeError, match="in the middle"):
        weight_gradient_flops(model, run)
    assert seen == [(False, False, 1)] * 2
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()] and torch.is_grad_enabled()
    assert not any(module._forward_hooks for module in model.modules())


def test_fake_weights_cost_the_same_without_a_forward_pass():
    network = DDPMUNet.digits()
    expected = weight_gradient_flops(network, run_unet)
    with FakeCopyMode(FakeTensorMode(allow_non_fake_inputs=True)):
        fake = copy.deepcopy(network)
    assert weight_gradient_flops(fake, run_unet) == expected
    with FakeTensorMode():
        published = DDPMUNet.cifar10()  # 38 million weights that are nowhere
        costs = weight_gradient_flops(published, lambda model: run_unet(model, 128))
    assert costs["conv_in.weight"] == costs["conv_out.weight"] == 2 * 128 * 32 * 32
    # The weights' third of a forward and backward pass, 1.594 TFLOP: tests/test_iteration_flops.py counts it.
    assert 0.96 < products(published, costs) / 1.594e12 <= 1


def test_a_masked_model_costs_what_it_did_before():
    model = conv_net()
    expected = weight_gradient_flops(model, lambda model: model(torch.ones(2, 3, 8, 8)))
    apply_mask(model, BlockMask.random(model, 0.3, "row"))
    assert weight_gradient_flops(model, lambda model: model(torch.ones(2, 3, 8, 8))) == expected


def test_weights_used_without_their_layer_are_not_seen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    costs = weight_gradient_flops(model, lambda model: model[1](F.linear(torch.ones(2, 4), model[0].weight)))
    assert set(costs) == {"1.weight", "1.bias"}
