"""What an iteration does not compute, keep or wait for, and that compiling it changes none of its numbers."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from models import mask_of
from test_distiller import SCHEDULE, config, unet
from torch import nn

from pecker_fast import BlockMask, MaskedDistiller

BELOW = ("temb", "classes_emb", "cemb", "conv_in", "down", "mid")
"""What the way up of the UNet is fed by."""


def decoder_mask(network, kinds=(nn.Conv2d, nn.GroupNorm)):
    """Half the rows of the decoder's convolutions, and its norms."""
    modules = [(name, m) for name, m in network.named_modules() if isinstance(m, kinds)]
    names = [f"{name}.weight" for name, _ in modules if name.startswith(("up.", "norm_out", "conv_out"))]
    return mask_of(network, tuple(names))


def distiller(mask=None, network=None, **settings):
    network = unet(dropout=0.0) if network is None else network
    made = MaskedDistiller(network.to(memory_format=torch.channels_last), SCHEDULE, config(**settings))
    chosen = decoder_mask(network) if mask == "decoder" else BlockMask.dense(network)
    made.use_mask(chosen, chosen)
    return made


class Watch:
    """Which parts of a network leave a graph behind, and the bytes that their forward keeps for the backward pass."""

    def __init__(self, network):
        self.graphs, self.saved, self.part = set(), dict.fromkeys((*BELOW, "up"), 0), None
        for name in (*BELOW, "up"):
            for module in network.get_submodule(name).modules():
                module.register_forward_hook(lambda m, _, out, name=name: self.note(name, out))
            entered = network.get_submodule(name)
            for module in entered if isinstance(entered, nn.ModuleList) else [entered]:
                module.register_forward_pre_hook(lambda *_, name=name: setattr(self, "part", name))
                module.register_forward_hook(lambda *_: setattr(self, "part", None))

    def note(self, name, out):
        outputs = out if isinstance(out, list) else [out]
        if any(output.grad_fn is not None for output in outputs):
            self.graphs.add(name)

    def pack(self, tensor):
        if self.part is not None and not isinstance(tensor, nn.Parameter):
            self.saved[self.part] += tensor.nbytes
        return tensor


@contextmanager
def watching(network):
    watch = Watch(network)
    with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda tensor: tensor):
        yield watch


def watched_update(mask, network, **settings):
    """Parts with a graph and bytes kept in the update in which ``network`` trains."""
    made = distiller(mask, **settings)
    made.step()
    with watching(getattr(made, network)) as watch:
        updates = made._updates
        fake_score = learner(made, "fake_score")
        if network == "fake_score":
            updates._of_fake_score(fake_score)
        else:
            updates._of_generator(learner(made, "generator"), fake_score, None)
    return watch


def learner(made, name):
    from pecker_fast.distill_updates import Learner

    return Learner(getattr(made, name), getattr(made, f"{name}_optimizer"), 1e-3)


@pytest.mark.parametrize("network", ["generator", "fake_score"])
def test_nothing_below_the_first_active_layer_has_a_graph_or_is_kept(network):
    dense, masked = (watched_update(mask, network) for mask in (None, "decoder"))
    assert dense.graphs == {*BELOW, "up"} and all(dense.saved.values())
    assert masked.graphs == {"up"}
    assert {name: masked.saved[name] for name in BELOW} == dict.fromkeys(BELOW, 0)
    assert 0 < masked.saved["up"] <= dense.saved["up"]
    assert sum(masked.saved.values()) < 0.8 * sum(dense.saved.values())


def test_the_embedding_of_a_network_that_serves_has_no_graph():
    """In the generator's update the gradient goes through true and fake score to x_t, and nowhere else."""
    for name in ("true_score", "fake_score"):
        made = distiller("decoder")
        made.step()
        with watching(getattr(made, name)) as watch:
            made._updates._of_generator(learner(made, "generator"), learner(made, "fake_score"), None)
        embedding = {"temb", "classes_emb", "cemb"}
        assert watch.graphs == {*BELOW, "up"} - embedding, name
        assert not any(watch.saved[part] for part in embedding), name


def test_the_published_iteration_has_a_graph_everywhere():
    """The control: with ``skip_frozen`` off the same mask keeps the graph of the way down."""
    watch = watched_update("decoder", "generator", skip_frozen=False)
    assert {"conv_in", "down", "mid", "up"} <= watch.graphs


# -- compiled --------------------------------------------------------------------------------------


def gradients(made):
    """Of the last step."""
    stores = made.fake_score_optimizer.active, made.active
    for store in stores:
        store.bind_()
    return [store.grads for store in stores]


@pytest.mark.slow
def test_a_compiled_iteration_has_no_graph_breaks_and_the_same_gradients():
    network = unet(dropout=0.0, channel_mult=(1,), attention_resolutions=(8,))
    eager, compiled = (distiller("decoder", copy.deepcopy(network)) for _ in range(2))
    compiled.compile(backend="aot_eager", fullgraph=True)  # a break would raise
    expected, losses = eager.step(), compiled.step()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(compiled), gradients(eager), strict=True):
        assert theirs.norm() > 0 and (ours - theirs).norm() <= 1e-4 * theirs.norm()
    assert compiled.flops() == eager.flops()  # counted without the compiler


def test_compiling_chooses_the_mask_first_and_networks_keep_their_type():
    network = unet(dropout=0.0)
    made = MaskedDistiller(copy.deepcopy(network), SCHEDULE, config())
    made.compile(backend="eager")
    assert made.mask is not None and made.generator._compiled_call_impl is not None
    assert type(made.generator) is type(network) and made.generator.state_dict().keys() == network.state_dict().keys()
