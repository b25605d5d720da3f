"""How a weight gradient is computed is chosen once for a kind of problem, and only for that kind."""

from __future__ import annotations

import contextlib

import baselines
import pytest
import torch
from test_distiller import SCHEDULE, config, unet

from pecker_fast import BlockMask, MaskedDistiller, apply_mask
from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops import tiled_weight_grad, triton_kernels, weight_grad_ways
from pecker_fast.ops.fastest import Choice
from pecker_fast.ops.problem import problem

needs_triton = pytest.mark.skipif(triton_kernels.why_not() is not None, reason=str(triton_kernels.why_not()))
GRID = BlockGrid.of((32, 32, 3, 3), (16, 16))


@pytest.fixture(autouse=True)
def _new_process(monkeypatch):
    forget(monkeypatch)


def forget(monkeypatch):
    for name in ("_measured", "_restored"):
        monkeypatch.setattr(weight_grad_ways, name, {}, raising=False)


def measure_as(monkeypatch, way, calls=None):
    calls = [] if calls is None else calls
    monkeypatch.setattr(weight_grad_ways, "measure_ways", lambda p: calls.append(p) or Choice(way, ms={way: 1.0}))
    return calls


def linear(mask=None, positions=(5,), dtype=torch.float32, width=32):
    mask = mask or ParameterMask(BlockGrid.of((32, width), (16, 16)), torch.tensor([0, 3]))
    out, in_ = mask.grid.shape
    operands = torch.randn(*positions, out, dtype=dtype), torch.randn(*positions, in_, dtype=dtype)
    return problem(*operands, mask, (1, 1), (0, 0), (1, 1), 1, False)


def conv(stride=(1, 1), padding=(1, 1), dilation=(1, 1), batch=2, side=8, dtype=torch.float32):
    mask = ParameterMask(GRID, torch.tensor([0, 3]))
    operands = (torch.randn(batch, 32, side, side, dtype=dtype) for _ in range(2))
    return problem(*operands, mask, stride, padding, dilation, 1, False)


# -- a choice is for its kind of problem -----------------------------------------------------------

NEIGHBOURS = {
    "dilation": {"padding": (2, 2), "dilation": (2, 2)},
    "dilation of one side": {"padding": (1, 2), "dilation": (1, 2)},
    "padding of one side": {"padding": (2, 1), "dilation": (2, 1)},
    "stride of one side": {"padding": (1, 5), "stride": (1, 2)},
    "float64": {"dtype": torch.float64},
}


@needs_triton
@pytest.mark.parametrize("neighbour", NEIGHBOURS.values(), ids=NEIGHBOURS)
@pytest.mark.parametrize("kernel_first", [True, False])
def test_a_layer_of_one_shape_does_not_take_the_way_of_another(monkeypatch, neighbour, kernel_first):
    def first_that_may(p):
        possible = ["triton"] if tiled_weight_grad.why_not(p) is None else []
        return Choice([*possible, "dense"][0])

    monkeypatch.setattr(weight_grad_ways, "measure_ways", first_that_may)
    problems = [conv(), conv(**neighbour)]
    for given in problems if kernel_first else problems[::-1]:
        way = weight_grad_ways.choose_way(given).used
        assert way == ("triton" if given is problems[0] else "dense")
        expected = weight_grad_ways.WAYS["dense"](given)
        torch.testing.assert_close(weight_grad_ways.WAYS[way](given), expected, rtol=1e-4, atol=1e-3)


@needs_triton
def test_a_way_that_does_not_take_a_problem_of_its_kind_is_not_used(monkeypatch):
    """A limit of 2**31 elements may lie between two lengths of one power of two."""
    measure_as(monkeypatch, "triton")
    short, long = linear(positions=(65,)), linear(positions=(128,))
    assert weight_grad_ways.choose_way(short).used == "triton"
    monkeypatch.setattr(weight_grad_ways, "why_not", lambda p: "too large" if p is long else None)
    choice = weight_grad_ways.choose_way(long)
    assert choice.used == "slabs" and "does not take this one" in choice.why
    assert weight_grad_ways.choose_way(short).used == "triton"


