"""Detectors: what they make of images, what they say of themselves, and what stops them before anything is drawn."""

import hashlib
import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pecker_fast import models
from pecker_fast.classes import Classes
from pecker_fast.detectors import DETECTORS, Classifier, Detector, External, NudeNet, load_detector, sha256_of
from pecker_fast.errors import FileFormatError, NonFiniteError
from pecker_fast.models import DDPMUNet, DigitsClassifier
from pecker_fast.prompt_files import EvaluationPrompt
from pecker_fast.prompt_protocols import protocol_names, read_protocol

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
PROMPTS = [EvaluationPrompt("a cat", 0)] * 3


def test_every_detector_has_a_name():
    assert set(DETECTORS) == {"nudenet", "external", "classifier", "clip"}


# -- NudeNet ---------------------------------------------------------------------------------------


class FakeNudeDetector:
    """The package's interface; boxes by the first pixel, in OpenCV's order of channels."""

    def __init__(self, model_path=None, providers=None, inference_resolution=320):
        self.model_path, self.resolution = model_path, inference_resolution

    def detect(self, image):
        assert isinstance(image, np.ndarray) and image.flags.c_contiguous
        blue, green, red = image[0, 0].tolist()
        box = {"box": [0, 0, 1, 1]}
        return [
            {"class": "FEMALE_BREAST_EXPOSED", "score": red / 255, **box},
            {"class": "BUTTOCKS_EXPOSED", "score": green / 255, **box},
            {"class": "FEET_EXPOSED", "score": blue / 255, **box},
            {"class": "FACE_FEMALE", "score": 1.0, **box},
        ]


@pytest.fixture
def nudenet(tmp_path, monkeypatch):
    (tmp_path / "320n.onnx").write_bytes(b"weights")
    package = SimpleNamespace(__file__=str(tmp_path / "__init__.py"), NudeDetector=FakeNudeDetector)
    monkeypatch.setitem(sys.modules, "nudenet", package)
    versions = {"nudenet": "3.4.2"}
    original = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or original(name))
    return versions


def test_nudenet_counts_boxes_of_its_labels(nudenet):
    images = np.zeros((3, 4, 4, 3), np.uint8)
    images[0, 0, 0] = 255, 102, 255  # red 1.0, green 0.4
    images[1, 0, 0] = 51, 0, 255  # red 0.2, feet 1.0
    found = NudeNet(threshold=0.4).measure(images, PROMPTS)
    assert found["seen"].tolist() == [True, False, False]
    assert found["boxes"].tolist() == [2, 0, 0]
    assert found["score"].tolist() == pytest.approx([1.0, 0.2, 0.0])
    feet = NudeNet(labels=("FEET_EXPOSED",)).measure(images, PROMPTS)
    assert feet["seen"].tolist() == [True, True, False]


def test_nudenet_says_what_it_is(nudenet, tmp_path):
    described = NudeNet().describe()
    assert described["version"] == "3.4.2" and described["threshold"] == 0.25
    assert described["sha256"] == hashlib.sha256(b"weights").hexdigest() and described["weights"] == "320n.onnx"
    (tmp_path / "640m.onnx").write_bytes(b"more")
    larger = NudeNet(tmp_path / "640m.onnx", resolution=640)
    assert larger._network.model_path == str(tmp_path / "640m.onnx") and larger._network.resolution == 640
    assert larger.describe()["sha256"] == hashlib.sha256(b"more").hexdigest()
    assert isinstance(larger, Detector)


def test_nudenet_refuses(nudenet, tmp_path, monkeypatch):
    with pytest.raises(FileFormatError, match=r"none\.onnx: no such file"):
        NudeNet(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="threshold from 0.25 to 1, got 0.2"):  # the package has thrown those away
        NudeNet(threshold=0.2)
    with pytest.raises(ValueError, match="EXPOSED_BREAST_F"):  # a label of version 2
        NudeNet(labels=("EXPOSED_BREAST_F",))
    nudenet["nudenet"] = "2.0.9"
    with pytest.raises(ImportError, match="expected nudenet 3.*got 2.0.9.*pip install pecker_fast"):
        NudeNet()
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ImportError, match=r"pip install pecker_fast\[nudenet\]"):
        NudeNet()


# -- anybody's -------------------------------------------------------------------------------------

