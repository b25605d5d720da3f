"""masked_adamw_: every backend equals float64 truth within the budget, and the CPU kernel the reference to the bit."""

import pytest
import torch
from adamw import DTYPES, SALIENCY, SETTINGS, Model, assert_same_bits, buffers, clone, gradients, run, truth_of
from budget import assert_within_budget

from pecker_fast import backends
from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops import accumulate_saliency_, masked_adamw_
from pecker_fast.scatter import TILE, ScatterTable, Target

needs_native = pytest.mark.skipif(
    backends()["masked_adamw_"]["cpu"].used != "cpu",
    reason=f"native module: {backends()['masked_adamw_']['cpu'].not_used.get('cpu')}",
)
BACKENDS = ["reference", pytest.param("cpu", marks=needs_native)]
SIZES = [0, 1, 15, 17, 1000, 70_001]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_against_float64(backend, n, settings):
    state = buffers(n, settings)
    grads = [torch.randn(n) for _ in range(3)]
    truth = truth_of(state, grads, settings)
    plain = run(clone(state), grads, settings, "reference")
    got = run(clone(state), grads, settings, backend)
    for name, expected in truth.items():
        if expected is None:
            assert got[name] is None
        else:
            assert_within_budget(got[name], expected, plain[name])


@pytest.mark.parametrize("settings", SETTINGS)
def test_float64_is_exact_by_the_reference(settings):
    state = buffers(100, settings, torch.float64)
    grads = [torch.randn(100, dtype=torch.float64) for _ in range(3)]
    truth, got = truth_of(state, grads, settings), run(clone(state), grads, settings)
    for name, expected in truth.items():
        assert expected is None or torch.allclose(got[name], expected, rtol=1e-12, atol=1e-14), name


