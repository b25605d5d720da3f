"""Two processes distil together: the weights of one process that sees the batches of both."""

import dataclasses

import distill_ranks
import pytest
import torch
from processes import WORLD_SIZE, needs_gloo, run_ranks
from test_distiller import SCHEDULE, config, unet

from pecker_fast import BlockMask, MaskedDistiller
from pecker_fast.distill_ranks import Ranks
from pecker_fast.draws import Batch, Draws
from pecker_fast.written import NAME

pytestmark = needs_gloo


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks("distill_ranks.py", tmp_path_factory.mktemp("ranks"))


class BothDraws:
    """The batches of both ranks as one, with the weights of a mean over both."""

    def __init__(self, distiller):
        seeds = [distiller.config.seed, seed_of(1)]
        settings = (distiller.config, distiller.device, distiller.dtype)
        self.each = [Draws(*settings, seed) for seed in seeds]

    def batch(self, *, dropout=0.0):
        first, second = (vars(draws.batch(dropout=dropout)) for draws in self.each)
        joined = {name: torch.cat([first[name], second[name]]) for name in first}
        return Batch(**joined | {"weights": joined["weights"] / WORLD_SIZE})


def seed_of(rank, seed=0):
    ranks = Ranks(None, torch.device("cpu"))
    ranks.rank = rank
    return ranks.seed(seed)


@pytest.mark.parametrize("settings", distill_ranks.SETTINGS)
def test_two_ranks_train_as_one_process_with_both_batches(settings, results):
    first, second = (result[settings] for result in results)
    for name in ("generator", "fake_score", "ema"):
        assert torch.equal(first[name], second[name])
    alone = MaskedDistiller(unet(dropout=0.0).double(), SCHEDULE, config(**distill_ranks.SETTINGS[settings]))
    both = BothDraws(alone)
    alone.masks = dataclasses.replace(
        alone.masks, draws=both.each[0]
    )  # the first rank makes the mask, from its own samples
    alone.build_mask()
    alone.draws = both
    for _ in range(distill_ranks.STEPS):
        alone.step()
    for name, values in distill_ranks.weights(alone).items():
        torch.testing.assert_close(first[name], values, rtol=1e-7, atol=1e-9)
    one_batch = MaskedDistiller(unet(dropout=0.0).double(), SCHEDULE, alone.config)
    one_batch.use_mask(alone.mask)
    one_batch.step()
    assert not torch.allclose(one_batch.active.values, first["generator"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("settings", distill_ranks.SETTINGS)
def test_one_mask_one_all_reduce_for_each_network_and_one_writer(settings, results):
    for result in results:
        found = result[settings]
        mask = BlockMask.from_tensors(found["mask"], found["header"])
        assert mask == BlockMask.from_tensors(results[0][settings]["mask"], results[0][settings]["header"])
        assert found["calls"] == found["expected"]
        assert found["written"] == [NAME, "delta", "distill_config.json", "mask.safetensors", "model"]


def test_a_checkpoint_of_two_ranks_resumes_to_the_bit_and_is_refused_by_one(results):
    for result in results:
        assert result["resumed"]["same"]
        assert result["resumed"]["folders"] == [f"checkpoint-{distill_ranks.STEPS - 1}"]
        assert "resume with as many processes as it was saved with" in result["resumed"]["refused"]
    assert [result["resumed"]["ways"] for result in results] == [{"kind": "dense"}, {"kind!": "slabs"}]


@pytest.mark.parametrize("what", ["true score", "fake score", "config or schedule", "mask", "mass", "saliency"])
def test_ranks_that_disagree_are_refused_on_every_rank(what, results):
    part = {"mass": "mask", "saliency": "config or schedule"}.get(what, what)
    for result in results:
        assert result["disagreements"][what].startswith(
            f"RuntimeError: MaskedDistiller: ranks 0 and 1 have another {part};"
        )


def test_what_fails_on_the_first_rank_fails_on_all(results):
    first, second = (result["disagreements"] for result in results)
    assert "expected at least one batch" in first["no batches"]
    assert "rank 0 could not make the mask" in second["no batches"]
    assert "is a file, but a folder is to be written" in first["unwritable"]
    assert "rank 0 could not write" in second["unwritable"]


def test_seeds_of_ranks_are_their_own():
    seeds = {seed_of(rank, seed) for rank in range(8) for seed in range(8)}
    assert len(seeds) == 64 and [seed_of(0, seed) for seed in range(3)] == [0, 1, 2]
    for seed in seeds:
        torch.Generator().manual_seed(seed)


def test_a_group_that_is_not_there():
    with pytest.raises(RuntimeError, match=r"init_process_group\(\) first"):
        MaskedDistiller(unet(), SCHEDULE, config(), process_group=object())
