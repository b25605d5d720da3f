"""``pecker-fast delta`` on pipeline folders: the UNet's weights change, the scheduler if it must, nothing else."""

import hashlib
import json
import shutil

import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from pipelines import write_pipeline
from safetensors.torch import load_file
from test_cli import _error
from test_delta import halves, moved, same
from test_sid_lsg import SMALL

from pecker_fast import Delta
from pecker_fast.cli import main
from pecker_fast.models.one_step_scheduler import one_step_scheduler
from pecker_fast.models.pipeline_files import SCHEDULER
from pecker_fast.models.pipeline_scheduler import PipelineScheduler
from pecker_fast.models.storage import WEIGHTS_NAME
from pecker_fast.schedule import NoiseSchedule
from pecker_fast.written import NAME

OURS = {"unet/pecker_deltas.json", "config.yaml", NAME}
WEIGHTS = f"unet/{WEIGHTS_NAME}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines base, after_a and after_b, the latter two changed under masks without a block in common, and deltas."""
    root = tmp_path_factory.mktemp("pipelines")
    base = write_pipeline(root / "base")
    (base / "README.md").write_text("a card")
    unet = UNet2DConditionModel(**SMALL)
    unet.save_pretrained(base / "unet")
    _pad_header(base / WEIGHTS)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        for name, mask in zip("ab", halves(unet), strict=True):
            mask.save(f"{name}.safetensors")
            shutil.copytree("base", f"after_{name}")
            moved(unet, mask).save_pretrained(f"after_{name}/unet")
            extract(name)
    return root


