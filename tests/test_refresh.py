"""change_mask and MaskRefresher: blocks enter and leave, the state of those that stay is carried over, exactly."""

import copy

import pytest
import torch
from models import Zoo, conv_net, loss_of, zoo_batch
from torch import nn

from pecker_fast import (
    ActiveParameters,
    BlockMask,
    MaskedAdamW,
    MaskRefresher,
    apply_mask,
    change_mask,
    compute_saliency,
    linear_density,
    score_blocks,
)
from pecker_fast.errors import NonFiniteError

OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.1),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "MaskedAdamW": None,
}


def make_optimizer(name, active, **settings):
    if name == "MaskedAdamW":
        return MaskedAdamW(active, lr=0.01, weight_decay=0.1, **settings)
    return OPTIMIZERS[name](active.parameters())


def train(model, optimizer, steps, batch):
    for _ in range(steps):
        optimizer.zero_grad()
        model(*batch).square().mean().backward()
        optimizer.step()


def two_masks(model, block="row"):
    return BlockMask.random(model, 0.3, block, seed=1), BlockMask.random(model, 0.3, block, seed=2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [("row", "row"), ("element", (8, 8)), ((8, 8), "row")])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_only_weights_under_the_mask_of_the_moment_move(optimizer, dtype, blocks, layout):
    model = Zoo().to(dtype).to(memory_format=layout)
    first = BlockMask.random(model, 0.3, blocks[0], seed=1)
    second = BlockMask.random(model, 0.3, blocks[1], seed=2)
    batch = zoo_batch(dtype)
    active = apply_mask(model, first)
    opt = make_optimizer(optimizer, active)
    for mask in (first, second):
        if mask is second:
            change_mask(active, second, opt)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        train(model, opt, 3, batch)
        for name, parameter in mask.parameters.items():
            outside = ~parameter.to_dense()
            now = model.state_dict()[name]
            assert torch.equal(now[outside], before[name][outside]), name
            assert not parameter.numel or not torch.equal(now, before[name]), name
    active.remove()


class DenseTwin:
    """The same training written out densely: a full state, of which only active weights are read and written."""

    def __init__(self, model, mask):
        self.model, self.mask, self.step_count = model, mask, 0
        self.first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.second = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def change(self, mask):
        everything = torch.cat([self.second[n][p.to_dense()] for n, p in self.mask.parameters.items()])
        for name, new in mask.parameters.items():
            old = self.mask.parameters[name].to_dense()
            entering = new.to_dense() & ~old
            self.first[name][entering] = 0
            self.second[name][entering] = self.second[name][old].mean() if old.any() else everything.mean()
        self.mask = mask

    def step(self, batch, lr, decay, beta1=0.9, beta2=0.999, eps=1e-8):
        self.model.zero_grad()
        self.model(*batch).square().mean().backward()
        self.step_count += 1
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name not in self.mask.parameters:
                    continue
                on, g = self.mask.parameters[name].to_dense(), p.grad
                m, v = self.first[name], self.second[name]
                m[on] += (1 - beta1) * (g[on] - m[on])
                v[on] = beta2 * v[on] + (1 - beta2) * g[on] ** 2
                m_hat, v_hat = m[on] / (1 - beta1**self.step_count), v[on] / (1 - beta2**self.step_count)
                p[on] = p[on] * (1 - lr * decay) - lr * m_hat / (v_hat.sqrt() + eps)


def test_masked_adamw_equals_a_dense_state_of_which_only_the_mask_is_used():
    model = Zoo().double().eval()
    twin_model = copy.deepcopy(model)
    first, second = two_masks(model)
    batch = zoo_batch(torch.float64)
    active, twin = apply_mask(model, first), DenseTwin(twin_model, first)
    opt = MaskedAdamW(active, lr=0.01, weight_decay=0.1)
    for step in range(9):
        if step in (3, 6):
            mask = second if step == 3 else first
            change_mask(active, mask, opt)
            twin.change(mask)
        train(model, opt, 1, batch)
        twin.step(batch, lr=0.01, decay=0.1)
    for name, weight in twin_model.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-10, atol=1e-12)


