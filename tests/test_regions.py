"""Regions: which weights lie in them, for our UNet and for diffusers', and what is refused."""

import pytest
from models import Zoo
from torch import nn

from pecker_fast.models import DDPMUNet
from pecker_fast.regions import check_region, in_region

PARTS = ("encoder", "middle", "decoder")


def unet():
    small = {"width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (), "image_size": 8}
    return DDPMUNet(**small, channels=1, norm_groups=4, num_classes=4)


def diffusers_unet():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=5,
    )


def names_of(model):
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("model", "roots", "outside"),
    [
        (
            unet,
            {"encoder": {"conv_in", "down"}, "middle": {"mid"}, "decoder": {"up", "norm_out", "conv_out"}},
            {"temb", "cemb", "classes_emb"},
        ),
        (
            diffusers_unet,
            {
                "encoder": {"conv_in", "down_blocks"},
                "middle": {"mid_block"},
                "decoder": {"up_blocks", "conv_norm_out", "conv_out"},
            },
            {"time_embedding", "class_embedding"},
        ),
    ],
)
def test_parts_of_a_unet(model, roots, outside):
    names = names_of(model())
    parts = {part: in_region(names, part) for part in PARTS}
    assert {part: {name.split(".")[0] for name in members} for part, members in parts.items()} == roots
    assert sum(map(len, parts.values())) == len(frozenset().union(*parts.values()))  # none lies in two
    assert {name.split(".")[0] for name in set(names).difference(*parts.values())} == outside
    assert in_region(names, "all") == frozenset(names)


def test_prefixes_of_names():
    names = names_of(unet())
    chosen = in_region(iter(names), ("up.0.", "norm_out."))
    assert chosen == {
        name for name in names if name.startswith("up.0.") or name in ("norm_out.weight", "norm_out.bias")
    }
    assert in_region(names, ("conv_out.weight", "conv_out.")) == {"conv_out.weight", "conv_out.bias"}


def test_a_region_without_weights_is_refused_with_what_there_is():
    with pytest.raises(
        ValueError, match=r"no weight lies in the decoder; this model has encoder, and .* conv_in\., norm"
    ):
        in_region(names_of(Zoo()), "decoder")  # its first layer is called conv_in
    with pytest.raises(ValueError, match=r"begins with 'up\.9\.'; this model has encoder, middle, decoder, and names"):
        in_region(names_of(unet()), ("up.0.", "up.9."))
    deep = nn.Sequential(*(nn.Linear(2, 2) for _ in range(10)))
    with pytest.raises(ValueError, match=r"no region with a name, and names that begin with 0\., .* 7\., \.\.\.$"):
        in_region(names_of(deep), "middle")


@pytest.mark.parametrize("region", ["decoders", "", (), ("up.", ""), ("up.", 0), ["up."], None, 1])
def test_what_is_no_region_is_refused(region):
    with pytest.raises(ValueError, match="region: expected 'all', 'encoder', 'middle', 'decoder' or a tuple"):
        check_region(region)
    with pytest.raises(ValueError, match="region: expected"):
        in_region(["up.weight"], region)


@pytest.mark.parametrize("region", ["all", *PARTS, ("up.0.",)])
def test_regions_are_accepted_before_there_is_a_model(region):
    check_region(region)
