"""Pictures as people have them: grey among colour, turned by EXIF, in other formats; the same in every reader."""

import io
import itertools

import image_sets
import numpy as np
import pytest
import torch

from pecker_fast.data import load_dataset, load_image_folder, pictures
from pecker_fast.errors import FileFormatError

Image = pytest.importorskip("PIL.Image")
pq = pytest.importorskip("pyarrow.parquet")
import pyarrow as pa  # noqa: E402

SIDE = 6
GREY, COLOUR = image_sets.random_pixels(1, SIDE, 1)[0], image_sets.random_pixels(1, SIDE)[0]
# Blocks of one colour, so that JPEG and WebP keep them: bright at the upper left, red at the upper right.
MARKED = np.zeros((3, 32, 32), np.uint8)
MARKED[:, :16, :16], MARKED[0, :16, 16:] = 255, 255


def _encoded(pixels, format="PNG", mode=None, **how):
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    stream = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(stream, format, **how)
    return stream.getvalue()


def _as_folder(root, files):
    (root / "a").mkdir(parents=True)
    for index, content in enumerate(files):
        (root / "a" / f"{index:03}.png").write_bytes(content)
    return root


def _as_parquet(root, files):
    root.mkdir()
    half = -(-len(files) // 2)
    for number, part in enumerate((files[:half], files[half:])):
        table = {"image": [{"bytes": content, "path": None} for content in part], "label": [0] * len(part)}
        if part:
            pq.write_table(pa.table(table), root / f"train-{number}.parquet")
    return root


def _as_splits(root, files):
    half = -(-len(files) // 2)
    _as_folder(root / "train", files[:half])
    if files[half:]:
        _as_folder(root / "test", files[half:])
    return root


READERS = {"folder": _as_folder, "parquet": _as_parquet, "folders of splits": _as_splits}


def _read(root):
    return ((load_dataset(root, split="all").images + 1) * 127.5).round().byte().numpy()


MODES = {
    "grey": (_encoded(GREY), 1, GREY),
    "1 bit": (_encoded(GREY, mode="1"), 1, None),
    "grey with alpha": (_encoded(GREY, mode="LA"), 1, GREY),
    "colour": (_encoded(COLOUR), 3, COLOUR),
    "colour with alpha": (_encoded(COLOUR, mode="RGBA"), 3, COLOUR),
    "palette": (_encoded(MARKED[:, 8:24, 8:24][:, 5:11, 5:11], mode="P"), 3, MARKED[:, 8:24, 8:24][:, 5:11, 5:11]),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("one", "other"), list(itertools.product(MODES, repeat=2)))
def test_one_picture_in_colour_makes_all_so_whichever_comes_first(tmp_path, reader, one, other):
    found = _read(READERS[reader](tmp_path / "x", [MODES[one][0], MODES[other][0]]))
    channels = max(MODES[one][1], MODES[other][1])
    assert found.shape == (2, channels, SIDE, SIDE)
    for got, (_, _, pixels) in zip(found, (MODES[one], MODES[other]), strict=True):
        if pixels is not None:
            assert np.array_equal(got, np.broadcast_to(pixels, got.shape))
        else:
            assert set(np.unique(got)) <= {0, 255}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (_encoded(GREY.astype(np.uint16) << 8), "I;16"),
        (_encoded(COLOUR, "JPEG", mode="CMYK"), "CMYK"),
        (_encoded(GREY, "TIFF", mode="F"), "F"),
    ],
)
def test_what_pillow_would_reinterpret_is_refused_by_name_in_every_reader(tmp_path, reader, content, mode):
    with pytest.raises(FileFormatError, match=rf"expected 8-bit grey or RGB, got mode '{mode}"):
        load_dataset(READERS[reader](tmp_path / "x", [_encoded(GREY), content]), split="all")


def test_headers_are_looked_at_up_to_the_first_in_colour(tmp_path, monkeypatch):
    looked, decoded = [], []
    shape_of, decode = pictures.shape_of, pictures.decode
    monkeypatch.setattr(pictures, "shape_of", lambda *a: (looked.append(a), shape_of(*a))[1])
    monkeypatch.setattr(pictures, "decode", lambda *a: (decoded.append(a), decode(*a))[1])
    for reader, write in READERS.items():
        looked.clear(), decoded.clear()
        _read(write(tmp_path / reader, [_encoded(GREY), _encoded(COLOUR), *[_encoded(COLOUR)] * 2]))
        assert len(decoded) == 4 and len(looked) <= 3


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_pictures_are_upright_as_exif_says(tmp_path, reader, orientation, format):
    stored = {  # how a camera stores the marked picture under each orientation
        1: lambda x: x,
        2: lambda x: x[:, :, ::-1],
        3: lambda x: x[:, ::-1, ::-1],
        4: lambda x: x[:, ::-1],
        5: lambda x: x.swapaxes(1, 2),
        6: lambda x: np.rot90(x, 1, (1, 2)),
        7: lambda x: x.swapaxes(1, 2)[:, ::-1, ::-1],
        8: lambda x: np.rot90(x, -1, (1, 2)),
    }[orientation](MARKED)
    how = {"quality": 100} if format in ("JPEG", "WEBP") else {}
    content = _encoded(np.ascontiguousarray(stored), format, exif=_exif(orientation), **how)
    (found,) = _read(READERS[reader](tmp_path / "x", [content]))
    assert np.array_equal(found[:, 4:28:8, 4:28:8] > 127, MARKED[:, 4:28:8, 4:28:8] > 127)


