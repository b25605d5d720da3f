"""Masks asked for by where they lie and by what they may cost: against a search by hand, with exact fractions."""

from fractions import Fraction
from itertools import product

import pytest
import torch
from models import Zoo, zoo_batch
from torch import nn

from pecker_fast import BlockMask, BlockScores, ParameterMask, Saliency, apply_mask, weight_gradient_flops
from pecker_fast.flop_table import count_by_network
from pecker_fast.models import DDPMUNet
from pecker_fast.regions import in_region

SHAPES = {
    "temb.weight": (5, 4),
    "down.0.weight": (9, 5, 3, 3),
    "down.0.bias": (9,),
    "mid.weight": (13, 11),
    "up.0.weight": (10, 4, 3, 3),
    "up.0.bias": (10,),
    "up.1.weight": (7, 6),
}
COSTS = dict(zip(SHAPES, (2.5, 128.0, 64.0, 6.0, 512.0, 256.0, 32.0), strict=True))
UNMASKABLE = 50
BLOCKS = ["row", (4, 3), "element"]


def saliency():
    values = {name: torch.rand(shape) for name, shape in SHAPES.items()}
    return Saliency(values, total=sum(v.numel() for v in values.values()) + UNMASKABLE)


def price_of(mask, costs):
    return sum(Fraction(costs[name]) * parameter.numel for name, parameter in mask.parameters.items())


def blocks_of(values, grids, inside, excluded):
    """(mean saliency, weights, name, number) of every block that may be selected."""
    for name, grid in grids.items():
        taken = torch.zeros(grid.shape, dtype=torch.bool)
        for mask in excluded:
            taken |= mask.to_dense(name)
        for number in range(grid.num_blocks if name in inside else 0):
            index = ParameterMask(grid, torch.tensor([number])).index()
            if not taken.flatten()[index].any():
                yield float(values[name].flatten()[index].double().mean()), len(index), name, number


def longest_prefix(blocks, budget, price):
    chosen, spent = set(), 0
    for _, size, name, number in blocks:
        spent += size * price[name]
        if spent > budget and chosen:
            break
        chosen.add((name, number))
        if spent > budget:
            break
    return chosen


def search(values, density, block, scope, *, region="all", costs=None, budget="parameters", per_cost=False, exclude=()):
    """What the docstring of ``from_saliency`` says, one block after the other."""
    grids = values.grids(block)
    price = {name: Fraction(costs[name]) if budget == "costs" else Fraction(1) for name in grids}
    blocks = list(blocks_of(values, grids, in_region(grids, region), exclude))
    blocks.sort(key=lambda b: b[0] / costs[b[2]] if per_cost else b[0], reverse=True)  # stable: ties by position
    whole = sum(price[name] * grid.numel for name, grid in grids.items())
    asked = Fraction(density) * (values.total if budget == "parameters" else whole)
    available = sum(size * price[name] for _, size, name, _ in blocks)
    chosen = set()
    for layer in [{n for n in grids if n.startswith(p)} for p in ("temb", "down.0", "mid", "up.0", "up.1")]:
        layer = layer if scope == "layer" else set(grids)
        own = [b for b in blocks if b[2] in layer]
        if scope == "layer" and region == "all":
            asked_here = Fraction(density) * sum(price[name] * grids[name].numel for name in layer)
        elif scope == "layer":
            asked = round(asked) if budget == "parameters" else asked
            asked_here = asked * sum(size * price[name] for _, size, name, _ in own) / available
        else:
            asked_here = asked
        chosen |= longest_prefix(own, round(asked_here) if budget == "parameters" else asked_here, price)
    return chosen


def active_blocks(mask):
    return {(name, int(number)) for name, p in mask.parameters.items() for number in p.active}


