"""The FID Inception network: its shapes, its quirks, figures of torch-fidelity, and its files."""

import math

import pytest
import torch
from torch import nn

from pecker_fast.checkpoint import write_safetensors
from pecker_fast.errors import FileFormatError, NonFiniteError
from pecker_fast.metrics import FeatureStatistics, InceptionStatistics, fid, frechet_distance
from pecker_fast.models.inception import InceptionV3, _Mixed, resize_like_tf1, to_uint8
from pecker_fast.models.inception_weights import load_inception

SHAPES = {
    "Conv2d_1a_3x3": (32, 149, 149),
    "Conv2d_2a_3x3": (32, 147, 147),
    "Conv2d_2b_3x3": (64, 147, 147),
    "Conv2d_3b_1x1": (80, 73, 73),
    "Conv2d_4a_3x3": (192, 71, 71),
    "Mixed_5b": (256, 35, 35),
    "Mixed_5c": (288, 35, 35),
    "Mixed_5d": (288, 35, 35),
    "Mixed_6a": (768, 17, 17),
    "Mixed_6b": (768, 17, 17),
    "Mixed_6c": (768, 17, 17),
    "Mixed_6d": (768, 17, 17),
    "Mixed_6e": (768, 17, 17),
    "Mixed_7a": (1280, 8, 8),
    "Mixed_7b": (2048, 8, 8),
    "Mixed_7c": (2048, 8, 8),
}


@pytest.fixture(scope="module")
def on_meta():
    with torch.device("meta"):
        return InceptionV3().eval()


def waves(shapes):
    """Weights that a formula gives, so that another library can have the same: see the figures below."""
    weights = {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        wave = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + index).view(shape)
        kind = name.rsplit(".", 1)[1]
        if len(shape) == 4:
            wave = wave * 2 / math.sqrt(math.prod(shape[1:]))
        elif name == "fc.weight":
            wave = wave / 16
        elif ".bn." in name:
            wave = 1 + 0.3 * wave if kind in ("weight", "running_var") else 0.1 * wave
        weights[name] = wave.half()
    return weights


@pytest.fixture(scope="module")
def weights(on_meta):
    return waves({k: v.shape for k, v in on_meta.state_dict().items() if "num_batches" not in k})


@pytest.fixture(scope="module")
def network(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    write_safetensors(path, weights)
    return load_inception(path)


def test_every_layer_has_its_published_shape(on_meta):
    seen = {}
    for name, module in on_meta.named_children():
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: tuple(out.shape[1:])}))
    features = on_meta(torch.empty(2, 3, 32, 32, dtype=torch.uint8, device="meta"))
    assert seen == SHAPES
    assert features.shape == (2, 2048)
    assert on_meta.logits(features).shape == (2, 1008)
    assert sum(parameter.numel() for parameter in on_meta.parameters()) == 23_850_960


def picture():
    return (torch.arange(3 * 32 * 32) * 37 % 251).to(torch.uint8).view(1, 3, 32, 32)


def test_features_and_logits_are_those_of_torch_fidelity(network):
    # What torch-fidelity 0.4.0 gives for `picture()` with the weights of `waves`.
    features = network(picture())
    assert features[0, :4].tolist() == pytest.approx([1.1430990, 0.8761017, 0.4201298, 0.0], rel=1e-4)
    assert float(features.mean()) == pytest.approx(0.1103273, rel=1e-4)
    assert network.logits(features)[0, :3].tolist() == pytest.approx([-1.4773574, -1.1154158, -0.2065276], rel=1e-4)
    biased = network.logits(features, bias=True)[0, :3].tolist()
    assert biased == pytest.approx([-2.4226699, -0.6705916, 0.6240388], rel=1e-4)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_pools_at_the_border():
    x = torch.ones(1, 2, 5, 5)
    x[0, 0, 2, 2] = 10.0
    for kind, expected in (("mean", 2.0), ("max", 10.0)):
        block = _Mixed(2, [[("a", 1, 1)]], kind, pool_channels=1)
        block.branch_pool = nn.Identity()
        pooled = block._pooled(x)
        assert float(pooled[0, 0, 1, 1]) == expected
        assert torch.equal(pooled[0, 1], torch.ones(5, 5))  # with the padding counted its border would be lower


def test_resizing_reads_at_corners():
    row = torch.tensor([0.0, 10.0, 20.0, 30.0]).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert resize_like_tf1(row, 8)[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
    assert resize_like_tf1(row, 2)[0, 0, 1].tolist() == [0, 20]
    assert torch.equal(resize_like_tf1(row, 4), row)
    assert resize_like_tf1(torch.rand(2, 3, 5, 9), 7).shape == (2, 3, 7, 7)


def test_images_are_rounded_as_they_are_saved():
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0039, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


def test_images_of_another_form_are_refused(on_meta):
    for bad in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8).byte()):
        with pytest.raises(ValueError, match="to_uint8"):
            on_meta(bad)


def test_statistics_need_pretrained_weights(on_meta):
    with pytest.raises(ValueError, match="load_inception"):
        on_meta.statistics([])


