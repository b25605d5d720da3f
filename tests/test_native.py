"""The native CPU kernels, called as the ops call them: by address."""

import math

import pytest
import torch

from pecker_fast import native
from pecker_fast.ops import OPS, triton_kernels

pytestmark = pytest.mark.skipif(not native.available(), reason=str(native.why_not()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]  # in the order of csrc/dtype.h
HYPER = {"step": 3, "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
TABLE = ("dense_pointers", "dense_dtypes", "run_parameter", "run_dense_offset", "run_flat_offset")
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 6e-8, 2.9e-8, 65504.0, 65520.0, 3.4e38, 1 + 2**-9]


@pytest.fixture(autouse=True)
def restore_isa():
    yield
    native.load().use_isa(None)


def supported_isas() -> list[str]:
    module, supported = native.load(), []
    for isa in module.build_info()["isa_compiled"]:
        try:
            module.use_isa(isa)
        except ValueError:
            continue
        supported.append(isa)
    module.use_isa(None)
    return supported


def make_buffers(
    numel: int, *, exp_avg: bool = True, ema: bool = True, saliency: bool = True
) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(numel)
    value, grad, first, second, average, total = torch.randn(6, numel, generator=generator).unbind()
    grad[::97] = math.nan
    return {
        "value": value.clone(),
        "grad": grad.clone(),
        "exp_avg": first.clone() if exp_avg else None,
        "exp_avg_sq": second.square(),
        "ema": average.clone() if ema else None,
        "saliency": total.clone() if saliency else None,
    }


class Table:
    """A scatter table of runs (parameter, dense offset, length), and the dense tensors it writes to."""

    def __init__(self, dense: list[torch.Tensor | None], runs: torch.Tensor) -> None:
        self.dense, self.num_runs = dense, len(runs)
        codes = [0 if d is None else DTYPES.index(d.dtype) for d in dense]
        self.arrays = {
            "dense_pointers": torch.tensor([0 if d is None else d.data_ptr() for d in dense]),
            "dense_dtypes": torch.tensor(codes, dtype=torch.int32),
            "run_parameter": runs[:, 0].int(),
            "run_dense_offset": runs[:, 1].contiguous(),
            "run_flat_offset": torch.cat([torch.zeros(1, dtype=torch.int64), runs[:, 2].cumsum(0)]),
        }

    def arguments(self) -> dict[str, int]:
        sizes = {"num_parameters": len(self.dense), "num_runs": self.num_runs}
        return {**{name: array.data_ptr() for name, array in self.arrays.items()}, **sizes}

    def expected(self, value: torch.Tensor) -> list[torch.Tensor | None]:
        begins = self.arrays["run_flat_offset"]
        run = torch.arange(self.num_runs).repeat_interleave(begins.diff())
        target = self.arrays["run_dense_offset"][run] + torch.arange(len(run)) - begins[run]
        dense = [None if d is None else d.clone() for d in self.dense]
        for parameter, weight in enumerate(dense):
            if weight is not None:
                chosen = self.arrays["run_parameter"][run] == parameter
                weight[target[chosen]] = value[chosen].to(weight.dtype)
        return dense


def make_table(numel: int, dtype: torch.dtype, lengths: tuple[int, ...]) -> Table:
    """Runs of the given lengths in turn, one weight apart, in a dense tensor, a view and a dense tensor."""
    generator = torch.Generator().manual_seed(1)
    dense = [torch.randn(2 * numel + 9, generator=generator).to(d) for d in (dtype, torch.float32)]
    length = torch.tensor(lengths).repeat(numel // sum(lengths) + 1)
    begin = length.cumsum(0) - length
    begin = begin[begin < numel]
    length = torch.minimum(length[: len(begin)], numel - begin)
    offset = 3 + begin + torch.arange(len(begin))
    return Table([dense[0], None, dense[1]], torch.stack([3 * begin // max(numel, 1), offset, length], dim=1))


EMPTY_TABLE = Table([], torch.zeros(0, 3, dtype=torch.int64))


def step(buffers: dict[str, torch.Tensor | None], table: Table | None = None, **arguments: float) -> None:
    addresses = {name: 0 if buffer is None else buffer.data_ptr() for name, buffer in buffers.items()}
    native.load().masked_adamw_cpu(
        **addresses,
        numel=buffers["value"].numel(),
        **(HYPER | {"clip_value": 0.5, "ema_decay": 0.99, "threads": 1} | arguments),
        **(table.arguments() if table else {}),
    )


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("exp_avg, ema", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("saliency_kind", [None, 0, 1, 2])
@pytest.mark.parametrize("numel", [0, 1, 15, 2049, 300_007])
def test_every_isa_and_thread_count_gives_the_same_bits(numel, exp_avg, ema, saliency_kind):
    beta1 = 0.9 if exp_avg else 0.0
    results = []
    for isa in supported_isas():
        for threads in (1, 2, 3):
            native.load().use_isa(isa)
            buffers = make_buffers(numel, exp_avg=exp_avg, ema=ema, saliency=saliency_kind is not None)
            table = make_table(numel, torch.bfloat16, (1, 1, 500, 7))
            step(buffers, table, beta1=beta1, threads=threads, saliency_kind=saliency_kind or 0)
            results.append([*buffers.values(), *table.dense])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_step_is_the_formula():
    b, hyper = make_buffers(1000), HYPER
    expected = {name: buffer.double() for name, buffer in b.items()}
    expected["saliency"] += expected["grad"].abs()
    g = expected["grad"].clamp(-0.5, 0.5)
    expected["exp_avg"].lerp_(g, 1 - hyper["beta1"])
    expected["exp_avg_sq"].lerp_(g.square(), 1 - hyper["beta2"])
    denominator = (expected["exp_avg_sq"] / (1 - hyper["beta2"] ** 3)).sqrt() + hyper["eps"]
    update = expected["exp_avg"] / (1 - hyper["beta1"] ** 3) / denominator
    expected["value"] += -hyper["lr"] * hyper["weight_decay"] * expected["value"] - hyper["lr"] * update
    expected["ema"].lerp_(expected["value"], 1 - 0.99)
    step(b, saliency_kind=1)
    for name, buffer in b.items():
        torch.testing.assert_close(buffer.double(), expected[name], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1,), (3, 1, 5000, 2), (2048,)], ids=["elements", "ragged", "chunks"])
def test_scatter_equals_torch_conversion_and_leaves_the_rest(dtype, lengths):
    numel = 140_001
    generator = torch.Generator().manual_seed(2)
    bits = torch.randint(-(2**31), 2**31, (numel,), generator=generator, dtype=torch.int64)
    value = bits.to(torch.int32).view(torch.float32)  # all kinds of floats: denormals, NaN, overflow
    value[: len(SPECIAL)] = torch.tensor(SPECIAL)
    value[1000:90_000] = torch.randn(89_000, generator=generator) * 1e-5  # half's denormals
    for isa in supported_isas():
        native.load().use_isa(isa)
        table = make_table(numel, dtype, lengths)
        expected = table.expected(value)
        native.load().scatter_cpu(value=value.data_ptr(), numel=numel, **table.arguments(), threads=2)
        for dense, want in zip(table.dense, expected, strict=True):
            if dense is None:
                continue
            torch.testing.assert_close(dense, want, rtol=0, atol=0, equal_nan=True)
            assert same_bits(dense[~want.isnan()], want[~want.isnan()])  # the sign of zero too


def test_step_scatters_what_it_computed():
    buffers, table = make_buffers(5000), make_table(5000, torch.float16, (1, 40, 3))
    before = make_table(5000, torch.float16, (1, 40, 3))
    step(buffers, table)
    for dense, want in zip(table.dense, before.expected(buffers["value"]), strict=True):
        assert dense is None or torch.equal(dense.nan_to_num(), want.nan_to_num())


def test_without_runs_nothing_is_scattered():
    buffers, others = make_buffers(100), make_buffers(100)
    step(buffers, EMPTY_TABLE)
    step(others)
    assert all(same_bits(a, b) for a, b in zip(buffers.values(), others.values(), strict=True))
    address = buffers["value"].data_ptr()
    native.load().scatter_cpu(value=address, numel=100, **EMPTY_TABLE.arguments(), threads=1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"numel": -1}, "numel >= 0"),
        ({"step": 0}, "step >= 1"),
        ({"threads": 0}, "threads >= 1"),
        ({"num_runs": -1}, "num_runs >= 0"),
        ({"num_runs": 1}, "five arrays"),
        ({"exp_avg": 0}, "exp_avg when beta1 is not 0"),
        ({"grad": 0}, "addresses of value, grad"),
        ({"saliency_kind": 3}, "a saliency kind of 0"),
    ],
)
def test_unsafe_arguments_raise(arguments, message):
    addresses = {name: buffer.data_ptr() for name, buffer in make_buffers(4).items()}
    with pytest.raises(ValueError, match=message):
        native.load().masked_adamw_cpu(**({**addresses, "numel": 4, "threads": 1} | HYPER | arguments))


def accumulate(total: torch.Tensor, grad: torch.Tensor, /, **arguments: object) -> None:
    good = {"total": total.data_ptr(), "total_is_double": total.dtype == torch.float64, "grad": grad.data_ptr()}
    good |= {"grad_dtype": DTYPES.index(grad.dtype), "kind": 1, "threads": 1}
    blocks = "view" in arguments
    good |= {"view": [1, 1, 1, 4], "block": [1, 1]} if blocks else {"numel": grad.numel()}
    function = "accumulate_block_saliency_cpu" if blocks else "accumulate_saliency_cpu"
    getattr(native.load(), function)(**(good | arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"view": [90, 1, 210, 9], "block": [1, 210]}, {"view": [90, 9, 210, 1], "block": [7, 64]}],
    ids=["elements", "rows", "tiles"],
)
def test_saliency_is_the_same_for_every_isa(dtype, wide, arguments):
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(90 * 9 * 210, generator=generator).to(dtype)
    start = torch.randn(grad.shape, generator=generator, dtype=wide)  # for blocks more than is written
    for kind in range(3):
        results = []
        for isa in supported_isas():
            native.load().use_isa(isa)
            results.append(start.clone())
            accumulate(results[-1], grad, kind=kind, **arguments)
        assert not torch.equal(results[0], start)
        assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    "arguments",
    [{}, {"view": [1500, 1, 500, 9], "block": [1, 500]}, {"view": [1500, 9, 500, 1], "block": [7, 64]}],
    ids=["elements", "rows", "tiles"],
)
def test_saliency_is_the_same_for_every_thread_count(arguments):
    grad = torch.randn(1500 * 500 * 9, generator=torch.Generator().manual_seed(4))
    results = [torch.zeros_like(grad) for _ in range(3)]
    for threads, total in enumerate(results, 1):
        accumulate(total, grad, threads=threads, **arguments)
    assert results[0].any() and all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"threads": 0}, "threads >= 1"),
        ({"numel": -1}, "numel >= 0"),
        ({"grad": 0}, "addresses of total and grad"),
        ({"total": 0}, "addresses of total and grad"),
        ({"grad_dtype": 4}, "grad_dtype of 0"),
        ({"kind": 3}, "a saliency kind of 0"),
        ({"kind": -1}, "a saliency kind of 0"),
        ({"view": [1, 1, -1, 4]}, "extents of the view >= 0"),
        ({"view": [1, 1, 1, 4], "block": [1, 0]}, "extents of the block >= 1"),
        ({"view": [1, 1, 1, 4], "grad": 0}, "address of grad"),
        ({"view": [1, 1, 1, 4], "total": 0}, "address of total"),
        ({"view": [1, 1, 1, 4], "threads": 0}, "threads >= 1"),
        ({"view": [1, 1, 1, 4], "kind": 3}, "kind of 0"),
    ],
)
def test_unsafe_accumulations_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        accumulate(torch.zeros(4), torch.zeros(4), **arguments)


