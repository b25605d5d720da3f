"""Accelerate prepares, accumulates, clips, unwraps, saves and loads a masked model as it does a dense one."""

import copy

import pytest
import torch
from models import conv_net
from test_active import assert_same_bits, off_mask

from pecker_fast import ActiveParameters, BlockMask, MaskedAdamW, apply_mask

accelerate = pytest.importorskip("accelerate")

OPTIMIZERS = {
    "MaskedAdamW": lambda active: MaskedAdamW(active, lr=0.01, weight_decay=0.1, ema_decay=0.9),
    "AdamW": lambda active: torch.optim.AdamW(active.parameters(), lr=0.01, weight_decay=0.1),
}
MASK = BlockMask.random(conv_net(), 0.3, "row")
DATA = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh_state():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def prepared(optimizer, mixed_precision="no"):
    torch.manual_seed(0)
    model = conv_net()
    opt = OPTIMIZERS[optimizer](apply_mask(model, MASK))
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    loader = torch.utils.data.DataLoader(DATA, batch_size=4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=8)
    return accelerator, *accelerator.prepare(model, opt, loader, schedule)


def train(accelerator, model, opt, loader, schedule, epochs=1):
    norms = []
    for _ in range(epochs):
        for x in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).float().square().mean())
                if accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.05))
                opt.step()
                schedule.step()
                opt.zero_grad()
    return norms


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_usual_loop_keeps_off_mask_bits_and_moves_the_rest(optimizer, mixed_precision):
    parts = prepared(optimizer, mixed_precision)
    accelerator, model = parts[:2]
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    active = ActiveParameters.of(plain)
    before, start = off_mask(plain, MASK), active.values.clone()
    norms = train(*parts)
    assert len(norms) == 2 and all(norm > 0.05 for norm in norms)  # 4 batches, 2 at a time, and clipping did something
    active.check()
    assert_same_bits(before, off_mask(plain, MASK))
    assert int((active.values != start).sum()) > active.numel // 2
    dense = active.remove()
    assert type(dense[0]) is torch.nn.Conv2d and list(dense.state_dict()) == list(conv_net().state_dict())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_mixed_precision_it_is_the_plain_loop_to_the_bit(optimizer):
    parts = prepared(optimizer)
    train(*parts)
    torch.manual_seed(0)
    model = conv_net()
    active = apply_mask(model, MASK)
    opt = OPTIMIZERS[optimizer](active)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=8)
    for pair in DATA.split(4)[:2], DATA.split(4)[2:]:
        opt.zero_grad()
        for x in pair:
            (model(x).square().mean() / 2).backward()
        torch.nn.utils.clip_grad_norm_(active.parameters(), 0.05)
        opt.step()
        schedule.step()
    assert_same_bits(dict(model.state_dict()), dict(parts[1].state_dict()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("safe_serialization", [True, False])
def test_a_saved_state_continues_to_the_bit(optimizer, safe_serialization, tmp_path):
    parts = prepared(optimizer)
    accelerator, model = parts[:2]
    train(*parts)
    accelerator.save_state(str(tmp_path), safe_serialization=safe_serialization)
    train(*parts)
    expected = copy.deepcopy(dict(model.state_dict()))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    parts = prepared(optimizer)
    accelerator, model = parts[:2]
    with torch.no_grad():
        ActiveParameters.of(model).values.fill_(7.0)
    accelerator.load_state(str(tmp_path))
    ActiveParameters.of(model).check()
    train(*parts)
    assert_same_bits(expected, dict(model.state_dict()))


def test_a_saved_model_loads_strictly_into_a_plain_one(tmp_path):
    accelerator, model, *_ = parts = prepared("AdamW")
    train(*parts)
    accelerator.save_model(model, str(tmp_path))
    plain = conv_net()
    accelerate.load_checkpoint_in_model(plain, str(tmp_path), strict=True)
    assert_same_bits(dict(model.state_dict()), dict(plain.state_dict()))