def test_the_momentum_of_weights_that_stay_is_carried_and_of_others_is_zero():
    model = conv_net()
    first, second = two_masks(model)
    active = apply_mask(model, first)
    opt = make_optimizer("SGD", active)
    loss_of(model).backward()
    opt.step()
    old = {}
    for entry, p in zip(active.entries, active.parameters(), strict=True):
        dense = torch.zeros(entry.mask.grid.numel)
        dense[entry.mask.index(entry.channels_last)] = entry.flattened(opt.state[p]["momentum_buffer"])
        old[entry.name] = dense
    change_mask(active, second, opt)
    for entry, p in zip(active.entries, active.parameters(), strict=True):
        if p not in opt.state:
            assert entry.name not in old
            continue
        expected = old[entry.name][entry.mask.index(entry.channels_last)]
        assert torch.equal(entry.flattened(opt.state[p]["momentum_buffer"]), expected)
        assert opt.state[p]["momentum_buffer"].stride() == p.stride()


def test_every_active_parameter_stays_in_its_group_and_newcomers_join_the_first():
    model = conv_net()
    first, second = two_masks(model)
    active = apply_mask(model, first)
    named = dict(active.named_parameters())
    biases = [p for n, p in named.items() if n.endswith("bias")]
    weights = [p for n, p in named.items() if not n.endswith("bias")]
    opt = torch.optim.AdamW([{"params": weights}, {"params": biases, "weight_decay": 0.0}], lr=0.01)
    old_biases = {n for n in named if n.endswith("bias")}
    change_mask(active, second, opt)
    groups = [{id(p) for p in group["params"]} for group in opt.param_groups]
    for name, p in active.named_parameters():
        assert id(p) in groups[1 if name in old_biases else 0], name
    assert sum(map(len, groups)) == len(active.parameters())


def test_the_running_average_goes_on():
    model = conv_net()
    first, second = two_masks(model)
    active = apply_mask(model, first)
    opt = MaskedAdamW(active, lr=0.01, ema_decay=0.9)
    for _ in range(3):
        opt.zero_grad()
        loss_of(model).backward()
        opt.step()
    old = {name: active.to_dense(active.ema, name) for name in active.names}
    change_mask(active, second, opt)
    for name in active.names:
        new, dense = active.to_dense(active.ema, name), model.get_parameter(name)
        here = second.parameters[name].to_dense()
        stayed = here & first.parameters[name].to_dense()
        assert torch.equal(new[here & ~stayed], dense[here & ~stayed])
        assert not stayed.any() or torch.equal(new[stayed], old[name][stayed])
    with active.ema_weights():
        pass
    active.check()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_that_was_left_behind_is_refused(optimizer):
    model = conv_net()
    first, second = two_masks(model)
    active = apply_mask(model, first)
    opt = make_optimizer(optimizer, active)
    change_mask(active, second)
    loss_of(model).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="give it to change_mask"):
        opt.step()
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_a_random_mask_can_be_made_of_a_masked_model_and_saliency_cannot():
    model = conv_net()
    first, second = two_masks(model)
    apply_mask(model, first)
    assert BlockMask.random(model, 0.3, "row", seed=2) == second
    with pytest.raises(ValueError, match="use score_blocks"):
        compute_saliency(model, lambda net, batch: net(batch).sum(), [torch.randn(1, 3, 8, 8)])


def test_refused_changes_change_nothing():
    model = conv_net()
    first, second = two_masks(model)
    active = apply_mask(model, first)
    parameters = active.parameters()
    opt = torch.optim.SGD(parameters[:1], lr=0.1)
    with pytest.raises(ValueError, match="are in no optimizer"):
        change_mask(active, second, opt)
    with pytest.raises(ValueError, match="not made for this"):
        change_mask(active, BlockMask.random(Zoo(), 0.3))
    assert active.mask is first and all(a is b for a, b in zip(active.parameters(), parameters, strict=True))