def select(values: torch.Tensor, k: int, **arguments: object) -> tuple[float, int]:
    good = {"addresses": [values.data_ptr()], "numels": [len(values)], "is_double": values.dtype == torch.float64}
    return native.load().select_threshold_cpu(**(good | {"k": k, "threads": 1} | arguments))


@pytest.mark.parametrize("numel", [1, 63, 65, 140_001, 300_007, 1_600_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selection_is_the_same_for_every_isa_and_thread_count(numel, dtype):
    generator = torch.Generator().manual_seed(numel)
    bits = torch.randint(-(2**62), 2**62, (numel,), generator=generator)
    bits = bits << 1 if dtype == torch.float64 else bits.to(torch.int32)
    values = bits.view(dtype)  # all kinds of floats: NaN, infinity, denormals
    values[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=dtype)[:numel]
    values[numel // 2 :] = values[numel // 2]  # and one of them very often
    ordered = values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).sort(descending=True).values
    for isa in supported_isas():
        native.load().use_isa(isa)
        for threads in (1, 2, 3):
            for k in {1, numel // 7 + 1, numel // 2 + 1, numel}:
                threshold, ties = select(values, k, threads=threads)
                assert threshold == float(ordered[k - 1])
                assert ties == k - int((ordered > threshold).sum())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"k": 0}, "k from 1"),
        ({"k": 5}, "k from 1"),
        ({"threads": 0}, "threads >= 1"),
        ({"numels": [-4]}, "numels >= 0"),
        ({"numels": [2, 2]}, "as many numels"),
        ({"addresses": [0]}, "address of every array"),
        ({"addresses": [1, 1], "numels": [2**62, 2**62]}, "fewer values"),
    ],
)
def test_unsafe_selections_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        select(torch.zeros(4), **({"k": 1} | arguments))