FACES = """
import numpy as np
from dataclasses import dataclass

__version__ = "1.2"

@dataclass
class Settings:
    scale: "float" = 255.0

def red(images):
    found = images[:, 0, 0, 0] / Settings().scale
    found[images[:, 0, 0, 1] == 0] = np.nan
    return found

class Whole:
    def describe(self):
        return {"name": "whole", "version": "1", "threshold": None, "sha256": None}

    def measure(self, images, prompts):
        return {"seen": images.mean((1, 2, 3)) > 100}

number = 4
"""


@pytest.fixture
def faces(tmp_path):
    (tmp_path / "faces.py").write_text(FACES)
    return f"{tmp_path / 'faces.py'}"


def test_a_function_gives_probabilities_and_says_where_there_is_no_face(faces):
    images = np.zeros((3, 4, 4, 3), np.uint8)
    images[:2, 0, 0] = (255, 1, 0), (102, 1, 0)
    detector = load_detector(f"{faces}:red", threshold=0.6)
    found = detector.measure(images, PROMPTS)
    assert found["seen"].tolist() == [True, False, False] and found["no_face"].tolist() == [False, False, True]
    assert found["probability"][:2].tolist() == [1.0, 0.4] and np.isnan(found["probability"][2])
    described = detector.describe()
    assert described["version"] == "1.2" and described["threshold"] == 0.6 and described["source"] == "faces.py"
    assert described["source_sha256"] == sha256_of(faces) == hashlib.sha256(FACES.encode()).hexdigest()


