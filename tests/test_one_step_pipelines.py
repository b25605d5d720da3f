"""Which pipelines are one-step generators: one answer for drawing, training and deltas."""

import json

import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, StableDiffusionPipeline
from pipelines import write_pipeline

from pecker_fast.cli import main
from pecker_fast.concept_draws import check_pipeline, sampling_of
from pecker_fast.concepts import PipelineFolder
from pecker_fast.models.one_step_scheduler import T_INIT_MARK, betas_of, one_step_scheduler, one_step_t_init
from pecker_fast.models.pipeline_scheduler import PipelineScheduler
from pecker_fast.schedule import NoiseSchedule

SETTINGS = "scheduler/scheduler_config.json"
SCHEDULE = NoiseSchedule.scaled_linear()
BETAS = betas_of(SCHEDULE)
BY_NAME = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "base")


def give(base, scheduler, *, marked=True):
    """The pipeline with this scheduler, as an older folder of ours has it if it is not marked."""
    config = json.loads(scheduler.to_json_string())
    if not marked:
        config.pop(T_INIT_MARK, None)
    (base / SETTINGS).write_text(json.dumps(config))
    index = json.loads((base / "model_index.json").read_text())
    entry = {"scheduler": ["diffusers", type(scheduler).__name__]}
    (base / "model_index.json").write_text(json.dumps(index | entry))
    return base


def answers(folder):
    """What each reader takes it for: a timestep, or None where it takes many steps."""
    t_init = PipelineFolder.read(folder).t_init
    drawn = check_pipeline(folder)
    steps = sampling_of(drawn)
    assert drawn.one_step == (t_init is not None)
    assert (steps.num_inference_steps, steps.guidance_scale) == ((1, 0.0) if drawn.one_step else (50, 7.5))
    scheduler = PipelineScheduler.read(folder)
    assert [t for t in (3, 499, 625, 999) if scheduler.is_one_step(t)] == ([] if t_init is None else [t_init])
    return t_init


def euler(**settings):
    return EulerDiscreteScheduler(**{"timestep_spacing": "trailing", "steps_offset": 1} | settings)


@pytest.mark.parametrize(
    "scheduler",
    [
        euler(trained_betas=BETAS, num_train_timesteps=1000),
        euler(trained_betas=[*BETAS, *BETAS[-1:]], num_train_timesteps=1001),
        DDIMScheduler(trained_betas=BETAS, num_train_timesteps=1000, timestep_spacing="trailing"),
        euler(**BY_NAME),  # Lightning and Turbo
        euler(**BY_NAME, timestep_spacing="linspace"),
        euler(trained_betas=BETAS[:626], num_train_timesteps=626, timestep_spacing="linspace"),
        LCMScheduler(**BY_NAME),
        LCMScheduler(trained_betas=BETAS, timestep_spacing="trailing"),
    ],
)
def test_schedulers_of_many_steps(scheduler, base):
    assert answers(give(base, scheduler)) is None


@pytest.mark.parametrize("t_init", [3, 499, 625, 999])
@pytest.mark.parametrize("marked", [True, False])
def test_ours_are_known_with_and_without_the_mark(t_init, marked, base):
    found = answers(give(base, one_step_scheduler(SCHEDULE, t_init), marked=marked))
    assert found == (None if t_init == 999 and not marked else t_init)  # whole betas are told by the mark alone


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DDIMScheduler])
def test_the_mark_lives_through_diffusers(kind, base, tmp_path, caplog):
    folder = give(base, one_step_scheduler(SCHEDULE, 999))
    loaded = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    loaded.scheduler = kind.from_config(loaded.scheduler.config)
    loaded.save_pretrained(tmp_path / "again")
    assert answers(tmp_path / "again") == 999
    assert not [record for record in caplog.records if T_INIT_MARK in record.getMessage()]


def test_a_mark_that_is_not_of_these_betas_says_nothing():
    """As where somebody makes a scheduler of many steps from the config of ours."""
    config = dict(one_step_scheduler(SCHEDULE, 625).config)
    assert one_step_t_init(config) == 625
    assert one_step_t_init(config | {"trained_betas": None}) is None
    assert one_step_t_init(config | {"trained_betas": BETAS, "num_train_timesteps": 1000}) is None
    assert one_step_t_init(config | {"timestep_spacing": "leading"}) is None


def test_a_short_schedule_of_many_steps_is_told_by_hand(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    give(base, euler(trained_betas=BETAS[:500], num_train_timesteps=500))
    flags = ("--method", "esd", "--erase_concept", "cat", "--output_dir", "out", "--device", "cpu", "--dry_run")
    command = ["unlearn", "--pretrained_model_name_or_path", str(base), *flags]
    assert main(command) == 3
    assert f'write "{T_INIT_MARK}": null into scheduler' in capsys.readouterr().err
    config = json.loads((base / SETTINGS).read_text())
    (base / SETTINGS).write_text(json.dumps(config | {T_INIT_MARK: None}))
    assert answers(base) is None


@pytest.mark.parametrize("betas", [[], "0.1", None, 5])
def test_betas_that_are_none_are_no_generators(betas):
    assert one_step_t_init({"trained_betas": betas, "timestep_spacing": "trailing"}) is None