@contextlib.contextmanager
def switched(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


SWITCHES = {
    "TF32 of products": lambda: switched(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "cuDNN off": lambda: switched(torch.backends.cudnn, "enabled", False),
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_a_switch_that_changes_the_products_is_measured_for_itself(monkeypatch, switch):
    given, calls = linear(), measure_as(monkeypatch, "dense")
    weight_grad_ways.choose_way(given)
    with switch():
        weight_grad_ways.choose_way(given)
        weight_grad_ways.choose_way(given)
    weight_grad_ways.choose_way(given)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "problems",
    [
        [linear(positions=(4, length)) for length in range(65, 129, 9)],
        [conv(batch=batch) for batch in (5, 6, 7, 8)],
        [conv(side=side) for side in (9, 12, 16)],
        [linear(positions=(6, 4)), linear(positions=(24,)), linear(positions=(2, 3, 4))],
    ],
    ids=["sequence lengths", "batches", "image sides", "the same positions"],
)
def test_sizes_of_one_power_of_two_are_measured_once(monkeypatch, problems):
    calls = measure_as(monkeypatch, "dense")
    for given in problems:
        weight_grad_ways.choose_way(given)
    assert len(calls) == 1


# -- where results must repeat ---------------------------------------------------------------------


@contextlib.contextmanager
def deterministic(mode):
    torch.set_deterministic_debug_mode(mode)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")


REPEATABLE = {
    "use_deterministic_algorithms": lambda: deterministic("error"),
    "warn_only": lambda: deterministic("warn"),
    "cudnn.deterministic": lambda: switched(torch.backends.cudnn, "deterministic", True),
}


@pytest.mark.parametrize("asked", REPEATABLE.values(), ids=REPEATABLE)
def test_a_measured_way_does_not_survive_the_wish_for_equal_bits(monkeypatch, asked):
    given, calls = linear(), measure_as(monkeypatch, "dense")
    assert weight_grad_ways.choose_way(given).used == "dense"
    with asked():
        choice = weight_grad_ways.choose_way(given)
        assert choice.used == "slabs" and "deterministic is on" in choice.why.replace("_algorithms", "")
    assert weight_grad_ways.choose_way(given).used == "dense" and len(calls) == 1


# -- a run that is resumed -------------------------------------------------------------------------


def first_problem(active):
    """As a backward pass of the first masked linear layer has it."""
    return linear(next(e.mask for e in active.entries if len(e.mask.grid.shape) == 2 and not e.mask.is_full))


def distiller():
    torch.manual_seed(0)
    made = MaskedDistiller(unet(), SCHEDULE, config(mask={"block": (4, 4)}))
    made.use_mask(BlockMask.random(made.true_score, 0.3, (4, 4), seed=0))
    return made


def through_checkpoint(made, folder):
    path = made.save_checkpoint(folder)
    return lambda: (other := distiller()).load_checkpoint(path) and other.active


def through_state(made, folder):
    torch.save(made.state_dict(), folder / "state.pt")

    def load():
        other = distiller()
        other.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
        return other.active

    return load


def through_own_loop(made, folder):
    ways = made.active.measured_ways()

    def load():
        model = unet()
        active = apply_mask(model, made.active.mask)
        active.use_measured_ways(ways)
        return active

    return load


@pytest.mark.parametrize("save", [through_checkpoint, through_state, through_own_loop])
def test_a_resumed_run_takes_the_ways_that_were_measured(monkeypatch, tmp_path, save):
    made = distiller()
    measure_as(monkeypatch, "dense")
    assert weight_grad_ways.choose_way(first_problem(made.active)).used == "dense"
    load = save(made, tmp_path)
    forget(monkeypatch)
    calls = measure_as(monkeypatch, "slabs")  # another process finds another way fastest
    active = load()
    choice = weight_grad_ways.choose_way(first_problem(active))
    assert (choice.used, choice.why, calls) == ("dense", "restored from a checkpoint", [])
    assert list(active.measured_ways().values()) == ["dense"]  # and hands it on
    assert weight_grad_ways.choose_way(linear(positions=(1000,))).used == "slabs" and len(calls) == 1


def test_a_resumed_baseline_takes_them_too(monkeypatch):
    def baseline():
        made = baselines.baseline("random_label")
        made.use_mask(BlockMask.random(made.network, 0.3, (4, 4), seed=0))
        return made

    made = baseline()
    measure_as(monkeypatch, "dense")
    weight_grad_ways.choose_way(first_problem(made.active))
    state = made.state_dict()
    forget(monkeypatch)
    calls, resumed = measure_as(monkeypatch, "slabs"), baseline()
    resumed.load_state_dict(state)
    assert weight_grad_ways.choose_way(first_problem(resumed.active)).used == "dense" and not calls


def test_loading_into_a_process_that_measured_otherwise_replaces_its_choice(monkeypatch):
    given = linear()
    measure_as(monkeypatch, "dense")
    weight_grad_ways.choose_way(given)
    saved = weight_grad_ways.choices_to_save([given.mask])
    forget(monkeypatch)
    measure_as(monkeypatch, "slabs")
    assert weight_grad_ways.choose_way(given).used == "slabs"
    weight_grad_ways.restore_choices(saved)
    assert weight_grad_ways.choices_to_save([]) == saved  # also before the first problem
    assert weight_grad_ways.choose_way(given).used == "dense"
    with deterministic("error"):
        assert weight_grad_ways.choose_way(given).used == "slabs"


@pytest.mark.parametrize("saved", [[], {"kind": "fast"}, {3: "dense"}, {"kind": None}, "dense"])
def test_what_is_no_choice_is_refused_and_changes_nothing(saved):
    with pytest.raises(ValueError, match="ways of weight gradients: expected kinds of problems"):
        weight_grad_ways.restore_choices(saved)
    assert not weight_grad_ways._restored


def test_the_text_of_a_kind_is_the_same_in_every_process():
    kinds = [str(weight_grad_ways.kind_of(given)) for given in (linear(), linear(), conv(), conv())]
    assert len(set(kinds)) == 2 and not any(" at 0x" in kind for kind in kinds)