def test_upright_in_a_plain_image_folder_too(tmp_path):
    content = _encoded(np.ascontiguousarray(np.rot90(MARKED, 1, (1, 2))), exif=_exif(6))
    data = load_image_folder(_as_folder(tmp_path / "x", [content]), image_size=32)
    assert torch.equal(data.images[0] > 0, torch.from_numpy(MARKED > 127))


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("x.webp", "WEBP"),
        ("x.bmp", "BMP"),
        ("x.gif", "GIF"),
        ("x.tif", "TIFF"),
        ("x.TIFF", "TIFF"),
        ("x.JPEG", "JPEG"),
        ("x.JPG", "JPEG"),
        ("x.Png", "PNG"),
        ("x.ppm", "PPM"),
        ("x.jpg", "PNG"),  # what it is, its content says
    ],
)
def test_every_usual_format_is_read(tmp_path, name, format):
    how = {"lossless": True} if format == "WEBP" else {"quality": 100} if format == "JPEG" else {}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(_encoded(MARKED, format, **how))
    found = _read(tmp_path)
    assert found.shape == (1, 3, 32, 32)
    assert np.abs(found[0].astype(int) - MARKED)[:, 4:28:8, 4:28:8].max() <= 8


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_an_animation_the_first_picture_is_read(tmp_path, format):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (255, 0, 0)]
    stream = io.BytesIO()
    how = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(stream, format, save_all=True, append_images=frames[1:], **how)
    found = _read(_as_folder(tmp_path / "x", [stream.getvalue()]))
    assert found.shape[2:] == (8, 8) and found.min() == 255


def test_transparency_is_dropped_without_a_warning(tmp_path, recwarn):
    image = Image.fromarray(MARKED.transpose(1, 2, 0)).quantize(4)
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=bytes([0, 128, 255, 0]))
    found = _read(_as_folder(tmp_path / "x", [stream.getvalue(), _encoded(MARKED)]))
    assert np.array_equal(found[0], found[1])
    assert not recwarn.list


def test_what_is_left_out_is_counted_and_named(tmp_path):
    image_sets.folder(tmp_path, image_sets.random_pixels(3, SIDE), [0, 1, 1], "ab")
    assert load_dataset(tmp_path).notes == ()
    for name in (".DS_Store", "._0000.png"):
        (tmp_path / "a" / name).write_bytes(b"")
    (tmp_path / "__MACOSX").mkdir()
    assert load_dataset(tmp_path).notes == ()  # nobody put these there on purpose
    for name in ("a/1.heic", "b/2.HEIC", "b/3.heic"):
        (tmp_path / name).write_bytes(b"")
    assert load_dataset(tmp_path).notes == ("left out 3 files: .heic",)
    (tmp_path / "b" / "deeper").mkdir()
    (tmp_path / "b" / "labels").write_text("")
    notes = load_dataset(tmp_path).notes
    assert notes == ("left out 5 files: .heic (3), folders (1), without an ending (1)",)
    (tmp_path / "x.jpg").write_bytes(b"")
    assert load_dataset(tmp_path, limit=1).subset(torch.tensor([0])).notes == (
        "left out beside the class folders: pictures (1)",
        *notes,
    )


def test_a_class_of_nothing_readable_says_what_lies_there(tmp_path):
    image_sets.folder(tmp_path, image_sets.random_pixels(1, SIDE), [0], "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.heic").write_bytes(b"")
    with pytest.raises(FileFormatError, match=r"b: holds no \.png.*left out 1 file: \.heic"):
        load_dataset(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what it skips
def test_damaged_exif_is_refused_by_name_or_ignored_and_never_crashes(tmp_path):
    content = _encoded(MARKED, "JPEG", exif=_exif(6))
    begin = content.index(b"Exif")
    for byte in range(6, 66):
        damaged = bytearray(content)
        damaged[begin + byte] ^= 0xFF
        try:
            load_dataset(_as_folder(tmp_path / str(byte), [bytes(damaged)]))
        except FileFormatError as error:
            assert "000.png" in str(error)