def test_statistics_are_of_the_features(network):
    features = torch.arange(4.0).view(2, 2)
    statistics = network.statistics([])
    assert (statistics.count, statistics.weights) == (0, network.weights)
    statistics.update(features)
    other = InceptionStatistics(network.weights)
    other.update(features + 3.0)
    assert fid(real=statistics, generated=other) == frechet_distance(statistics, other) == pytest.approx(18.0)


def test_shifted_and_stretched_gaussians_have_a_closed_form(network):
    whole = torch.randn(200, 5, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(whole.T.cov())
    white = (whole - whole.mean(0)) @ vectors / values.sqrt()  # mean 0 and covariance 1 exactly
    statistics = []
    for shift, scale in ((0.0, 2.0), (1.5, 0.5)):
        statistics.append(InceptionStatistics(network.weights))
        statistics[-1].update(white * scale + shift)
    assert fid(real=statistics[0], generated=statistics[1]) == pytest.approx(5 * (1.5**2 + (2.0 - 0.5) ** 2))


def test_fid_is_not_given_to_other_features():
    one, two, plain = InceptionStatistics("a"), InceptionStatistics("b"), FeatureStatistics()
    with pytest.raises(ValueError, match="generated is FeatureStatistics"):
        fid(real=one, generated=plain)
    with pytest.raises(ValueError, match="different Inception weights"):
        fid(real=one, generated=two)
    for foreign in (two, plain):
        with pytest.raises(ValueError, match="same Inception weights"):
            one.merge(foreign)
    with pytest.raises(TypeError):
        fid(one, one)
    with pytest.raises(NonFiniteError):
        one.update(torch.tensor([[math.nan]]))


def _small(weights):
    """The same names and shapes in a file of a few kilobytes: every tensor is one number, seen many times."""
    return {name: tensor.flatten()[:1].clone()[0].expand(tensor.shape) for name, tensor in weights.items()}


def test_a_state_dict_with_and_without_counters(weights, tmp_path):
    path = tmp_path / "weights.pth"
    state = _small(weights)
    torch.save(state, path)
    first = load_inception(path)
    torch.save(state | {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(3)}, path)
    second = load_inception(path)
    assert first.weights == second.weights
    assert torch.equal(first.fc.bias, state["fc.bias"].float())
    assert not first.training


def test_files_that_do_not_fit_are_refused_by_name(weights, tmp_path):
    path = tmp_path / "weights.pth"
    state = _small(weights)
    cases = [
        ({k: v for k, v in state.items() if k != "fc.bias"}, r"1 weights missing \(first: \['fc.bias'\]\)"),
        (state | {"AuxLogits.fc.bias": torch.zeros(1)}, r"1 unexpected \(first: \['AuxLogits"),
        (state | {"fc.bias": torch.zeros(1000)}, r"fc.bias: expected floating-point \(1008,\), got .*1000"),
        (state | {"fc.bias": torch.zeros(1008, dtype=torch.int64)}, "int64"),
        (state | {"fc.bias": torch.full((1008,), math.nan)}, "fc.bias holds NaN"),
        ([1, 2], "got list"),
        ({"state_dict": {}}, "state_dict: expected an ordinary tensor, got dict"),
    ]
    for content, message in cases:
        torch.save(content, path)
        with pytest.raises(FileFormatError, match=message) as caught:
            load_inception(path)
        assert str(path) in str(caught.value)


def test_files_of_old_torch_are_read_and_damaged_archives_are_not(weights, tmp_path):
    path = tmp_path / "weights.pth"
    state = _small(weights)
    torch.save(state, path)
    expected = load_inception(path).weights
    content = bytearray(path.read_bytes())
    at = content.index(state["fc.bias"].flatten()[:1].numpy().tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch does not notice
    with pytest.raises(FileFormatError, match="the checksum of"):
        load_inception(path)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    network = load_inception(path)
    assert network.weights == expected
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FileFormatError, match=r"weights\.pth: .*nothing in it was run"):
        load_inception(path)


def test_weights_are_no_windows_into_the_file(weights, tmp_path):
    path = tmp_path / "weights.pth"
    state = _small(weights) | {"fc.bias": torch.randn(1008)}
    torch.save(state, path)
    network = load_inception(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(network.fc.bias, state["fc.bias"])


class _Code:
    def __reduce__(self):
        return (print, ("run",))


def test_damaged_files_and_files_with_code_are_refused(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    with pytest.raises(FileFormatError, match="no such file"):
        load_inception(path)
    torch.save({"fc.bias": _Code()}, path)
    with pytest.raises(FileFormatError, match="nothing in it was run"):
        load_inception(path)
    assert capsys.readouterr().out == ""
    whole = path.read_bytes()
    for part in (b"", b"nonsense", whole[: len(whole) // 2], b"PK\x03\x04" + whole[:40]):
        path.write_bytes(part)
        with pytest.raises(FileFormatError, match="weights.pth"):
            load_inception(path)
    (tmp_path / "weights.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FileFormatError, match="weights.safetensors"):
        load_inception(tmp_path / "weights.safetensors")
