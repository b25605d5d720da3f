"""Two processes train one masked model: the same bits as one process that does the work of both."""

import pytest
import ranks
import torch
from processes import needs_gloo, run_ranks

from pecker_fast import BlockMask, MaskedAdamW, change_mask
from pecker_fast.distributed import Shard, check_shard


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of the two processes found, for all tests at once: starting them is what takes time."""
    return run_ranks("ranks.py", tmp_path_factory.mktemp("ranks"))


def alone(make, mask="row", refresh=None):
    """One process that computes the half batches one after the other and averages their flat gradients."""
    torch.set_num_threads(1)
    model, active = ranks.masked(mask)
    optimizer = make(active)
    for step in range(ranks.STEPS):
        if refresh is not None and step == 2:
            change_mask(active, refresh(model), optimizer)
        halves = []
        for rank in range(ranks.WORLD_SIZE):
            optimizer.zero_grad()
            ranks.backward(model, step, rank)
            active.bind_()
            halves.append(active.grads.clone())
        active.grads.copy_((halves[0] + halves[1]) / 2)
        optimizer.step()
    return active, optimizer


@needs_gloo
def test_averaged_gradients_train_as_one_process_does(results):
    active, _ = alone(lambda active: torch.optim.AdamW(active.parameters(), lr=0.01))
    for result in results:
        assert torch.equal(result["all_reduce"]["values"], active.values)


@needs_gloo
def test_state_in_shards_follows_a_change_of_the_mask(results):
    active, _ = alone(
        lambda active: MaskedAdamW(active, lr=0.01, **ranks.SETTINGS["ema"]),
        refresh=lambda model: BlockMask.random(model, 0.2, "row", seed=5),
    )
    for result in results:
        assert torch.equal(result["refreshed"]["values"], active.values)


@needs_gloo
def test_one_all_reduce_for_the_whole_model(results):
    for result in results:
        found = result["one_all_reduce"]
        assert found["calls"] == [found["numel"]] * ranks.STEPS


@needs_gloo
def test_ddp_trains_as_one_process_does_with_one_bucket(results):
    active, _ = alone(lambda active: MaskedAdamW(active, lr=0.01, **ranks.SETTINGS["plain"]))
    for result in results:
        assert torch.equal(result["ddp"]["values"], active.values)
        assert result["ddp"]["buckets"] == str(4 * result["ddp"]["numel"])


@needs_gloo
@pytest.mark.parametrize("mask", ranks.MASKS)
@pytest.mark.parametrize("settings", ranks.SETTINGS)
def test_a_sharded_optimizer_gives_the_same_bits_with_half_the_state(results, mask, settings):
    active, optimizer = alone(lambda active: MaskedAdamW(active, lr=0.01, **ranks.SETTINGS[settings]), mask)
    assert mask != "odd" or active.numel % ranks.WORLD_SIZE == 1
    buffers = 2  # exp_avg and exp_avg_sq, or exp_avg_sq and ema
    for result in results:
        found = result[f"sharded {mask} {settings}"]
        assert torch.equal(found["values"], active.values)
        left_over = 4 * buffers * (active.numel % ranks.WORLD_SIZE)
        assert ranks.state_bytes(optimizer) == 2 * found["bytes"] - left_over
        if settings == "ema":
            assert torch.equal(found["ema"], active.ema) and torch.equal(found["after"], active.values)
            assert not torch.equal(active.ema, active.values)


@needs_gloo
def test_a_shard_continues_to_the_bit_and_is_refused_elsewhere(results):
    active, _ = alone(lambda active: MaskedAdamW(active, lr=0.01), "odd")
    for rank, result in enumerate(results):
        found = result["resumed"]
        assert torch.equal(found["values"], active.values)
        another, whole = found["refused"]
        assert f"the state is shard {1 - rank} of 2, this optimizer has shard {rank} of 2" in another
        assert f"the state is shard {rank} of 2, this optimizer has the whole state" in whole


@needs_gloo
@pytest.mark.parametrize("difference", ["blocks", "sizes"])
def test_masks_that_differ_are_refused_on_every_rank(results, difference):
    for result in results:
        for error in result["other_masks"][difference]:
            assert error.startswith("RuntimeError: the masks of ranks 0 and 1 differ") and "BlockMask.load" in error


@needs_gloo
def test_weights_that_only_one_rank_uses_train_on_all(results):
    first, second = (result["branches"] for result in results)
    assert torch.equal(first["values"], second["values"])
    for found in (first, second):
        assert found["passed_over"]


@pytest.mark.parametrize("numel", [1, 2, 5, 12, 1001])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_cover_the_buffer(numel, world_size):
    flat = torch.arange(float(numel))
    shards = [Shard(numel, rank, world_size, None) for rank in range(world_size)]
    assert {len(shard.part_of(flat)) for shard in shards} == {shards[0].part_numel}
    assert torch.cat([shard.part_of(flat) for shard in shards]).unique().tolist() == flat.tolist()
    assert shards[0].part_numel < numel / world_size + world_size
    for shard in shards:
        filled = torch.full((numel,), -1.0)
        for there, here in shard.stretches:
            filled[there] = shard.part_of(flat)[here]
        assert set(filled.tolist()) - {-1.0} == set(shard.part_of(flat).tolist())


def test_a_state_of_another_number_of_ranks_is_refused():
    shard = Shard(10, 0, 2, None)
    check_shard({"shard_rank": 0, "shard_world_size": 2}, shard)
    with pytest.raises(ValueError, match="the state is shard 0 of 3, this optimizer has shard 0 of 2"):
        check_shard({"shard_rank": 0, "shard_world_size": 3}, shard)
    with pytest.raises(ValueError, match="the state is the whole state, this optimizer has shard 0 of 2"):
        check_shard({}, shard)


def test_without_processes_it_says_what_to_do():
    _, active = ranks.masked()
    with pytest.raises(RuntimeError, match=r"init_process_group\(\) first"):
        active.all_reduce_()
