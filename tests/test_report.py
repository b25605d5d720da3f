"""Pictures are what they should be, and the page needs nothing but itself."""

import builtins
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from pecker_fast import report

CLASSES = tuple("01234")
VOID = {"meta", "img", "link", "br"}


def _run(density, target=30):
    worst = {"unlearning_accuracy": 0.97, "retain_accuracy": 0.91, "frechet_distance": 3.0}
    return {
        "density": density,
        "steps": 150,
        "images_seen": 24000,
        "seconds": 20.1,
        "mask_seconds": 0.2,
        "flops": 230_000_000_000,
        "unlearning_accuracy": 0.987,
        "unlearning_accuracy_ci95": [0.961, 0.996],
        "retain_accuracy": 0.974,
        "frechet_distance": 1.234,
        "steps_to_target": target,
        "worst_after_target": worst if target else None,
        "trainable_parameters": round(139_000 * density),
        "changed_parameters": round(139_000 * density),
        "learning_rate": 5e-4 / density,
    }


def _metrics():
    judged = ("unlearning_accuracy", "unlearning_accuracy_ci95", "retain_accuracy", "frechet_distance")
    return {
        "forget_class": [3],
        "override_class": [1],
        "seed": 7,
        "before": {key: value for key, value in _run(1.0).items() if key in judged},
        "runs": {"masked": _run(0.25), "random": _run(0.25, target=None), "dense": _run(1.0)},
        "settings": {"masked": {"forget": [3]}},
        "versions": {"torch": "<script>alert(1)</script>"},
    }


def _curves():
    point = {"unlearning_accuracy": 0.5, "retain_accuracy": 0.9, "frechet_distance": 2.0}
    return {name: [{"step": s, "seconds": s / 5, **point} for s in (5, 10)] for name in ("masked", "dense")}


def _pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def _rows_with(pixels, colour):
    """Numbers of the rows with more of a colour than the rim of a letter has."""
    return ((abs(pixels - colour).sum(2) < 30).sum(1) > 100).nonzero()[0]


@pytest.mark.parametrize("channels", [1, 3])
def test_before_after_shows_both_and_frames_the_forgotten_row(tmp_path, channels):
    before = torch.full((5, 4, channels, 8, 8), -1.0)
    after = before.clone()
    after[3] = 0.0
    report.before_after(tmp_path / "a.png", before, after, [3], CLASSES)
    pixels = _pixels(tmp_path / "a.png")
    assert 600 < pixels.shape[1] < 3000
    assert 300 < pixels.shape[0] < 3000
    framed = _rows_with(pixels, (0xD5, 0x5E, 0x00))
    grey = _rows_with(pixels, (128, 128, 128))
    assert framed.min() < grey.min() < grey.max() < framed.max()
    assert 0.6 < grey.mean() / len(pixels) < 0.85  # the fourth row of five


def test_before_after_refuses_pictures_that_do_not_fit(tmp_path):
    images = torch.zeros(5, 4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"\(5, samples, C, H, W\)"):
        report.before_after(tmp_path / "a.png", images, images[:4], [3], CLASSES)
    assert not list(tmp_path.iterdir())


def test_saliency_grows_with_the_network_and_keeps_its_order(tmp_path):
    heights = []
    for layers in (3, 50):
        shares = {f"block.{i}.{own}": 0.5 for i in range(layers) for own in ("weight", "bias")}
        report.saliency(tmp_path / "s.png", {"masked": shares, "random": shares})
        heights.append(len(_pixels(tmp_path / "s.png")))
    assert heights[0] < heights[1] < 3000
    shares = {"a.bias": 1.0, "a.weight": 0.25, "b.bias": 0.75, "weight": 0.5}
    assert report._by_layer(shares) == {"a": 0.25, "b": 0.75, "": 0.5}


def test_curves_are_drawn(tmp_path):
    report.curves(tmp_path / "c.png", _curves())
    assert _pixels(tmp_path / "c.png").shape[:2] == (1260, 1350)


def test_table_has_a_line_for_each_run():
    lines = report.table(_metrics()).splitlines()
    assert [line.split()[0] for line in lines] == ["run", "------", "before", "masked", "random", "dense"]
    assert "98.7% [96.1%, 99.6%]" in lines[3]
    assert "34,750" in lines[3]
    assert "97% / 91%" in lines[3]
    assert "–" in lines[4]


class _Checker(HTMLParser):
    """Every tag that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_one_valid_page_of_its_own(tmp_path):
    images = torch.rand(5, 4, 1, 8, 8) * 2 - 1
    shares = {"masked": {"a.weight": 0.3}, "random": {"a.weight": 0.2}}
    report.write_report(tmp_path, _metrics(), images, images, _curves(), shares, CLASSES)
    names = {"before_after.png", "curves.png", "saliency.png", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == names
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    assert len(checker.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in checker.sources)
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?https?:""", page)
    for text in ("98.7% [96.1%, 99.6%]", "97.4%", "1.23", "34,750", "25.0%", "class 3", "draw 1"):
        assert text in page, text
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_missing_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ImportError, match=r"pip install pecker_fast\[demo\]"):
        report.curves(tmp_path / "c.png", _curves())
