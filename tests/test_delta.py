"""Delta: bit-exact both ways, whatever the mask and layout; what does not fit is refused and leaves every bit."""

import copy
import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Zoo, loss_of, masked_net, zoo_batch
from torch import nn

from pecker_fast import ActiveParameters, BlockMask, Delta, MaskedAdamW, apply_mask, models
from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.delta import Ledger
from pecker_fast.delta import state as delta_state
from pecker_fast.delta.fingerprint import fingerprint, fingerprint_all, fingerprint_blocks, flat_bits

BLOCKS = ["row", "element", (3, 5)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bits(model):
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return {name: flat_bits(tensor).clone() for name, tensor in state.items()}


def same(a, b):
    a, b = (m if isinstance(m, dict) and all(t.dim() == 1 for t in m.values()) else bits(m) for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def moved(model, mask, seed=1, special=(torch.nan, -torch.inf, -0.0)):
    """A copy with every active weight changed; some become ``special``."""
    model, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in mask.parameters.items():
            weight = model.get_parameter(name)
            new = torch.randn(parameter.numel, generator=rng).to(weight.dtype)
            new[: len(special)] = torch.tensor(special)[: len(new)].to(weight.dtype)
            weight[mask.to_dense(name)] = new
    return model


def halves(model, block="row"):
    """Two masks with no block in common."""
    a, b = {}, {}
    for name, parameter in BlockMask.random(model, 1.0, block).parameters.items():
        order = torch.randperm(parameter.grid.num_blocks)
        cut = len(order) // 2
        a[name], b[name] = (ParameterMask(parameter.grid, part.sort().values) for part in (order[:cut], order[cut:]))
    total = sum(p.numel() for p in model.parameters())
    return BlockMask(a, total, 0.5), BlockMask(b, total, 0.5)


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_apply_gives_after_and_revert_gives_before(dtype, block, memory_format):
    base = Zoo().to(dtype)
    mask = BlockMask.random(base, 0.3, block)
    after = moved(base, mask).to(memory_format=memory_format)
    delta = Delta.extract(base, after, mask)
    model = copy.deepcopy(base).to(memory_format=memory_format)
    assert not same(model, after)
    delta.apply(model)
    assert same(model, after)
    delta.revert(model)
    assert same(model, base)
    delta.revert(after)
    assert same(after, base)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    block=st.sampled_from(["row", "element", "auto", (2, 3), (64, 64)]),
    dtype=st.sampled_from(DTYPES),
    share=st.floats(0, 1),
    order=st.permutations(range(4)),
    seed=st.integers(0, 99),
)
def test_any_shape_mask_dtype_and_layout(shape, block, dtype, share, order, seed):
    rng = torch.Generator().manual_seed(seed)
    grid = BlockGrid.of(shape, block)
    active = torch.randperm(grid.num_blocks, generator=rng)[: round(share * grid.num_blocks)].sort().values
    mask = BlockMask({"w": ParameterMask(grid, active)}, grid.numel + 1, share)
    axes = [axis for axis in order if axis < len(shape)]
    before = torch.randn([shape[axis] for axis in axes], generator=rng).to(dtype)
    before = before.permute([axes.index(axis) for axis in range(len(shape))])  # strides of any order
    after = before.clone()
    after[mask.to_dense("w")] = torch.randn(mask.numel, generator=rng).to(dtype)
    state = {"w": before.clone(memory_format=torch.preserve_format), "count": torch.tensor(7)}
    delta = Delta.extract({**state, "w": before}, {**state, "w": after}, mask)
    ledger = Ledger()
    delta.apply(state, ledger=ledger)
    assert torch.equal(state["w"], after) and len(ledger) == 1
    delta.revert(state, ledger=ledger)
    assert torch.equal(state["w"], before) and len(ledger) == 0


def test_a_strided_view_of_a_larger_tensor_is_changed_in_place():
    whole = torch.randn(8, 20)
    state = {"w": whole[:, ::2]}
    mask = BlockMask({"w": ParameterMask(BlockGrid.of((8, 10), (3, 4)), torch.tensor([1, 4]))}, 80, 0.3)
    after = {"w": state["w"].clone()}
    after["w"][mask.to_dense("w")] += 1
    untouched = whole[:, 1::2].clone()
    Delta.extract(state, after, mask).apply(state)
    assert torch.equal(whole[:, ::2], after["w"]) and torch.equal(whole[:, 1::2], untouched)


@pytest.mark.parametrize("block", BLOCKS)
def test_of_masked_training_with_the_model_masked_still(block):
    model, active = masked_net(0.3, block)
    base = copy.deepcopy(model)
    ActiveParameters.of(base).remove()
    optimizer = MaskedAdamW(active, lr=0.1)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
    delta = Delta.extract(base, model, active.mask, name="trained")
    assert delta.mask.numel == active.mask.numel
    dense = active.remove()
    copy_ = copy.deepcopy(dense)
    delta.revert(copy_)
    assert same(copy_, base) and not same(dense, base)
    delta.apply(base)
    assert same(base, dense)


def test_autograd_sees_the_change():
    layer = nn.Linear(4, 4)
    mask = BlockMask.random(layer, 0.5, "row")
    delta = Delta.extract(layer, moved(layer, mask), mask)
    loss = layer(torch.ones(1, 4, requires_grad=True)).square().sum()
    delta.apply(layer)
    assert layer.weight.requires_grad and layer.weight.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_forward_of_the_model_is_that_of_after():
    base = Zoo().eval()  # in training the batch norm's statistics, which are no weights, would move
    after = copy.deepcopy(base)
    active = apply_mask(after, BlockMask.random(base, 0.3, "row"))
    x, c = zoo_batch()
    after(x, c).square().mean().backward()
    torch.optim.SGD(active.parameters(), lr=0.1).step()
    delta = Delta.extract(base, after, active.mask)
    assert not torch.equal(base(x, c), after(x, c))
    delta.apply(base)
    assert torch.equal(base(x, c), after(x, c))


def test_a_delta_that_changes_nothing_is_applied_and_reverted_once():
    base = nn.Linear(3, 3)
    delta = Delta.extract(base, copy.deepcopy(base), BlockMask.random(base, 0.5))
    with pytest.raises(ValueError, match="is not applied"):
        delta.revert(base)
    delta.apply(base)
    with pytest.raises(ValueError, match="is applied already"):
        delta.apply(base)
    delta.revert(base)


# -- fingerprints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool, torch.uint8])
def test_fingerprints_are_those_of_the_published_mix(dtype):
    """splitmix64 in Python's integers, word by word."""
    tensor = (torch.randn(5, 3) * 3).to(dtype)
    name = f"w\0{str(dtype).removeprefix('torch.')} (5, 3)"
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    data, width = bytes(tensor.flatten().view(torch.uint8).tolist()), min(4, tensor.element_size())
    total, limit = 0, 2**64
    for position in range(len(data) // width):
        x = key ^ (position << 32) ^ int.from_bytes(data[width * position : width * (position + 1)], "little")
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % limit
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % limit
        total += x ^ (x >> 31)
    assert fingerprint("w", tensor) == total % limit


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fingerprints_add_up(block, dtype):
    model = Zoo().to(dtype)
    state = model.state_dict()
    a, b = halves(model, block)
    unmaskable = {name: tensor for name, tensor in state.items() if name not in a.parameters}
    parts = [fingerprint_blocks(state, mask.parameters) for mask in (a, b)]
    assert (sum(parts) + fingerprint_all(unmaskable)) % 2**64 == fingerprint_all(state)


def test_fingerprints_see_values_positions_names_shapes_dtypes_and_long_weights():
    weight = torch.randn(3 * (1 << 16) + 5)  # some chunks and a ragged one
    swapped = weight.clone()
    swapped[[0, -1]] = weight[[-1, 0]]
    others = [
        ("w", weight.clone().index_fill_(0, torch.tensor([1 << 16]), 0.5)),
        ("w", swapped),
        ("v", weight),
        ("w", weight[None]),
        ("w", weight.view(torch.int32)),
    ]
    seen = {fingerprint("w", weight), *(fingerprint(*other) for other in others)}
    assert len(seen) == 1 + len(others)
    assert fingerprint("w", weight.clone()) in seen


# -- several ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
def test_disjoint_deltas_stack_and_come_off_in_any_order(block):
    base = Zoo()
    a, b = halves(base, block)
    first = Delta.extract(base, moved(base, a), a, name="first")
    second = Delta.extract(base, moved(base, b, 2), b, name="second")
    assert first.overlaps(second) == []
    one, other = copy.deepcopy(base), copy.deepcopy(base)
    first.apply(one)
    second.apply(one)
    second.apply(other)
    first.apply(other)
    assert same(one, other) and not same(one, base)
    for model, order in ((one, (first, second)), (other, (first, second))):
        for delta in order:
            delta.revert(model)
        assert same(model, base) and len(Ledger.of(model)) == 0


def test_a_delta_trained_on_top_of_another_fits_the_base_without_it():
    base = Zoo()
    a, b = halves(base)
    first = Delta.extract(base, moved(base, a), a, name="first")
    edited = copy.deepcopy(base)
    first.apply(edited)
    after = moved(edited, b)
    second = Delta.extract(edited, after, b, name="second")
    assert [record.name for record in Ledger.of(after)] == ["first", "second"]
    second.apply(base)
    first.apply(base)
    assert same(base, after)
    first.revert(after)  # from below
    second.revert(after)
    second.revert(base)
    first.revert(base)
    assert same(after, base)


def test_extract_notes_the_delta_on_what_it_was_trained_into():
    base = Zoo()
    a, b = halves(base)
    middle = moved(base, a)
    first = Delta.extract(base, middle, a, name="first")
    second = Delta.extract(middle, moved(middle, b), b, name="second")
    second.apply(base)  # the first was recognised and left out
    first.apply(base)


def test_records_follow_copies_and_do_not_count_once_other_weights_are_loaded():
    base = Zoo()
    a, b = halves(base)
    first, second = (Delta.extract(base, moved(base, mask), mask, name=str(mask is a)) for mask in (a, b))
    model = copy.deepcopy(base)
    first.apply(model)
    twin = copy.deepcopy(model)
    first.revert(model)
    second.apply(twin)  # which still knows of the first
    twin.load_state_dict(base.state_dict())  # both are gone, unnoticed
    second.apply(twin)
    first.apply(twin)
    assert len(Ledger.of(twin)) == 2


def test_overlapping_deltas_of_one_base_are_refused_by_name():
    base = Zoo()
    a, b = BlockMask.random(base, 0.5, "row", seed=0), BlockMask.random(base, 0.5, "element", seed=1)
    first, second = Delta.extract(base, moved(base, a), a, name="one"), Delta.extract(base, moved(base, b), b, name="2")
    names = first.overlaps(second)
    assert names and names == second.overlaps(first)
    both = {n for n in a.parameters if (a.to_dense(n) & b.to_dense(n)).any()}
    assert set(names) == both
    first.apply(base)
    before = bits(base)
    with pytest.raises(ValueError, match="delta '2' and delta 'one', which the model carries, change the same blocks"):
        second.apply(base)
    assert same(base, before)


def test_a_delta_on_top_of_an_overlapping_one_comes_off_first():
    base = Zoo()
    a, b = BlockMask.random(base, 0.5, "row", seed=0), BlockMask.random(base, 0.5, "row", seed=1)
    first = Delta.extract(base, moved(base, a), a, name="below")
    model = copy.deepcopy(base)
    first.apply(model)
    after = moved(model, b, 2)
    second = Delta.extract(model, after, b, name="above")
    second.apply(model)
    assert same(model, after)
    with pytest.raises(ValueError, match="'below' and delta 'above', which the model carries"):
        first.revert(model)
    second.revert(model)
    first.revert(model)
    assert same(model, base)
    with pytest.raises(ValueError, match="'above'"):
        second.apply(base)  # without what it stands on


def test_model_folders_remember_their_deltas(tmp_path):
    small = {"width": 4, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": ()}
    base = models.DDPMUNet(**small, image_size=8, channels=1, norm_groups=2)
    a, b = halves(base)
    first, second = (Delta.extract(base, moved(base, mask, special=(-0.0,)), mask) for mask in (a, b))
    model = copy.deepcopy(base)
    first.apply(model)
    models.save(model, tmp_path / "m")
    loaded = models.load(tmp_path / "m")
    second.apply(loaded)
    first.revert(loaded)
    plain = models.load(tmp_path / "m")
    plain.__dict__.pop("_pecker_deltas")
    with pytest.raises(ValueError, match="weights outside its blocks differ"):
        second.apply(plain)  # the control: without the record it is an unknown base
    Ledger.load(tmp_path / "m").attach(plain)
    second.apply(plain)


# -- what is refused -------------------------------------------------------------------------------


def _changed(model, name, index=0):
    model = copy.deepcopy(model)
    model.state_dict()[name].view(-1)[index] = 7
    return model


def test_extract_refuses_what_a_delta_cannot_hold():
    base = Zoo()
    mask = BlockMask.random(base, 0.3, "row")
    after = moved(base, mask)
    frozen = next(n for n, p in mask.parameters.items() if not p.numel)
    cases = [
        (base, _changed(after, frozen), mask, f"{frozen}: 1 elements outside the mask"),
        (base, _changed(after, "upsample.bias"), mask, "upsample.bias: 1 elements outside"),
        (base, _changed(after, "batch_norm.running_mean"), mask, "batch_norm.running_mean: 1 elements.*buffer"),
        (base, _changed(after, "batch_norm.num_batches_tracked"), mask, "num_batches_tracked"),
        (base, copy.deepcopy(after).half(), mask, "is float16"),
        (base, nn.Linear(3, 3), mask, "are missing"),
        (base, after, BlockMask.random(nn.Linear(3, 3), 0.5), "the mask is for weight"),
        (base, {**after.state_dict(), "classes.weight": torch.zeros(8, 24)}, mask, r"\(8, 24\), expected float32 \(7"),
        (base, {**after.state_dict(), "extra": 3}, mask, "extra: expected a tensor, got int"),
        (copy.deepcopy(base).to("meta"), after, mask, "on the meta device"),
        (base.state_dict() | {"extra": torch.zeros(2).to_sparse()}, after, mask, "torch.sparse_coo"),
    ]
    for before, other, given_mask, message in cases:
        with pytest.raises(ValueError, match=message):
            Delta.extract(before, other, given_mask)
    off = copy.deepcopy(base)
    name = next(n for n, p in mask.parameters.items() if p.numel and not p.is_full)
    outside = int((~mask.to_dense(name)).flatten().nonzero()[0])
    with pytest.raises(ValueError, match=f"{name}: 1 elements outside"):
        Delta.extract(base, _changed(off, name, outside), mask)
    for metadata in ({"x": torch.zeros(1)}, {"x": float("nan")}):
        with pytest.raises(ValueError, match="metadata: expected values that JSON holds"):
            Delta.extract(base, after, mask, metadata=metadata)
    with pytest.raises(ValueError, match="Zoo has its own"):
        Delta.extract(base, after, mask, ledger=Ledger())


def test_integers_are_not_weights():
    state = {"w": torch.arange(6).view(2, 3)}
    mask = BlockMask({"w": ParameterMask.full(BlockGrid.of((2, 3), "row"))}, 6, 1.0)
    with pytest.raises(ValueError, match="w is int64; a delta holds weights in float32"):
        Delta.extract(state, {"w": state["w"] + 1}, mask)


def _masked(model):
    apply_mask(model, BlockMask.random(model, 0.2))
    return model


def _tied(model):
    model.hidden.weight = nn.Parameter(model.hidden.weight.detach())
    model.register_parameter("hidden_too", model.hidden.weight)
    return model


WRONG = {
    "another base": (lambda m: _changed(m, "upsample.bias"), "weights outside its blocks differ"),
    "a buffer": (lambda m: _changed(m, "batch_norm.running_var"), "weights outside its blocks differ"),
    "the touched blocks": (lambda m: _changed(m, "hidden.weight"), "hold neither what they had before nor"),
    "another dtype": (lambda m: m.to(torch.bfloat16), "is bfloat16"),
    "another network": (lambda m: nn.Linear(3, 3), "missing"),
    "masked": (_masked, r"Zoo is masked; call active.remove\(\)"),
    "inside": (lambda m: _masked(nn.Sequential(m)), "missing|masked"),
    "on meta": (lambda m: m.to("meta"), "on the meta device"),
    "a weight more": (_tied, "unexpected"),
    "less": (lambda m: {n: t for n, t in m.state_dict().items() if n != "norm.bias"}, "1 weights are missing.*norm.b"),
    "reshaped": (lambda m: m.state_dict() | {"norm.bias": torch.zeros(4, 5)}, r"norm.bias is float32 \(4, 5\)"),
    "expanded": (
        lambda m: m.state_dict() | {"hidden.weight": m.hidden.weight.detach()[:1].expand(36, 24)},
        "hidden.weight shares memory",
    ),
    "shared": (
        lambda m: m.state_dict() | {"norm.bias": m.norm.weight.detach(), "norm.weight": m.norm.weight.detach()},
        "shares memory",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("action", ["apply", "revert"])
def test_what_does_not_fit_is_refused_and_unchanged(kind, action):
    make, message = WRONG[kind]
    base = Zoo()
    rows = {n: ParameterMask(p.grid, p.active[:1]) for n, p in BlockMask.dense(base).parameters.items()}
    mask = BlockMask(rows, 1000, 0.1)
    after = moved(base, mask)
    delta = Delta.extract(base, after, mask)
    model = make(copy.deepcopy(base if action == "apply" else after))
    readable = kind != "on meta"
    before = bits(model) if readable else None
    with pytest.raises(ValueError, match=message):
        getattr(delta, action)(model)
    assert not readable or same(model, before)


def test_twice_and_not_at_all():
    base = Zoo()
    mask = BlockMask.random(base, 0.3)
    delta = Delta.extract(base, moved(base, mask), mask, name="three")
    with pytest.raises(ValueError, match="delta 'three' is not applied to this model"):
        delta.revert(base)
    delta.apply(base)
    before = bits(base)
    with pytest.raises(ValueError, match="delta 'three' is applied already"):
        delta.apply(base)
    assert same(base, before)


def test_inference_tensors_are_refused_outside_inference_mode():
    base = nn.Linear(4, 4)
    mask = BlockMask.random(base, 0.5)
    delta = Delta.extract(base, moved(base, mask), mask)
    with torch.inference_mode():
        state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ValueError, match="inference mode"):
        delta.apply(state)
    with torch.inference_mode():
        delta.apply(state)


def test_a_write_that_fails_half_way_is_undone(monkeypatch):
    base = Zoo()
    mask = BlockMask.random(base, 0.5)
    delta = Delta.extract(base, moved(base, mask), mask)
    before, written, write = bits(base), [], delta_state._xor_weight

    def fail_late(*arguments):
        if len(written) == 4:
            written.append(None)
            raise MemoryError
        written.append(write(*arguments))

    monkeypatch.setattr(delta_state, "_xor_weight", fail_late)
    with pytest.raises(MemoryError):
        delta.apply(base)
    assert len(written) == 4 + 1 + 4
    assert same(base, before) and len(Ledger.of(base)) == 0


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_numbers_that_were_tampered_with_are_refused(action):
    base = Zoo()
    mask = BlockMask.random(base, 0.3)
    after = moved(base, mask)
    delta = Delta.extract(base, after, mask, name="three")
    delta.payload[list(delta.payload)[-1]][-1] ^= 1
    model = base if action == "apply" else after
    before = bits(model)
    with pytest.raises(ValueError, match="'three' are not those it was made with"):
        getattr(delta, action)(model)
    assert same(model, before)


# -- what it says ----------------------------------------------------------------------------------


def test_info_and_repr():
    base = Zoo()
    mask = BlockMask.random(base, 0.3, "row")
    delta = Delta.extract(base, moved(base, mask), mask, name="three", metadata={"classes": (3,)})
    info = json.loads(json.dumps(delta.info(), allow_nan=False))
    assert info["density"] == mask.density and info["weights"] == mask.numel and info["model_weights"] == mask.total
    assert info["bytes"] == 4 * mask.numel and info["name"] == "three"
    assert info["layers"] == {n: p.numel for n, p in mask.parameters.items() if p.numel}
    assert set(info["hashes"]) == {"before", "after", "rest"} and info["metadata"] == {"classes": [3]}
    assert info["versions"]["torch"] == torch.__version__
    assert repr(delta).startswith(f"Delta('three': {mask.numel:,} of {mask.total:,} weights")


@pytest.mark.gpu
def test_on_a_gpu():
    base = Zoo()
    mask = BlockMask.random(base, 0.3)
    after = moved(base, mask)
    delta = Delta.extract(base, copy.deepcopy(after).cuda(), mask)
    model = copy.deepcopy(base).cuda()
    delta.apply(model)
    assert same({n: t.cpu() for n, t in model.state_dict().items()}, after)
    delta.revert(model)
    assert same({n: t.cpu() for n, t in model.state_dict().items()}, base)
