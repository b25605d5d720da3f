"""A stock transformers.Trainer trains a masked model by one callback."""

import builtins
import importlib
import sys

import pytest
import torch
from models import mask_of
from test_active import assert_same_bits, off_mask
from torch import nn

from pecker_fast import BlockMask
from pecker_fast.ops import weight_grad_ways

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS = 6


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


class Plain(nn.Module):
    """Not a PreTrainedModel: the Trainer writes its state dict with safetensors."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.out = nn.Embedding(64, 16), nn.LayerNorm(16), nn.Linear(16, 64)

    def forward(self, input_ids, labels):
        logits = self.out(torch.tanh(self.norm(self.embed(input_ids))))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def plain():
    torch.manual_seed(0)
    return Plain()


MODELS = {"llama": llama, "plain": plain}


def mask_for(model):
    """Some layers full, some in part, some frozen."""
    parameters = dict(BlockMask.random(model, 0.3, "row").parameters)
    full = mask_of(model, tuple(parameters), 1.0).parameters
    last = list(parameters)[-1]
    return BlockMask({**parameters, last: full[last]}, BlockMask.dense(model).total, 0.3)


def data(count=32):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(64, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def make_trainer(model, folder, *callbacks, **settings):
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": 3,
        "seed": 1,
    }
    arguments = transformers.TrainingArguments(**(defaults | settings))
    return transformers.Trainer(model=model, args=arguments, train_dataset=data(), callbacks=list(callbacks))


def callback(*arguments, **settings):
    from pecker_fast.trainer import MaskCallback

    return MaskCallback(*arguments, **settings)


def load_weights(folder):
    return importlib.import_module("safetensors.torch").load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("settings", [{}, {"bf16": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}])
def test_the_trainer_trains_active_weights_alone(kind, settings, tmp_path, capsys):
    model = MODELS[kind]()
    mask = mask_for(model)
    before, start = off_mask(model, mask), {n: w.clone() for n, w in model.state_dict().items()}
    masking = callback(mask)
    trainer = make_trainer(model, tmp_path, masking, **settings)
    trainer.train()
    active = masking.active
    active.check()
    assert_same_bits(before, off_mask(model, mask))
    moved = [name for name in active.names if not torch.equal(model.state_dict()[name], start[name])]
    assert len(moved) > len(active.names) // 2
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in active.parameters()}

    saved = load_weights(tmp_path / f"checkpoint-{STEPS}")
    fresh = MODELS[kind]()
    assert set(saved) == set(fresh.state_dict())
    fresh.load_state_dict(saved, strict=True)
    assert_same_bits(dict(model.state_dict()), dict(fresh.state_dict()))
    assert BlockMask.load(tmp_path / f"checkpoint-{STEPS}" / "mask.safetensors") == mask


@pytest.mark.parametrize("kind", MODELS)
def test_resuming_continues_to_the_bit(kind, tmp_path):
    model = MODELS[kind]()
    make_trainer(model, tmp_path, callback(mask_for)).train()

    other = MODELS[kind]()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(1.0)  # everything comes from the checkpoint
    masking = callback(BlockMask.load(tmp_path / "checkpoint-3" / "mask.safetensors"))
    make_trainer(other, tmp_path, masking).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    masking.active.check()
    assert_same_bits(dict(model.state_dict()), dict(other.state_dict()))


def test_resuming_takes_the_weight_gradients_that_were_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_grad_ways, "_restored", {})
    first = callback(mask_for)
    trainer = make_trainer(plain(), tmp_path, first)
    first.active.use_measured_ways({"kind": "slabs"})  # as if a GPU had measured it
    trainer.train()
    monkeypatch.setattr(weight_grad_ways, "_restored", {})
    second = callback(BlockMask.load(tmp_path / "checkpoint-3" / "mask.safetensors"))
    make_trainer(plain(), tmp_path, second).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.active.measured_ways() == {"kind": "slabs"}


def test_resuming_with_another_mask_is_refused(tmp_path):
    make_trainer(plain(), tmp_path, callback(mask_for)).train()
    other = callback(lambda model: BlockMask.random(model, 0.3, "row", seed=1))
    trainer = make_trainer(plain(), tmp_path, other)
    with pytest.raises(ValueError, match=r"another mask; resume with .*BlockMask\.load\('.*checkpoint-6/mask"):
        trainer.train(resume_from_checkpoint=True)


def test_remove_leaves_an_ordinary_model(tmp_path):
    model = plain()
    masking = callback(mask_for, remove=True)
    trainer = make_trainer(model, tmp_path, masking, save_strategy="no")
    trainer.train()
    assert masking.active is None and type(model.out) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())
    trainer.save_model(str(tmp_path / "end"))
    assert_same_bits(load_weights(tmp_path / "end"), dict(model.state_dict()))
    with pytest.raises(RuntimeError, match="about to train a model that is not masked"):
        trainer.train()


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(TypeError, match="expected a BlockMask or a function of the model"):
        callback(0.1)
    model = plain()
    settings = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="leave optimizers= out"):
        transformers.Trainer(model=model, args=settings, callbacks=[callback(mask_for)], optimizers=(optimizer, None))
    assert type(model.out) is nn.Linear and all(parameter.requires_grad for parameter in model.parameters())
    trainer = transformers.Trainer(
        model_init=plain, args=settings, train_dataset=data(), callbacks=[callback(mask_for)]
    )
    with pytest.raises(RuntimeError, match="model_init makes a new one"):
        trainer.train()


def test_without_transformers_it_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def refuse(name, *arguments):
        if name == "transformers":
            raise ImportError("no module named transformers")
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.delitem(sys.modules, "pecker_fast.trainer", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'transformers\[torch\]'"):
        importlib.import_module("pecker_fast.trainer")