ASKED = {
    "region": {"region": "decoder"},
    "prefixes": {"region": ("up.0.", "mid.", "down.0.bias")},
    "costs": {"costs": COSTS, "budget": "costs"},
    "per cost": {"costs": COSTS, "per_cost": True},
    "per cost, in costs": {"costs": COSTS, "budget": "costs", "per_cost": True},
    "region, in costs": {"region": "decoder", "costs": COSTS, "budget": "costs"},
    "everything": {"region": ("down.", "up."), "costs": COSTS, "budget": "costs", "per_cost": True},
}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_masks_are_what_a_search_by_hand_finds(asked, block, scope):
    values = saliency()
    first = BlockMask.from_saliency(values, 0.05, (3, 2))
    for density, exclude in product((0.001, 0.06, 0.17), ((), (first,))):
        mask = BlockMask.from_saliency(values, density, block, scope, exclude, **asked)
        assert active_blocks(mask) == search(values, density, block, scope, exclude=exclude, **asked)
        assert mask.density_asked == density and mask.total == values.total and 0 < mask.mass < 1


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_block_scores_choose_as_saliency_does(asked, scope):
    values = saliency()
    grids = values.grids((4, 3))
    sums = {name: grid.block_sums(values[name].double()) for name, grid in grids.items()}
    scores, first = BlockScores(sums, grids, values.total), BlockMask.from_saliency(values, 0.05, (3, 2))
    mask = BlockMask.from_block_scores(scores, 0.17, scope, [first], **asked)
    assert mask.parameters == BlockMask.from_saliency(values, 0.17, (4, 3), scope, [first], **asked).parameters


# -- regions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
def test_density_stays_the_share_of_the_whole_model(block):
    values = saliency()
    held = sum(v.numel() for name, v in values.items() if name.startswith("up.")) / values.total
    for scope in ("global", "layer"):
        mask = BlockMask.from_saliency(values, 0.2, block, scope, region="decoder")
        assert {name for name, p in mask.parameters.items() if p.numel} <= {n for n in SHAPES if n.startswith("up.")}
        assert set(mask.parameters) == set(SHAPES) and 0.14 < mask.density <= 0.2 + 1e-3
        everything = BlockMask.from_saliency(values, held, block, scope, region="decoder")
        assert everything.density == held


