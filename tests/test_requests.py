"""Distil once, then one short masked run for each request: cached, disjoint, stacked, reverted, ended by a rule."""

import itertools
import json
import shutil

import pytest
import torch
from test_cli import DDIM, _error, _one_thread, _tiny  # noqa: F401

from pecker_fast import BlockMask, Delta, MaskedDistiller, digits_task, distilled, models, step_metrics
from pecker_fast.checkpoint import read_safetensors
from pecker_fast.cli import main
from pecker_fast.demo import DemoConfig
from pecker_fast.models import DigitsClassifier
from pecker_fast.written import NAME

TRAINING = ("--train_batch_size", "4", "--generator_lr", "1e-3", "--t_init", "500", "--quiet")
SHORT = ("--max_train_steps", "2", "--forget_batch_size", "4", "--mask_batches", "2", "--block", "row", "--quiet")
MASK = ("--mask_density", "0.2")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher, what was distilled from it, and three requests that add up."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        models.save(_tiny(dropout=0.2), folder / "teacher", DDIM)
        assert distill() == 0
        assert request(3, "three", "--override_class", "8") == 0
        assert request(5, "five", "--override_class", "6", "--earlier", "three") == 0
        assert request(8, "eight", "--override_class", "1", "--earlier", "three", "five", "--mask", "random") == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of that to work in."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def distill(*more):
    source = ("--pretrained_model_name_or_path", "teacher", "--output_dir", "distilled", "--max_train_steps", "2")
    return main(["distill", *source, *TRAINING, *more])


def request(label, output, *more):
    source = ("--pretrained_model_name_or_path", "teacher", "--init", "distilled", "--output_dir", output)
    return main(["unlearn", *source, "--forget_class", *str(label).split(), *SHORT, *MASK, *more])