@needs_native
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_cpu_kernel_has_the_reference_bits(n, settings):
    state = buffers(n, settings)
    grads = gradients(n)
    assert_same_bits(run(clone(state), grads, settings, "cpu"), run(clone(state), grads, settings, "reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("block", ["row", (4, 3), "element"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_scatter_writes_active_weights_and_nothing_else(backend, dtype, block, layout):
    shapes = [(10, 7, 3, 3), (5, 9, 1, 1), (8, 6, 3, 3)]
    dense = [torch.randn(shape).to(dtype).to(memory_format=layout) for shape in shapes]
    before = [d.clone() for d in dense]
    masks = []
    for shape in shapes:
        grid = BlockGrid.of(shape, block)
        masks.append(ParameterMask(grid, torch.randperm(grid.num_blocks)[: grid.num_blocks // 3].sort().values))
    last = layout == torch.channels_last
    table = ScatterTable([Target(m, d, last) for m, d in zip(masks, dense, strict=True)], torch.device("cpu"))
    n = table.numel
    value = torch.randn(n)
    masked_adamw_(value, torch.randn(n), None, torch.rand(n), step=1, lr=0.1, beta1=0, scatter=table, backend=backend)
    stretches = value.split([mask.numel for mask in masks])
    for d, old, mask, stretch in zip(dense, before, masks, stretches, strict=True):
        assert torch.equal(d.flatten()[mask.index(last)], stretch.to(dtype))
        assert torch.equal(d[~mask.to_dense()], old[~mask.to_dense()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_gradients_stay_visible(backend):
    state = buffers(40, {"beta1": 0.0})
    grad = torch.ones(40)
    grad[7] = torch.nan
    run(state, [grad], {"beta1": 0.0, "clip_value": 1.0}, backend)
    assert state["value"].isnan().nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SALIENCY)
def test_saliency_is_that_of_accumulate_saliency_and_changes_no_step(backend, kind):
    settings = {"beta1": 0.9, "clip_value": 0.5}
    state, grads = buffers(5000, settings), [torch.randn(5000) for _ in range(3)]
    grads[1][:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    alone = run(clone(state), grads, settings, backend)
    total = torch.zeros(5000)
    got = run(clone(state) | {"saliency": total}, grads, settings | {"saliency_kind": kind}, backend)
    for name in ("value", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(got[name], alone[name], rtol=0, atol=0, equal_nan=True)
    expected = torch.zeros(5000)
    for grad in grads:
        accumulate_saliency_(expected, grad, kind)
    torch.testing.assert_close(total, expected, rtol=0, atol=0, equal_nan=True)


def view_table(n, device="cpu"):
    grid = BlockGrid.of((n,), "element")
    return ScatterTable([Target(ParameterMask(grid, torch.arange(n)), None)], torch.device(device))


def test_bad_arguments_change_nothing():
    value, grad, square = torch.ones(8), torch.ones(8), torch.ones(8)
    good = {"step": 1, "lr": 0.1}
    for arguments, extra in (
        ((value, grad[:5], None, square), {"beta1": 0.0}),
        ((value, grad.double(), None, square), {"beta1": 0.0}),
        ((value, torch.ones(16)[::2], None, square), {"beta1": 0.0}),
        ((value, grad, None, square), {"beta1": 0.9}),
        ((value, grad, None, square), {"beta1": 0.0, "step": 0}),
        ((value, grad, None, square), {"beta1": 0.0, "backend": "opencl"}),
        ((value, grad, None, square), {"beta1": 0.0, "saliency": torch.zeros(7)}),
        ((value, grad, None, square), {"beta1": 0.0, "saliency": torch.zeros(8).bfloat16()}),
        ((value, grad, None, square), {"beta1": 0.0, "saliency": torch.zeros(16)[::2]}),
        ((value, grad, None, square), {"beta1": 0.0, "saliency": torch.zeros(8), "saliency_kind": "cube"}),
        ((value, grad, None, square), {"beta1": 0.0, "step": torch.tensor(0.0)}),
        ((value, grad, None, square), {"beta1": 0.0, "step": torch.tensor(1)}),
        ((value, grad, None, square), {"beta1": 0.0, "step": torch.ones(1)}),
        ((value, grad, None, square), {"beta1": 0.0, "step": torch.tensor(1.0, device="meta")}),
        ((value, grad, None, square), {"beta1": 0.0, "lr": torch.tensor(0.1, dtype=torch.float16)}),
        ((value, grad, None, square), {"beta1": 0.0, "lr": torch.tensor([0.1])}),
        ((value, grad, None, square), {"beta1": 0.0, "lr": torch.tensor(0.1, device="meta")}),
        ((value, grad, None, square), {"beta1": 0.0, "scatter": view_table(9)}),
        ((value, grad, None, square), {"beta1": 0.0, "scatter": view_table(8, "meta")}),
    ):
        with pytest.raises(ValueError):
            masked_adamw_(*arguments, **(good | extra))
    with pytest.raises(RuntimeError, match="cuda"):
        masked_adamw_(value, grad, None, square, beta1=0.0, backend="cuda", **good)
    assert torch.equal(value, torch.ones(8)) and torch.equal(square, torch.ones(8))


def test_a_table_with_a_dense_weight_on_another_device_is_refused():
    grid = BlockGrid.of((4, 4), "row")
    target = Target(ParameterMask(grid, torch.arange(2)), torch.zeros(4, 4, device="meta"))
    with pytest.raises(ValueError, match="dense weights must be on the buffer's cpu, got one on meta"):
        ScatterTable([target], torch.device("cpu"))


@pytest.mark.parametrize("values", [torch.zeros(9), torch.zeros(8, device="meta"), torch.zeros(2, 4)])
def test_a_scatter_from_another_buffer_is_refused(values):
    with pytest.raises(ValueError, match=r"values: expected \(8,\) on cpu"):
        view_table(8).scatter_(values)


@pytest.mark.parametrize("block", ["row", (4, 3), "element"])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
def test_the_table_knows_the_run_of_every_tile(block, density):
    table = Model([(50, 64), (300,), (64, 90)], block, density, DTYPES).table
    starts = table.run_flat_offset[:-1]
    first = [*range(0, table.numel, TILE), table.numel - 1] if table.numel else [0]
    assert len(table.tile_run) == len(first) == -(-table.numel // TILE) + 1
    if table.numel:
        assert table.tile_run.tolist() == [int((starts <= element).sum()) - 1 for element in first]
    assert (table.run_flat_offset.diff() > 0).all()  # no run is empty: what the search on a GPU relies on


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_numbers_in_tensors_give_the_same_bits(backend, settings):
    state, grads = buffers(1000, settings), gradients(1000, 20)
    expected = run(clone(state), grads, settings, backend)
    assert_same_bits(run(clone(state), grads, settings, backend, on_device=True), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_number_may_be_in_a_tensor(backend):
    settings = {"beta1": 0.9, "weight_decay": 0.1}
    state, grads = buffers(100, settings), gradients(100, 1)
    expected = run(clone(state), grads, settings, backend, lr=0.25)
    for extra in ({"lr": torch.tensor(0.25)}, {"lr": 0.25, "step": torch.tensor(1.0)}):
        assert_same_bits(run(clone(state), grads, settings, backend, **extra), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("on_device", [False, True])
def test_opcheck(backend, on_device):
    tensors = (torch.tensor(1.0), torch.tensor(0.1)) if on_device else (None, None)
    hyper = (1, 0.1, 0.9, 0.99, 1e-8, 0.0, 1.0, 0.0, "abs")
    state = (torch.randn(9), torch.randn(9), torch.randn(9), torch.rand(9), torch.randn(9), torch.zeros(9))
    arguments = (*state, [], 0, *tensors, *hyper, backend)
    torch.library.opcheck(torch.ops.pecker_fast.masked_adamw_, arguments)


# -- on a GPU ------------------------------------------------------------------------------------

GPU_BACKENDS = ["cuda", "triton"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", *GPU_BACKENDS])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("n", SIZES)
def test_on_a_gpu(backend, settings, n):
    state = buffers(n, settings)
    grads = [torch.randn(n) for _ in range(3)]
    truth = truth_of(state, grads, settings)
    plain = run(clone(state), grads, settings, "reference")
    got = run(clone(state, "cuda"), [grad.cuda() for grad in grads], settings, backend)
    for name, expected in truth.items():
        if expected is not None:
            assert_within_budget(got[name].cpu(), expected, plain[name])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("n", [*SIZES, 1_000_003])
def test_a_gpu_gives_the_bits_of_the_cpu(backend, on_device, settings, n):
    state, grads = buffers(n, settings), gradients(n)
    expected = run(clone(state), grads, settings, "reference")
    got = run(clone(state, "cuda"), [g.cuda() for g in grads], settings, backend, on_device=on_device)
    assert_same_bits(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("block", ["row", (64, 64), "element"])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("dtypes", [*[[dtype] for dtype in DTYPES], DTYPES], ids=str)
def test_the_scatter_on_a_gpu(backend, block, density, dtypes):
    model = Model([(600, 500), (70, 91), (128, 65, 3, 3), (1024,), (300, 700)], block, density, dtypes, "cuda")
    settings, n = {"beta1": 0.0}, model.numel
    state, grads = buffers(n, settings), gradients(n, 1)
    expected = run(clone(state), grads, settings, "reference")
    got = run(clone(state, "cuda"), [grads[0].cuda()], settings, backend, scatter=model.table)
    assert_same_bits(got, expected)
    model.check(got["value"])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_unaligned_buffers_on_a_gpu(backend, shift):
    settings, n = SETTINGS[7], 5000
    state, grads = buffers(n, settings), gradients(n)
    expected = run(clone(state), grads, settings, "reference")
    moved = {name: torch.cat([b[:shift], b]).cuda()[shift:] for name, b in state.items()}
    assert_same_bits(run(moved, [g.cuda() for g in grads], settings, backend), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("on_device", [False, True])
def test_a_step_is_one_launch_and_waits_for_nothing(backend, on_device):
    model = Model([(600, 500), (70, 91), (128, 65, 3, 3)], "row", 0.3, DTYPES, "cuda")
    settings, n = SETTINGS[7], model.numel
    state, grads = clone(buffers(n, settings), "cuda"), [torch.randn(n, device="cuda")]
    numbers = {"step": torch.ones((), device="cuda"), "lr": torch.full((), 0.1, device="cuda")} if on_device else {}
    run(state, grads, settings, backend, scatter=model.table, **numbers)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(state, grads, settings, backend, scatter=model.table, **numbers)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("masked_adamw_kernel" in name for name in kernels) == 1, kernels
    if not on_device:
        assert len(kernels) == 1, kernels
    elif backend == "cuda":
        assert len(kernels) == 2, kernels  # the constants, then the step