def test_wrong_tables_raise():
    value, table = torch.zeros(4), make_table(4, torch.float32, (4,))
    with pytest.raises(ValueError, match="end at numel"):
        native.load().scatter_cpu(value=value.data_ptr(), numel=3, **table.arguments(), threads=1)
    table.arrays["dense_dtypes"][1] = 4
    with pytest.raises(ValueError, match="dense_dtypes of 0"):
        native.load().scatter_cpu(value=value.data_ptr(), numel=4, **table.arguments(), threads=1)


def test_build_info_and_isa_choice():
    module = native.load()
    info = module.build_info()
    assert set(info) == {"version", "compiler", "cuda", "cuda_architectures", "isa_compiled", "isa_selected"}
    assert info["isa_selected"] == supported_isas()[0]
    module.use_isa("scalar")
    assert module.build_info()["isa_selected"] == "scalar"
    with pytest.raises(ValueError, match="expected one of .*scalar"):
        module.use_isa("sse9")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"threads": 0}, "threads >= 1"),
        ({"element_size": 3}, "element_size of 2, 4 or 8"),
        ({"grad_shape": (1, -1, 4, 5)}, "grad_shape >= 0"),
        ({"kernel": (0, 3)}, "kernel >= 1"),
        ({"size": (5, 4)}, r"grad_shape \+ 2 around"),
        ({"grad": 0}, "addresses of grad"),
        ({"rows": torch.tensor([0, 5])}, "rows < channels"),
        ({"rows": torch.tensor([-1, 2])}, "rows < channels"),
    ],
)
def test_unsafe_shifts_raise(arguments, message):
    grad, out, rows = torch.zeros(1, 4, 4, 5), torch.zeros(16, 18), arguments.pop("rows", torch.tensor([0, 4]))
    good = {
        "grad": grad.data_ptr(), "element_size": 4, "grad_shape": (1, 4, 4, 5), "rows": rows.data_ptr(), "num_rows": 2,
        "kernel": (3, 3), "around": (1, 1), "size": (4, 4), "out": out.data_ptr(), "threads": 1,
    }  # fmt: skip
    native.load().shifted_rows_cpu(**(good | {"rows": torch.tensor([0, 4]).data_ptr(), "num_rows": 0}))
    with pytest.raises(ValueError, match=message):
        native.load().shifted_rows_cpu(**(good | arguments))