def weights(folder):
    return read_safetensors(folder / "diffusion_pytorch_model.safetensors")[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- stage one -------------------------------------------------------------------------------------


def test_what_is_distilled(made):
    assert {path.name for path in (made / "distilled").iterdir()} == {
        "model",
        "fake_score",
        "distill_config.json",
        "distilled.json",
        "metrics.jsonl",
        "config.yaml",
        NAME,
    }
    assert models.load_config(made / "distilled" / "model")["generation"]["kind"] == "one_step"
    assert models.load_config(made / "distilled" / "fake_score")["generation"]["kind"] == "ddim"
    found = distilled.load(made / "distilled")
    assert found.config.forget == () and found.config.mask.kind == "dense" and found.config.batch_size == 4
    teacher = weights(made / "teacher")
    for name in ("model", "fake_score"):
        assert not same(weights(made / "distilled" / name), teacher)


def test_distilling_is_what_the_distiller_does(made):
    found = distilled.load(made / "distilled")
    teacher = models.load(made / "teacher").to(memory_format=torch.channels_last)
    schedule = digits_task.SCHEDULE
    torch.manual_seed(0)
    distiller = MaskedDistiller(teacher, schedule, found.config)
    for _ in range(2):
        distiller.step()
    with distiller.averaged() as generator:
        untrained = {name: weight.clone() for name, weight in generator.state_dict().items()}
    moved = [(weights(made / "distilled" / "model")[name] - weight).abs().max() for name, weight in untrained.items()]
    assert max(moved) < 1e-2  # dropout alone tells them apart


def test_the_same_again_returns_at_once(here, capsys, monkeypatch):
    monkeypatch.setattr(MaskedDistiller, "step", lambda *_: pytest.fail("trained again"))
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert distill("--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["cached"] is True and values["seconds"] > 0
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        (["--seed", "1"], 2, "was distilled with config.seed = 0, asked for is 1"),
        (["--max_train_steps", "3"], 2, "max_train_steps = 2, asked for is 3"),
        (["--preset", "published"], 2, "config.preset = 'exact', asked for is 'published'"),
        (["--stop_gradient", "on"], 2, "config.stop_gradient = False, asked for is True"),
        ("teacher", 2, "with true_score = "),
        ("generator", 3, "the weights of its generator are not those that were distilled"),
        ("record", 3, "distilled.json: truncated or not JSON"),
        ("other", 3, "holds a result of distill already"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(change, code, text, here, capsys):
    if change == "teacher":
        models.save(_tiny(dropout=0.1).requires_grad_(False), here / "teacher", DDIM, overwrite=True)
        torch.manual_seed(1)
        network = models.load(here / "teacher")
        network.conv_in.weight.data.add_(1)
        models.save(network, here / "teacher", DDIM, overwrite=True)
    elif change == "generator":
        generation = models.load_config(here / "distilled" / "model")["generation"]
        shutil.rmtree(here / "distilled" / "model")
        models.save(models.load(here / "teacher"), here / "distilled" / "model", generation)
    elif change == "record":
        (here / "distilled" / "distilled.json").write_text("{")
    elif change == "other":
        (here / "distilled" / "distilled.json").unlink()
    assert distill(*(change if isinstance(change, list) else [])) == code
    assert text in _error(capsys, "distill")


def test_interrupted_distilling_goes_on(here, capsys):
    shutil.move(here / "distilled", here / "whole")
    half = ("--checkpointing_steps", "1")
    torch.manual_seed(0)
    assert distill(*half, "--max_train_steps", "1") == 0
    shutil.move(here / "distilled" / "checkpoint-1", here / "checkpoint-1")
    shutil.rmtree(here / "distilled")
    assert distill("--resume_from_checkpoint", "checkpoint-1") == 0
    torch.manual_seed(0)
    shutil.rmtree(here / "whole")
    resumed = {name: weights(here / "distilled" / name) for name in ("model", "fake_score")}
    shutil.rmtree(here / "distilled")
    assert distill() == 0
    for name, found in resumed.items():
        assert same(found, weights(here / "distilled" / name))


def test_digits_are_distilled_once(tmp_path, monkeypatch):
    teacher = _tiny(dropout=0.2)
    monkeypatch.setattr(digits_task, "load_teacher", lambda *_: teacher)
    monkeypatch.setattr(digits_task, "DISTILLED", distilled_settings())
    before = torch.get_rng_state()
    first = digits_task.load_distilled(tmp_path, progress=False, short=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)  # another state of the caller's, and the same weights
    for ours, theirs in zip(first, digits_task.load_distilled(tmp_path / "new", False, True), strict=True):
        assert same(ours.state_dict(), theirs.state_dict())
    shutil.rmtree(tmp_path / "new")
    monkeypatch.setattr(MaskedDistiller, "step", lambda *_: pytest.fail("trained again"))
    again = digits_task.load_distilled(tmp_path, progress=False, short=True)
    for ours, theirs in zip(first, again, strict=True):
        assert same(ours.state_dict(), theirs.state_dict()) and not ours.training
    (folder,) = tmp_path.iterdir()
    assert distilled.load(folder).record["max_train_steps"] == 8


def distilled_settings():
    return distilled.DistillConfig.from_dict(digits_task.DISTILLED.to_dict() | {"batch_size": 4})


def test_digits_are_distilled_as_the_demonstration_does():
    demo, own = DemoConfig().distill_config("dense").to_dict(), digits_task.DISTILLED.to_dict()
    forgetting = {"forget", "override", "mask", "forget_batch_size", "forget_weight"}
    assert {name for name in own if own[name] != demo[name]} == forgetting
    assert own["mask"]["kind"] == "dense"


# -- requests --------------------------------------------------------------------------------------


def test_a_request_is_a_delta_against_what_was_distilled(made):
    base = models.load(made / "distilled" / "model")
    Delta.load(made / "three" / "delta").apply(base, progress=False)
    assert same(base.state_dict(), weights(made / "three" / "model"))
    assert not same(weights(made / "three" / "model"), weights(made / "distilled" / "model"))


def test_deltas_are_disjoint_apply_in_any_order_and_revert_one_by_one(made):
    names = ("three", "five", "eight")
    deltas = {name: Delta.load(made / name / "delta") for name in names}
    assert not any(a.overlaps(b) for a, b in itertools.combinations(deltas.values(), 2))
    base = weights(made / "distilled" / "model")
    for order in itertools.permutations(names):
        model = models.load(made / "distilled" / "model")
        for name in order:
            deltas[name].apply(model, progress=False)
        assert same(model.state_dict(), weights(made / "eight" / "model"))
        for count, name in enumerate(order, 1):
            deltas[name].revert(model, progress=False)
            left = models.load(made / "distilled" / "model")
            for other in order[count:]:
                deltas[other].apply(left, progress=False)
            assert same(model.state_dict(), left.state_dict())
        assert same(model.state_dict(), base)


def test_each_delta_is_of_its_request_alone(made):
    for name, before in (("five", "three"), ("eight", "five")):
        delta, after = Delta.load(made / name / "delta"), weights(made / name / "model")
        assert delta.mask.density <= 0.2
        model = models.load(made / before / "model")
        delta.apply(model, progress=False)
        assert same(model.state_dict(), after)
    ledger = models.load(made / "eight" / "model")._pecker_deltas
    assert [entry["name"] for entry in ledger["deltas"]] == ["forget 3", "forget 5, 3", "forget 8, 3, 5"]


def test_earlier_classes_stay_forgotten(made):
    """And what took the place of 3 is forgotten now, so that 3 becomes what takes its place."""
    config = json.loads((made / "five" / "distill_config.json").read_text())
    assert (config["forget"], config["override"]) == ([5, 3], [6, 8])
    config = json.loads((made / "eight" / "distill_config.json").read_text())
    assert (config["forget"], config["override"]) == ([8, 3, 5], [1, 1, 6])
    record = json.loads((made / "eight" / "request.json").read_text())
    assert (record["forget"], record["override"], record["earlier"]) == ([8], [1], ["three", "five"])


def test_settings_not_given_are_those_of_the_distillation(here, capsys):
    assert request(3, "out", "--dry_run", "--json", "--generator_lr", "2e-3") == 0
    values = json.loads(capsys.readouterr().out)
    settings = values["settings"]
    assert (settings["batch_size"], settings["t_init"], settings["generator_lr"]) == (4, 500, 2e-3)
    assert settings["forget_batch_size"] == 4 and settings["preset"] == "exact"
    assert "out/request.json" in values["would_write"] and not (here / "out").exists()


def test_a_mask_of_a_file_is_checked_against_earlier_ones(here, capsys):
    assert request(5, "out", "--earlier", "three", "--mask_path", "three/mask.safetensors") == 2
    assert "that three changed" in _error(capsys, "unlearn")
    BlockMask.random(_tiny(width=8), 0.2).save(here / "wide")
    for more in ((), ("--dry_run",)):
        assert request(5, "out", "--earlier", "three", "--mask_path", "wide", "--override_class", "6", *more) == 3
        assert "wide: does not fit teacher: the mask was not made for this DDPMUNet" in _error(capsys, "unlearn")
    assert request(5, "out", "--earlier", "three", "--mask_path", "five/mask.safetensors", "--override_class", "6") == 0


def test_a_request_that_is_interrupted_goes_on(here):
    def run(output, *more):
        torch.manual_seed(0)
        return request(5, output, "--earlier", "three", "--override_class", "6", "--max_train_steps", "4", *more)

    assert run("whole") == 0
    assert run("half", "--max_train_steps", "2", "--checkpointing_steps", "2") == 0
    assert run("half", "--resume_from_checkpoint", "latest") == 0
    assert same(weights(here / "half" / "model"), weights(here / "whole" / "model"))


@pytest.mark.parametrize(
    ("label", "more", "code", "text"),
    [
        (5, "--init three", 3, "three: has no distilled.json"),
        (5, "--init nowhere", 3, "nowhere: has no distilled.json"),
        (5, "--earlier nowhere", 3, "nowhere/delta"),
        (5, "--earlier three three", 3, "three/delta: "),
        (3, "--earlier three --override_class 1", 2, "class 3 is forgotten already by three"),
        (5, "--earlier three", 2, "give it for all of the requests that add up or for none"),
        (5, "--earlier three --override_class 3", 2, "class 3 is forgotten by an earlier request"),
        (5, "--earlier three --override_class 6 7", 2, "or one for each of the 1 forgotten, got 2"),
        (5, "--earlier three --override_class 6 --mask dense", 2, "trains every weight, those of --earlier too"),
        ("1 1", "--earlier three --override_class 2", 2, "class is named twice in (1, 1)"),
        ("1 1", "--earlier three --override_class 2 4", 2, "class is named twice in (1, 1)"),
        ("1 1", "--override_class 2 4", 2, "class is named twice in (1, 1)"),
        (5, "--t_init 440", 2, "the generator of distilled starts at 500; leave it out"),
    ],
)
def test_what_does_not_go_together(label, more, code, text, here, capsys):
    before = {path for path in here.rglob("*")}
    assert request(label, "out", *more.split()) == code
    assert text in _error(capsys, "unlearn")
    assert {path for path in here.rglob("*")} == before


def test_a_request_from_another_model_or_distillation(here, capsys):
    teacher = models.load(here / "teacher")
    teacher.conv_in.weight.data.add_(1)
    models.save(teacher, here / "teacher", DDIM, overwrite=True)
    assert request(5, "out") == 3
    assert "distilled: was distilled from another model than teacher: its true score" in _error(capsys, "unlearn")
    shutil.rmtree(here / "distilled")
    assert distill() == 0
    assert request(5, "out", "--earlier", "three", "--override_class", "6") == 3
    assert "three/delta: " in _error(capsys, "unlearn")


def test_a_record_of_another_run_is_refused_and_none_is_needed(here, capsys):
    """The record stays where another run replaces what it is of; a folder of ``MaskedDistiller.save`` has none."""
    shutil.copyfile(here / "five" / "request.json", here / "three" / "request.json")
    assert request(5, "out", "--earlier", "three", "--override_class", "6") == 3
    assert "three/request.json: is of another run than the delta beside it" in _error(capsys, "unlearn")
    (here / "three" / "request.json").unlink()
    assert request(5, "out", "--earlier", "three", "--override_class", "6") == 0
    assert json.loads((here / "out" / "distill_config.json").read_text())["forget"] == [5, 3]


def test_earlier_needs_init(here, capsys):
    source = ("--pretrained_model_name_or_path", "teacher", "--forget_class", "5", "--output_dir", "out")
    assert main(["unlearn", *source, "--earlier", "three"]) == 2
    assert "give --init too" in _error(capsys, "unlearn")


def test_a_record_with_a_class_twice_is_damaged(here, capsys):
    record = here / "three" / "request.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"forget": [3, 3], "override": [8, 1]}))
    assert request(5, "out", "--override_class", "6", "--earlier", "three") == 3
    assert "three: its record of forgotten classes is damaged" in _error(capsys, "unlearn")


def test_classes_that_would_take_each_others_place(here, capsys):
    """As two requests may that know nothing of each other."""
    record = here / "five" / "request.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"forget": [8], "override": [3]}))
    assert request(1, "out", "--override_class", "2", "--earlier", "three", "five") == 2
    assert "classes 3 and 8 are to take the place of each other" in _error(capsys, "unlearn")


# -- stopping --------------------------------------------------------------------------------------


@pytest.fixture
def judge(monkeypatch):
    """Sees a 0 in every image: nothing is recognised, and next to nothing retained."""

    class Judge(DigitsClassifier):
        def forward(self, images):
            return torch.eye(10)[torch.zeros(len(images), dtype=torch.int64)]

    monkeypatch.setattr("pecker_fast.digits_task.load_judge", lambda *_, **__: Judge(width=4).eval())


STOP = ("--stop_every", "2", "--stop_on")


def test_a_run_ends_when_the_rule_held_twice(here, judge, capsys):
    arguments = ("--max_train_steps", "9", *STOP, "ua>=0.99")
    assert request(3, "out", *arguments, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["step"], values["stopped"], values["ua"]) == (4, 4, 1.0)
    steps = [json.loads(line) for line in (here / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps if "ua_lower" in step] == [2, 4] and len(steps) == 4


def test_a_target_that_is_not_reached_is_said(here, judge, capsys):
    arguments = ("--max_train_steps", "4", *STOP, "retain>=0.9")
    assert request(3, "out", *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["stopped"] is None
    loud = [argument for argument in SHORT if argument != "--quiet"]
    source = ("--pretrained_model_name_or_path", "teacher", "--init", "distilled", "--output_dir", "out2")
    assert main(["unlearn", *source, "--forget_class", "3", *loud, *MASK, *arguments]) == 0
    assert "The target was NOT reached: retain>=0.9" in capsys.readouterr().out


def test_checks_do_not_change_the_run(here, judge):
    for output, more in (("plain", ()), ("checked", (*STOP, "retain>=0.9"))):
        torch.manual_seed(0)
        assert request(3, output, "--max_train_steps", "4", *more) == 0
    assert same(weights(here / "plain" / "model"), weights(here / "checked" / "model"))


def test_a_rule_that_held_once_is_remembered_by_a_checkpoint(here, judge, capsys):
    arguments = (*STOP, "ua>=0.99", "--checkpointing_steps", "2", "--json")
    assert request(3, "out", "--max_train_steps", "2", *arguments) == 0
    assert json.loads(capsys.readouterr().out)["stopped"] is None
    resume = ("--resume_from_checkpoint", "latest", "--max_train_steps", "9")
    assert request(3, "out", *arguments, *resume) == 0
    assert json.loads(capsys.readouterr().out)["stopped"] == 4
    assert request(3, "out", *arguments, *resume) == 0  # and that it was over
    assert json.loads(capsys.readouterr().out)["step"] == 4
    fresh = (*STOP, "ua>=0.98", "--json", "--resume_from_checkpoint", "out/checkpoint-2", "--max_train_steps", "9")
    assert request(3, "new", *fresh) == 0  # another rule begins anew
    assert json.loads(capsys.readouterr().out)["stopped"] == 6


class Waiting(step_metrics._There):
    """Numbers of a device that has not come to them yet: nobody looks at them before somebody waits."""

    def arrived(self):
        return False


@pytest.mark.parametrize(
    ("bad", "last", "more"),
    [
        (3, "4", ()),
        (4, "4", ()),
        (3, "9", (*STOP, "ua>=0.99")),  # which ends after step 4
        (4, "9", (*STOP, "ua>=0.99")),
        (3, "4", ("--checkpointing_steps", "3")),
    ],
)
def test_nothing_is_saved_of_a_run_that_diverged(bad, last, more, here, judge, capsys, monkeypatch):
    step = MaskedDistiller.step

    def diverged(self):
        losses = step(self)
        return losses if self.steps_done < bad else {name: loss * torch.nan for name, loss in losses.items()}

    monkeypatch.setattr(step_metrics, "fetch", Waiting)
    monkeypatch.setattr(MaskedDistiller, "step", diverged)
    assert request(3, "out", "--max_train_steps", last, *more) == 4
    assert f"step {bad}: fake_score_loss is nan; lower the learning rates" in _error(capsys, "unlearn")
    assert not (here / "out" / "model").exists() and not list((here / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        ("--stop_on ua>0.9", 2, "stop rule: expected NAME>=SHARE"),
        ("--stop_on ua>=0.999", 2, "can never hold on 500 samples"),
        ("--stop_on ua>=0.9 --stop_samples 100", 2, "--stop_samples: expected at least 500, got 100"),
        ("--stop_every 5", 2, "give --stop_on too"),
        ("--judge digits", 2, "give --stop_on too"),
        ("--stop_on ua>=0.9 --judge nowhere", 3, "nowhere: no such folder"),
        ("--stop_on ua>=0.9 --judge teacher", 3, "--judge takes a classifier's folder"),
        ("--stop_on ua>=0.9 --judge few", 3, "tells 3 classes apart, the model has 10"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused_at_once(more, code, text, here, capsys, monkeypatch):
    monkeypatch.setattr(MaskedDistiller, "__init__", lambda *_, **__: pytest.fail("began"))
    models.save(DigitsClassifier(width=4, num_classes=3), here / "few")
    assert request(3, "out", *more.split()) == code
    assert text in _error(capsys, "unlearn")
    assert not (here / "out").exists()


def test_another_models_images_need_a_judge_of_their_own(here, capsys):
    shape = {**DDIM, "sample_shape": [3, 8, 8]}
    models.save(_tiny(channels=3), here / "colours", shape)
    source = ("--pretrained_model_name_or_path", "colours", "--forget_class", "3", "--output_dir", "out")
    assert main(["unlearn", *source, "--stop_on", "ua>=0.9"]) == 2
    assert "name a classifier's folder with --judge" in _error(capsys, "unlearn")


def test_a_judge_of_a_folder(here, capsys):
    models.save(DigitsClassifier(width=4), here / "judge")
    assert request(3, "out", *STOP, "ua>=0.01", "--judge", "judge", "--json") == 0
    assert json.loads(capsys.readouterr().out)["stopped"] in (None, 2)