@pytest.fixture
def here(folders, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _pad_header(file):
    """As another version of safetensors would write it: the same tensors, another file."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    file.write_bytes((size + 64).to_bytes(8, "little") + data[8 : 8 + size] + b" " * 64 + data[8 + size :])


def _one_step(pipeline):
    """Another scheduler, as unlearning into one step leaves it."""
    schedule = NoiseSchedule.scaled_linear()
    scheduler = one_step_scheduler(schedule, 625)
    scheduler.save_pretrained(pipeline / "scheduler")
    assert PipelineScheduler.of(scheduler).config == (pipeline / SCHEDULER).read_text()
    index = (pipeline / "model_index.json").read_text()
    (pipeline / "model_index.json").write_text(index.replace("DDIMScheduler", "EulerDiscreteScheduler"))


def delta(action, *arguments):
    return main(["delta", action, *map(str, arguments), "--quiet"])


def extract(name):
    given = ("--before", "base", "--after", f"after_{name}", "--mask_path", f"{name}.safetensors")
    assert delta("extract", *given, "--output_dir", f"d{name}", "--overwrite") == 0


def switch(action, model, names, output):
    return delta(action, "--model", model, "--delta", *names, "--output_dir", output)


def hashes(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def same_but_ours(one, other):
    one, other = (
        {name: value for name, value in hashes(folder).items() if name not in OURS} for folder in (one, other)
    )
    return one == other


def test_applied_and_reverted_bit_for_bit(here):
    before = hashes(here / "base")
    assert switch("apply", "base", ["da"], "edited") == 0
    assert hashes(here / "base") == before
    after = hashes(here / "edited")
    assert {name for name in before if after.get(name) != before[name]} == {WEIGHTS}
    assert set(after) - set(before) == OURS
    assert same(load_file(here / "edited" / WEIGHTS), load_file(here / "after_a" / WEIGHTS))
    assert "scheduler" not in Delta.load("da").metadata
    assert switch("revert", "edited", ["da"], "back") == 0
    assert same_but_ours(here / "back", here / "base")


def test_two_deltas_in_any_order(here):
    assert switch("apply", "base", ["da", "db"], "ab") == 0
    assert switch("apply", "base", ["db", "da"], "ba") == 0
    assert same_but_ours(here / "ab", here / "ba")
    assert switch("revert", "ab", ["da"], "only_b") == 0
    assert same(load_file(here / "only_b" / WEIGHTS), load_file(here / "after_b" / WEIGHTS))
    assert switch("revert", "only_b", ["db"], "none") == 0
    assert same_but_ours(here / "none", here / "base")


def test_a_one_step_result_takes_its_scheduler_along(here, capsys):
    _one_step(here / "after_a")
    extract("a")
    assert main("delta apply --model base --delta da --output_dir edited --json --quiet".split()) == 0
    assert json.loads(capsys.readouterr().out)["scheduler"] == "EulerDiscreteScheduler"
    for name in ("scheduler/scheduler_config.json", "model_index.json"):
        assert (here / "edited" / name).read_bytes() == (here / "after_a" / name).read_bytes()
    pipeline = StableDiffusionPipeline.from_pretrained("edited", local_files_only=True)
    pipeline.scheduler.set_timesteps(1)
    assert pipeline.scheduler.timesteps.tolist() == [625]
    assert switch("revert", "edited", ["da"], "back") == 0
    assert same_but_ours(here / "back", here / "base")


def test_a_scheduler_of_ones_own_is_never_lost(here, capsys):
    _one_step(here / "after_a")
    extract("a")
    config = here / "base" / "scheduler" / "scheduler_config.json"
    own = config.read_text().replace("0.012", "0.013")
    config.write_text(own)
    assert switch("apply", "base", ["da"], "edited") == 3
    assert "the pipeline has DDIMScheduler of 1000 timesteps, which would be lost" in _error(capsys, "delta")
    assert not (here / "edited").exists()
    assert switch("revert", "after_a", ["da"], "back") == 0
    (here / "after_a" / "scheduler" / "scheduler_config.json").write_text(own)
    assert switch("revert", "after_a", ["da"], "again") == 0
    assert (here / "again" / "scheduler" / "scheduler_config.json").read_text() == own


@pytest.mark.parametrize(
    "metadata", [{"generation": {"kind": "one_step", "t_init": 625}}, {"one_step": True, "t_init": 625}]
)
def test_a_one_step_delta_that_does_not_know_its_scheduler(metadata, here, capsys):
    """As the erasure of a one-step generator leaves it: fine for that generator's folder, refused for a teacher's."""
    known = Delta.load("da")
    known.metadata.update(metadata)
    shutil.rmtree("da")
    known.save("da")
    assert switch("apply", "base", ["da"], "edited") == 3
    assert "draws in one step from timestep 625, and the pipeline has DDIMScheduler" in _error(capsys, "delta")
    _one_step(here / "base")
    assert switch("apply", "base", ["da"], "edited") == 0
    assert switch("revert", "edited", ["da"], "back") == 0
    assert same_but_ours(here / "back", here / "base")


def test_a_variant_alone_is_the_model(here):
    for folder in ("base", "after_a"):
        (here / folder / WEIGHTS).rename(here / folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert switch("apply", "base", ["da"], "edited") == 0
    assert switch("revert", "edited", ["da"], "back") == 0
    assert same_but_ours(here / "back", here / "base")


def _sharded(base):
    (base / WEIGHTS).rename(base / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors")
    shutil.copy(base / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors", base / "unet" / "x.safetensors")


def _pickled(base):
    (base / WEIGHTS).rename(base / "unet" / "diffusion_pytorch_model.bin")


def _transformer(base):
    index = base / "model_index.json"
    index.write_text(index.read_text().replace("UNet2DConditionModel", "FluxTransformer2DModel"))


def _other_base(base):
    data = bytearray((base / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (base / WEIGHTS).write_bytes(data)


def _no_scheduler(base):
    (base / "scheduler" / "scheduler_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_sharded, "got 2 files; save the model again"),
        (_pickled, "got 0 files; save the model again with safe_serialization=True"),
        (_transformer, "expected a unet of class UNet2DConditionModel, got 'FluxTransformer2DModel'"),
        (_other_base, "base and da: the"),
        (_no_scheduler, "scheduler_config.json: no such file; the pipeline is not complete"),
    ],
)
def test_what_does_not_fit_is_refused(damage, text, here, capsys):
    damage(here / "base")
    assert switch("apply", "base", ["da"], "edited") == 3
    assert text in _error(capsys, "delta")
    assert not (here / "edited").exists()


def test_the_model_itself_is_not_written_to(here, capsys):
    (here / "base" / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"of the base")
    before = hashes(here / "base")
    for folder in ("base", "base/unet", "base/edited", "."):
        assert switch("apply", "base", ["da"], folder) == 3
        assert "which is only read and must stay as it is" in _error(capsys, "delta")
    assert hashes(here / "base") == before
    assert switch("apply", "base", ["da"], "edited") == 0
    assert [path.name for path in (here / "edited" / "unet").glob("*.safetensors")] == [WEIGHTS_NAME]