@pytest.mark.skipif(native.available() and not native.load().build_info()["cuda"], reason="built without CUDA")
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"numel": 2**41}, r"at most 2\^31 - 1 tiles"),
        ({"num_runs": 1}, "five arrays"),
        ({"num_runs": 1} | dict.fromkeys(TABLE, 16), "address of tile_run"),
        ({"step_tensor": 16}, "constants with step_tensor"),
        ({"constants": 16}, "constants with step_tensor"),
        ({"lr_tensor": 16, "constants": 8}, "multiple of 16"),
    ],
)
def test_unsafe_cuda_arguments_raise_before_any_launch(arguments, message):
    addresses = dict.fromkeys(make_buffers(1), 16)  # nobody looks there
    with pytest.raises(ValueError, match=message):
        native.load().masked_adamw_cuda(**({**addresses, "numel": 4, "stream": 0} | HYPER | arguments))


@pytest.mark.skipif(native.available() and not native.load().build_info()["cuda"], reason="built without CUDA")
@pytest.mark.parametrize(
    "arguments, message",
    [({"numel": 2**41}, r"at most 2\^31 - 1 tiles"), ({"tile_run": 0}, "address of tile_run"), ({"value": 0}, "value")],
)
def test_unsafe_cuda_scatters_raise_before_any_launch(arguments, message):
    table = dict.fromkeys((*TABLE, "tile_run"), 16) | {"num_parameters": 1, "num_runs": 1}
    with pytest.raises(ValueError, match=message):
        native.load().scatter_cuda(**({"value": 16, "numel": 4, "stream": 0} | table | arguments))