# -- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["abs", "square"])
@pytest.mark.parametrize("block", ["row", (8, 8)])
def test_scores_are_block_sums_of_the_dense_gradient_and_training_goes_on(masked, kind, block):
    model = Zoo()
    dense = copy.deepcopy(model)
    if masked:
        active = apply_mask(model, BlockMask.random(model, 0.2, block))
    batch = zoo_batch()
    with score_blocks(model, None if masked else block, kind) as scores:
        for _ in range(2):
            model(*batch).square().mean().backward()
    for _ in range(2):
        dense.zero_grad()
        dense(*batch).square().mean().backward()
    for name, grid in scores.grids.items():
        grad = dense.get_parameter(name).grad
        expected = 2 * grid.block_sums(grad.abs() if kind == "abs" else grad**2)
        torch.testing.assert_close(scores.sums[name], expected, rtol=1e-3, atol=1e-6)
    if masked:
        active.bind_()
        for name in active.names:
            expected = 2 * dense.get_parameter(name).grad * active.mask.to_dense(name)
            torch.testing.assert_close(active.to_dense(active.grads, name), expected, rtol=1e-3, atol=1e-6)
        trained = {id(p) for p in active.parameters()}
        frozen = [p for p in model.parameters() if id(p) not in trained]
        assert all(p.grad is None and not p.requires_grad for p in frozen)
    else:
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, 2 * dense.get_parameter(name).grad, rtol=1e-3, atol=1e-6)
    assert type(model.upsample) is nn.ConvTranspose2d and (masked or type(model.conv_in) is nn.Conv2d)


def test_scores_choose_the_blocks_that_saliency_would():
    model = conv_net()
    x = torch.randn(4, 3, 8, 8)
    with score_blocks(model, "row") as scores:
        model(x).square().mean().backward()
    saliency = {name: p.grad.abs() for name, p in model.named_parameters()}
    mask = BlockMask.from_block_scores(scores, 0.2)
    assert mask == BlockMask.from_saliency(saliency, 0.2, "row")
    assert mask.mass == pytest.approx(BlockMask.from_saliency(saliency, 0.2, "row").mass, rel=1e-4)
    with pytest.raises(ValueError, match="every block has the same"), score_blocks(model) as nothing:
        BlockMask.from_block_scores(nothing, 0.2)


def test_a_masked_model_is_scored_in_its_own_blocks():
    model = conv_net()
    apply_mask(model, BlockMask.random(model, 0.2, "row"))
    with pytest.raises(ValueError, match="leave it out"), score_blocks(model, (8, 8)):
        pass
    with pytest.raises(ValueError, match="kind: expected"), score_blocks(model, kind="signed_sum"):
        pass


# -- every K steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_refresher_follows_its_density_and_the_best_blocks(optimizer):
    model = conv_net()
    active = apply_mask(model, BlockMask.random(model, 0.4, "row"))
    opt = make_optimizer(optimizer, active)
    refresher = MaskRefresher(active, opt, every=2, density=linear_density(0.4, 0.1, steps=6))
    changed = []
    for _ in range(8):
        opt.zero_grad()
        with refresher.scoring():
            loss_of(model).backward()
        opt.step()
        changed.append(refresher.step())
    assert changed == [False, True] * 4
    assert 0.05 < active.mask.density <= 0.1 and active.mask.density_asked == pytest.approx(0.1)
    assert ActiveParameters.of(model) is active
    active.remove()


def test_the_refresher_says_what_is_missing():
    model = conv_net()
    active = apply_mask(model, BlockMask.random(model, 0.4, "row"))
    opt = MaskedAdamW(active)
    with pytest.raises(ValueError, match="every: expected"):
        MaskRefresher(active, opt, every=0, density=0.1)
    with pytest.raises(ValueError, match="density"):
        MaskRefresher(active, opt, every=1, density=0.0)
    refresher = MaskRefresher(active, opt, every=1, density=0.1)
    with pytest.raises(RuntimeError, match="within scoring"):
        refresher.step()
    mask = active.mask
    with refresher.scoring():
        (loss_of(model) * torch.nan).backward()
    with pytest.raises(NonFiniteError):
        refresher.step()
    assert active.mask is mask