@pytest.mark.parametrize("asked", [{}, {"costs": COSTS, "budget": "costs"}], ids=["parameters", "costs"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_region_with_less_than_was_asked_for_is_refused_and_says_what_it_has(asked, scope):
    values = saliency()
    first = BlockMask.from_saliency(values, 0.1, "row", region="decoder")
    for exclude, region in product(((), (first,)), ("decoder", ("mid.", "temb."))):
        with pytest.raises(ValueError, match="less what is excluded, and density 1 was asked for; lower") as error:
            BlockMask.from_saliency(values, 1.0, "row", scope, exclude, region=region, **asked)
        share = float(str(error.value).split(" holds ")[1].split(" of ")[0])
        again = BlockMask.from_saliency(values, share, "row", scope, exclude, region=region, **asked)
        assert again.numel > 0
        with pytest.raises(ValueError, match=f"holds {share:g} of the model's {'costs' if asked else 'weights'}"):
            BlockMask.from_saliency(values, share + 0.002, "row", scope, exclude, region=region, **asked)


def test_a_region_that_is_wholly_excluded_has_nothing():
    values = saliency()
    first = BlockMask.from_saliency(values, 143 / values.total, "row", region="middle")
    assert first.parameters["mid.weight"].is_full
    for block in BLOCKS:
        with pytest.raises(ValueError, match="'middle' holds 0 of the model's weights, less what is excluded"):
            BlockMask.from_saliency(values, 1e-9, block, exclude=[first], region="middle")


# -- costs -----------------------------------------------------------------------------------------


def test_saliency_per_cost_by_hand():
    values = {"cheap": torch.tensor([[2.0], [1.0]]), "dear": torch.tensor([[6.0], [3.0]])}
    costs = {"cheap": 1, "dear": 4}
    for block in ("row", "element"):
        plain = BlockMask.from_saliency(values, 0.5, block)
        assert plain.parameters["dear"].is_full
        per_cost = BlockMask.from_saliency(values, 0.5, block, costs=costs, per_cost=True)
        assert active_blocks(per_cost) == {("cheap", 0), ("dear", 0)}  # 2 and 1.5 before 1 and 0.75
        # Of a sum of 10, half: one of 4, and then the next of 4 no longer fits.
        assert active_blocks(BlockMask.from_saliency(values, 0.5, block, costs=costs, budget="costs")) == {("dear", 0)}
        both = BlockMask.from_saliency(values, 0.6, block, costs=costs, budget="costs", per_cost=True)
        assert active_blocks(both) == {("cheap", 0), ("dear", 0), ("cheap", 1)}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_equal_costs_change_nothing_and_neither_does_the_unit(block, scope):
    values = Saliency(dict(saliency()))  # every weight can be masked
    equal = {"costs": dict.fromkeys(SHAPES, 0.5), "budget": "costs"}
    for asked in ({}, {"region": "decoder"}):
        plain = BlockMask.from_saliency(values, 0.3, block, scope, **asked)
        priced = BlockMask.from_saliency(values, 0.3, block, scope, per_cost=True, **equal, **asked)
        if block == "element":  # a number of weights is rounded to the nearest, a budget of costs is kept
            assert (priced - plain).numel == 0 and plain.numel - priced.numel <= (1 if scope == "global" else 5)
        else:
            assert priced == plain
    one = BlockMask.from_saliency(values, 0.3, block, scope, costs=COSTS, budget="costs", per_cost=True)
    for unit in (2.0**-300, 2.0**300):
        costs = {name: cost * unit for name, cost in COSTS.items()}
        assert BlockMask.from_saliency(values, 0.3, block, scope, costs=costs, budget="costs", per_cost=True) == one
    assert one != BlockMask.from_saliency(values, 0.3, block, scope)


@pytest.mark.parametrize("block", BLOCKS)
def test_everything_fits_in_a_density_of_one_however_odd_the_costs(block):
    values = saliency()
    costs = dict(zip(SHAPES, (0.1, 1 / 3, 7e5, 1e-9, 262_144.7, 11.6, 3.3), strict=True))
    for scope in ("global", "layer"):
        mask = BlockMask.from_saliency(values, 1.0, block, scope, costs=costs, budget="costs")
        assert all(parameter.is_full for parameter in mask.parameters.values())
    less = BlockMask.from_saliency(values, 1 - 1e-12, block, costs=costs, budget="costs")
    assert 0 < less.numel < mask.numel


# -- the control -----------------------------------------------------------------------------------


def zoo_costs():
    return weight_gradient_flops(Zoo(), lambda model: model(*zoo_batch()))


@pytest.mark.parametrize("block", ["row", (8, 8), "element"])
@pytest.mark.parametrize("budget", ["parameters", "costs"])
def test_random_masks_stay_in_the_region_and_within_the_budget(block, budget):
    region, costs = ("strided.", "classes.", "hidden."), zoo_costs()
    asked = {"region": region, "costs": costs if budget == "costs" else None, "budget": budget}
    mask = BlockMask.random(Zoo(), 0.2, block, seed=3, **asked)
    assert mask == BlockMask.random(Zoo(), 0.2, block, seed=3, **asked)
    assert mask != BlockMask.random(Zoo(), 0.2, block, seed=4, **asked)
    assert {name for name, p in mask.parameters.items() if p.numel} <= in_region(mask.parameters, region)
    price = costs if budget == "costs" else dict.fromkeys(costs, 1)
    everything = price_of(BlockMask.dense(Zoo()), price)
    whole = everything if budget == "costs" else mask.total
    left = Fraction(0.2) * whole - price_of(mask, price)
    assert left >= (0 if budget == "costs" else -1)  # a number of weights is rounded
    for name in in_region(mask.parameters, region):  # nothing that was passed over would still fit
        sizes = mask.parameters[name].grid.block_numel()[~mask.parameters[name].flags()]
        assert all(size * Fraction(price[name]) > left - 1 for size in sizes.tolist())
    second = BlockMask.random(Zoo(), 0.2, block, seed=3, exclude=[mask], **asked)
    assert second.numel > 0 and (second & mask).numel == 0
    with pytest.raises(ValueError, match=r"region \('strided\.', 'classes\.', 'hidden\.'\) holds 0\.\d+ of"):
        BlockMask.random(Zoo(), 0.99, block, **asked)


def test_a_mask_costs_what_was_asked_for():
    """The weight gradients of a masked network, counted while it runs, against those of the dense one."""
    torch.manual_seed(0)
    network = DDPMUNet.digits()
    x, index = torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)

    def count(network):
        with count_by_network({"network": network}) as table:
            network(x, index, index).square().mean().backward()
        return table.counts["network"]["weight_gradient"]

    costs, dense = weight_gradient_flops(network, lambda network: network(x, index, index)), count(network)
    asked = {"region": "decoder", "costs": costs}
    mask = BlockMask.random(network, 0.1, "row", budget="costs", **asked)
    apply_mask(network, mask)
    layers = {f"{n}.weight" for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert count(network) == sum(costs[name] * mask.parameters[name].numel for name in layers)
    assert 0.095 < count(network) / dense < 0.1005


# -- refused ---------------------------------------------------------------------------------------

WITHOUT = {name: cost for name, cost in COSTS.items() if name != "mid.weight"}
REFUSED = {
    "no costs for the budget": ({"budget": "costs"}, "costs: expected what a weight costs.* got None"),
    "no costs to divide by": ({"per_cost": True}, "costs: expected what a weight costs.* got None"),
    "costs for nothing": ({"costs": COSTS}, "costs: nothing asks for them; say budget='costs' or per_cost=True"),
    "another budget": ({"costs": COSTS, "budget": "flops"}, "budget: expected .* got 'flops'"),
    "a cost is missing": ({"costs": WITHOUT, "per_cost": True}, "got none for mid.weight"),
    "a cost of nothing": ({"costs": COSTS | {"up.0.bias": 0}, "budget": "costs"}, r"costs\['up.0.bias'\]: .* got 0"),
    "no number": ({"costs": COSTS | {"up.0.bias": float("nan")}, "per_cost": True}, "positive number, got nan"),
    "too much": ({"costs": dict.fromkeys(SHAPES, 1e308), "budget": "costs"}, "finite sum over all weights, got inf"),
    "another region": ({"region": "top"}, "region: expected 'all'"),
    "a list": ({"region": ["up."]}, "region: expected 'all'"),
    "nothing there": ({"region": ("up.7.",)}, r"no weight's name begins with 'up\.7\.'; this model has encoder"),
}


@pytest.mark.parametrize(("asked", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(asked, message):
    values = saliency()
    grids = values.grids("row")
    scores = BlockScores({name: grid.block_sums(values[name]) for name, grid in grids.items()}, grids, values.total)
    with pytest.raises(ValueError, match=message):
        BlockMask.from_saliency(values, 0.1, "row", **asked)
    with pytest.raises(ValueError, match=message):
        BlockMask.from_block_scores(scores, 0.1, **asked)


def test_refused_of_a_random_mask():
    with pytest.raises(ValueError, match="got None"):
        BlockMask.random(Zoo(), 0.1, budget="costs")
    with pytest.raises(ValueError, match="got none for hidden.bias"):
        BlockMask.random(Zoo(), 0.1, budget="costs", costs={n: c for n, c in zoo_costs().items() if n != "hidden.bias"})
    with pytest.raises(ValueError, match="no weight lies in the decoder"):
        BlockMask.random(Zoo(), 0.1, region="decoder")