@pytest.mark.parametrize(
    "capability, architectures, refused",
    [
        ((9, 0), "80 90", False),
        ((8, 0), "80 90", False),
        ((8, 9), "80-real 90a", False),
        ((12, 1), "80 90", False),
        ((7, 5), "80 90", True),
        ((8, 0), "90", True),
        ((7, 5), "native", False),  # nothing is known
    ],
)
def test_a_gpu_too_old_for_what_was_compiled(capability, architectures, refused):
    reason = native.too_old(capability, architectures)
    assert (reason is not None) == refused
    if refused:
        assert f"compute capability {capability[0]}.{capability[1]}" in reason and architectures in reason


@pytest.fixture
def gpu(monkeypatch):
    """A GPU and a module with CUDA, which says ``probed`` when it is asked for a kernel."""

    def of(capability, probed):
        info = {"cuda": True, "cuda_architectures": "80 90"}
        names = {"build_info": staticmethod(lambda: info), "cuda_probe": staticmethod(lambda: probed)}
        monkeypatch.setattr(native, "_find", lambda: type("Module", (), names))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        native.why_not_cuda.cache_clear()

    yield of
    native.why_not_cuda.cache_clear()


def test_why_not_cuda_asks_the_gpu(gpu):
    gpu((7, 0), None)
    assert "compute capability 7.0" in native.why_not_cuda()
    gpu((9, 0), None)
    assert native.why_not_cuda() is None


@pytest.mark.parametrize(
    "said",
    [
        "CUDA driver version is insufficient for CUDA runtime version",
        "no kernel image is available for execution on the device",
        "system not yet initialized",
    ],
)
def test_kernels_that_the_driver_cannot_run_give_way_with_its_words(gpu, monkeypatch, said):
    gpu((9, 0), said)
    monkeypatch.setattr(triton_kernels, "why_not", lambda: None)
    for op in ("masked_adamw_", "select_threshold", "compact_active"):
        assert f"do not run here: {said}. Update this GPU's driver" in OPS[op].why_not("cuda", "cuda")
        assert OPS[op].preferred("cuda") != "cuda"
        with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot run on 'cuda': .*{said}"):
            OPS[op].choose(torch.device("cuda"), "cuda")


@pytest.mark.skipif(native.available() and not native.load().build_info()["cuda"], reason="built without CUDA")
def test_the_probe_asks_the_real_driver():
    said = native.load().cuda_probe()
    assert (said is None) == torch.cuda.is_available(), said