def test_a_class_and_an_instance_are_taken_as_they_are(faces, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    for place in (f"{faces}:Whole", "faces:Whole"):
        detector = load_detector(place)
        assert detector.describe()["name"] == "whole"
        assert detector.measure(IMAGES, PROMPTS)["seen"].dtype == bool
    with pytest.raises(ValueError, match="has a threshold of its own"):
        load_detector(f"{faces}:Whole", threshold=0.5)


def test_what_is_no_detector_is_refused(faces, tmp_path):
    (tmp_path / "broken.py").write_text("def")
    for place, error, said in (
        ("faces.py", ValueError, "expected module:name or file.py:name"),
        (f"{tmp_path}/none.py:red", FileFormatError, r"none\.py: no such file"),
        ("no_such_module_here:red", ImportError, "no_such_module_here"),
        (f"{tmp_path}/broken.py:red", ImportError, "not Python that can be read"),
        (f"{faces}:blue", ValueError, "has no blue"),
        (f"{faces}:number", ValueError, "expected a function of images, or describe and measure, got int"),
    ):
        with pytest.raises(error, match=said):
            load_detector(place)


@pytest.mark.parametrize("given", [[0.1, 0.2], [0.1, 0.2, 1.2], [-0.1, 0.2, 0.2], [[0.1], [0.2], [0.3]]])
def test_what_is_no_probability_is_refused(given):
    with pytest.raises(ValueError, match="mine: expected 3 probabilities from 0 to 1"):
        External(lambda images: given, name="mine").measure(IMAGES, PROMPTS)


def test_the_detector_of_the_docs(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "concept_evaluation.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    (tmp_path / "redness.py").write_text(code)
    detector = load_detector(f"{tmp_path / 'redness.py'}:Redness")
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, ..., 0] = 204
    found = detector.measure(images, PROMPTS[:2])
    assert found["seen"].tolist() == [True, False] and found["red"].tolist() == [0.8, 0.0]
    assert detector.describe()["sha256"] == hashlib.sha256(code.encode()).hexdigest()


def test_the_protocol_of_the_docs(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "concept_evaluation.md").read_text()
    (code,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.S)
    (tmp_path / "mine.yaml").write_text(code)
    assert len(read_protocol(tmp_path / "mine.yaml").prompts("cat")) == 20
    rows = {line.split("|")[1].strip(): line.split("|")[2] for line in page.splitlines() if line.startswith("| `")}
    for row, said in rows.items():
        for name in set(re.findall(r"`(\w+)`", row)) & set(protocol_names()):
            templates, seeds = map(int, re.findall(r"(\d+)", said))
            protocol = read_protocol(name)
            assert (len(protocol.templates), len(protocol.seeds)) == (templates, seeds)


# -- a classifier ----------------------------------------------------------------------------------


def test_a_classifier_sees_its_class(tmp_path):
    judge = DigitsClassifier(width=2, image_size=16, channels=3, num_classes=4).eval()
    models.save(judge, tmp_path / "judge")
    logits = judge(torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 127.5 - 1)
    predicted = logits.argmax(1).tolist()
    detector = Classifier(tmp_path / "judge", predicted[0])
    prompts = [
        EvaluationPrompt("a", label=predicted[0]),
        EvaluationPrompt("b", label=(predicted[1] + 1) % 4),
        PROMPTS[0],
    ]
    found = detector.measure(IMAGES, prompts)
    assert found["seen"].tolist() == [guess == predicted[0] for guess in predicted]
    np.testing.assert_allclose(found["probability"], logits.softmax(1)[:, predicted[0]].detach().numpy(), rtol=1e-5)
    assert found["correct"].tolist() == [True, False, None]  # the last one has no label
    assert "correct" not in detector.measure(IMAGES, PROMPTS)
    described = detector.describe()
    assert described["class"] == predicted[0] and described["sha256"] == sha256_of(tmp_path / "judge")


def test_images_are_made_to_fit_a_classifier(tmp_path):
    judge = DigitsClassifier(width=2, image_size=8, num_classes=4).eval()
    models.save(judge, tmp_path / "judge")
    flat = np.full((1, 16, 16, 3), (0, 51, 255), np.uint8)  # mean 102
    found = Classifier(tmp_path / "judge", 1).measure(flat, PROMPTS[:1])
    logits = judge(torch.full((1, 1, 8, 8), 102 / 127.5 - 1))
    np.testing.assert_allclose(found["probability"], logits.softmax(1)[:, 1].detach().numpy(), rtol=1e-5)


def test_a_classifier_knows_its_classes_by_name(tmp_path):
    judge = DigitsClassifier(width=2, image_size=16, channels=3, num_classes=3)
    Classes(3, ("cat", "big dog", "cow"), unseen=(2,)).put_on(judge)
    models.save(judge, tmp_path / "judge")
    described = Classifier(tmp_path / "judge", "big dog").describe()
    assert (described["class"], described["class_names"]) == (1, ["big dog"])
    with pytest.raises(ValueError, match="unknown class 'dog'"):
        Classifier(tmp_path / "judge", "dog")
    with pytest.raises(ValueError, match=r"class 2 \(cow\) has no image"):
        Classifier(tmp_path / "judge", "cow")


def test_a_classifier_refuses(tmp_path):
    with pytest.raises(FileFormatError, match="none"):
        Classifier(tmp_path / "none", 0)
    judge = DigitsClassifier(width=2, image_size=16, channels=3, num_classes=4)
    models.save(judge, tmp_path / "judge")
    with pytest.raises(ValueError, match="unknown class 4; the model has classes 0 to 3"):
        Classifier(tmp_path / "judge", 4)
    with pytest.raises(ValueError, match="expected labels 0 to 3, got 9"):
        Classifier(tmp_path / "judge", 0).measure(IMAGES, [EvaluationPrompt("a", label=9)] * 3)
    small = {"width": 4, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "norm_groups": 2}
    models.save(DDPMUNet(**small, image_size=8, channels=1), tmp_path / "model")
    with pytest.raises(FileFormatError, match="draws images"):
        Classifier(tmp_path / "model", 0)
    for parameter in judge.head.parameters():
        parameter.data.fill_(torch.finfo(torch.float32).max)  # finite, and their sum is not
    models.save(judge, tmp_path / "overflowing")
    with pytest.raises(NonFiniteError, match="overflowing"):
        Classifier(tmp_path / "overflowing", 0).measure(IMAGES, PROMPTS)
    judge.head.weight.data[0, 0] = torch.nan
    models.save(judge, tmp_path / "broken")
    with pytest.raises(FileFormatError, match="broken.*head.weight has 1 of"):
        Classifier(tmp_path / "broken", 0)


def test_the_digest_of_a_folder_is_of_names_and_contents(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "x").write_text("1")
    first = sha256_of(folder)
    (folder / "x").rename(folder / "y")
    second = sha256_of(folder)
    (folder / "y").write_text("2")
    assert len({first, second, sha256_of(folder)}) == 3
    with pytest.raises(FileFormatError, match="none: cannot be read"):
        sha256_of(tmp_path / "none")
