"""The real Hugging Face Trainer: with the optimizer as it is, and with `LearnedOptimizerTrainer`."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason='needs transformers: pip install "transformers>=5"')
pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install accelerate")

import transformers
from trainer_helpers import MAKERS, Counting, StopAt, arguments, card, clocks, gpt, helped, inner, network, plain, same, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from learned_optim import LearnedOptimizer
from learned_optim.integrations.transformers import LearnedOptimizerTrainer
from learned_optim.weights import fingerprint

# As it is


def test_trainers_before_5_3_take_no_model_for_their_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Trainer.create_optimizer
    monkeypatch.setattr(Trainer, "create_optimizer", lambda self: make(self))
    trainer = helped(arguments(tmp_path, max_steps=2))
    trainer.train()
    assert clocks(trainer) == {2}


def test_trainer_takes_the_optimizer_as_it_is(tmp_path: Path) -> None:
    trainer = plain(arguments(tmp_path, max_steps=40, weight_decay=0.1))
    result = trainer.train()
    assert result.training_loss < 1.5, "the untrained model's loss is log(8), 2.08"
    optimizer = inner(trainer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {group["initial_lr"] for group in optimizer.param_groups} == {1.0}, "args.learning_rate is for other optimizers"
    assert {group["total_steps"] for group in optimizer.param_groups} == {None}
    assert clocks(trainer) == {40}


def test_what_trainer_would_take_for_its_own() -> None:
    # Trainer pops these from the keyword arguments, and calls these methods at every step where they exist.
    assert not {"model", "optimizer_dict"} & inspect.signature(LearnedOptimizer.__init__).parameters.keys()
    assert not hasattr(LearnedOptimizer, "train")
    assert not hasattr(LearnedOptimizer, "eval")


def test_what_trainer_drops_is_named_once(tmp_path: Path) -> None:
    options = {"learning_rate": 2e-5, "adam_beta1": 0.8, "optim": "adafactor", "warmup_steps": 2}
    trainer = plain(arguments(tmp_path, max_steps=3, **options))
    with pytest.warns(UserWarning, match="Trainer ignores learning_rate=2e-05, adam_beta1=0.8, optim=") as caught:
        trainer.train()
    (warning,) = caught
    assert "warmup_steps" not in str(warning.message), "Trainer's own schedule has it"
    trainer.train()  # where warnings are errors


def test_an_optimizer_made_beforehand_gets_trainers_linear_schedule(tmp_path: Path) -> None:
    model = gpt()
    optimizer = LearnedOptimizer(model.parameters())
    trainer = plain(arguments(tmp_path), model=model, optimizers=(optimizer, None), optimizer_cls_and_kwargs=None)
    trainer.train()
    assert inner(trainer) is optimizer
    assert optimizer.param_groups[0]["lr"] == 0.0, "a linear schedule ends at 0"


def test_a_second_train_goes_on_with_the_state(tmp_path: Path) -> None:
    trainer = plain(arguments(tmp_path, max_steps=3))
    trainer.train()
    optimizer = inner(trainer)
    trainer.train()
    assert inner(trainer) is optimizer
    assert clocks(trainer) == {6}


# Arguments


def test_arguments_are_chosen_on_a_copy(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=3, logging_steps=1, logging_strategy="steps")
    trainer = helped(args)
    trainer.train()
    assert (trainer.args.lr_scheduler_type, trainer.args.max_grad_norm) == ("constant", 0.0)
    assert [log["learning_rate"] for log in trainer.state.log_history if "loss" in log] == [1.0, 1.0, 1.0]
    assert (args.lr_scheduler_type, args.max_grad_norm) == ("linear", 1.0), "another trainer may be made with them"


@pytest.mark.parametrize("maker", MAKERS)
def test_only_the_helper_leaves_gradients_unclipped(tmp_path: Path, maker: str) -> None:
    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
            self.norm = torch.nn.utils.get_total_norm([param.grad for param in model.parameters()])

    class Steep(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = gpt()

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": 100 * self.gpt(input_ids=input_ids, labels=labels).loss}

    callback = Norm()
    MAKERS[maker](arguments(tmp_path, max_steps=1), model=Steep(), callbacks=[callback]).train()
    assert (callback.norm > 10) == (maker == "helped")


def test_what_has_no_effect_is_named_in_one_warning(tmp_path: Path) -> None:
    options = {"learning_rate": 2e-5, "lr_scheduler_type": "cosine", "warmup_steps": 5, "max_grad_norm": 0.5, "optim": "adafactor"}
    args = arguments(tmp_path, max_steps=2, **options)
    with pytest.warns(UserWarning, match="LearnedOptimizerTrainer ignores") as caught:
        trainer = helped(args)
    trainer.train()  # where warnings are errors
    (warning,) = caught
    text = str(warning.message)
    for name in ("learning_rate=2e-05", "lr_scheduler_type=", "warmup_steps=5", "max_grad_norm=0.5", "optim="):
        assert name in text
    assert "adam_beta1" not in text
    assert "optimizer_cls_and_kwargs" in text, "the way to have them all the same"
    assert {group["lr"] for group in inner(trainer).param_groups} == {1.0}
    without = helped(arguments(tmp_path, max_steps=2))
    without.train()
    assert same(weights(trainer), weights(without))


def test_a_constant_schedule_without_clipping_may_be_asked_for(tmp_path: Path) -> None:
    helped(arguments(tmp_path, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.01))


def test_defaults_are_those_of_the_class_of_the_arguments(tmp_path: Path) -> None:
    @dataclass
    class Patient(TrainingArguments):
        learning_rate: float = 2e-5

    helped(Patient(str(tmp_path), use_cpu=True, report_to=[]))
    with pytest.warns(UserWarning, match="ignores learning_rate=5e-05"):
        helped(Patient(str(tmp_path), use_cpu=True, report_to=[], learning_rate=5e-5))


def test_the_arguments_of_the_optimizer_reach_it(tmp_path: Path) -> None:
    options = {"pretrained": network(), "lr": 0.5, "weight_decay": 0.1, "total_steps": 100, "kernel": "reference"}
    trainer = helped(arguments(tmp_path, max_steps=3, weight_decay=0.3), **options, stacked=True, error_if_nonfinite=True)
    trainer.train()
    optimizer = inner(trainer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {(group["lr"], group["total_steps"], group["weights"]) for group in optimizer.param_groups} == {
        (0.5, 100, fingerprint(network()))
    }
    assert optimizer.kernel == "reference"
    assert optimizer.error_if_nonfinite
    assert all(group["stacked"] for group in optimizer.param_groups)
    text = card(trainer)
    assert "lr=0.5, total_steps of 100" in text
    assert fingerprint(network()) in text


def test_the_arguments_of_the_optimizer_are_checked(tmp_path: Path) -> None:
    for options, message in (
        ({"lr": -1.0}, "lr multiplies"),
        ({"kernel": "fast"}, "kernel must be one of"),
        ({"total_steps": -3}, "total_"),
    ):
        with pytest.raises(ValueError, match=message):
            helped(arguments(tmp_path, max_steps=1), **options).train()


@pytest.mark.parametrize("place", ["optimizers", "optimizer_cls_and_kwargs"])
def test_another_optimizer_is_refused(tmp_path: Path, place: str) -> None:
    model = gpt()
    other = {"optimizers": (torch.optim.SGD(model.parameters()), None), "optimizer_cls_and_kwargs": (torch.optim.SGD, {})}
    with pytest.raises(ValueError, match="makes its own optimizer"):
        helped(arguments(tmp_path), model=model, **{place: other[place]})


# Trainers derived from Trainer


class Narrow(Trainer):
    """With a signature of its own, which hands on what it knows."""

    def __init__(self, model: Any, args: TrainingArguments, *, data: Any) -> None:
        super().__init__(model=model, args=args, train_dataset=data)


class Extended(Trainer):
    """With arguments of its own, before those of Trainer."""

    def __init__(self, extra: str, *args: Any, **kwargs: Any) -> None:
        self.extra = extra
        super().__init__(*args, **kwargs)


def test_a_derived_trainer_may_have_any_signature(tmp_path: Path) -> None:
    class LearnedNarrow(LearnedOptimizerTrainer, Narrow):
        pass

    class LearnedExtended(LearnedOptimizerTrainer, Extended):
        pass

    reference = helped(arguments(tmp_path), lr=0.5)
    reference.train()
    makers = (
        lambda: LearnedNarrow(gpt(), arguments(tmp_path), data=Counting(), lr=0.5),
        lambda: LearnedExtended("extra", gpt(), arguments(tmp_path), train_dataset=Counting(), lr=0.5),
    )
    for make in makers:  # each just before it trains, since it seeds the random numbers
        trainer = make()
        trainer.train()
        assert same(weights(trainer), weights(reference))


def test_seq2seq_trainer(tmp_path: Path) -> None:
    class LearnedSeq2Seq(LearnedOptimizerTrainer, transformers.Seq2SeqTrainer):
        pass

    shape = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**shape, decoder_start_token_id=0, pad_token_id=0))
    data = [{"input_ids": torch.randint(1, 30, (6,)), "labels": torch.randint(1, 30, (4,))} for _ in range(16)]
    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "predict_with_generate": True}
    args = transformers.Seq2SeqTrainingArguments(str(tmp_path), max_steps=4, **options)
    trainer = LearnedSeq2Seq(model=model, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert clocks(trainer) == {4}
    assert {group["total_steps"] for group in inner(trainer).param_groups} == {4}
    assert trainer.predict(data, max_length=4).predictions.shape[0] == 16


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_of_the_model_are_seen(tmp_path: Path, stacked: bool) -> None:
    shape = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape, **heads))
    trainer = helped(arguments(tmp_path, max_steps=2), model=model, stacked=stacked)
    if stacked:
        trainer.train()  # where warnings are errors
    else:
        with pytest.warns(UserWarning, match="experts.gate_up_proj' seems to hold experts") as caught:
            trainer.train()
        assert len(caught) == 1


def test_missing_weights_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no bundled set"):
        helped(arguments(tmp_path), pretrained="nope")


def test_without_transformers_the_error_names_the_extra(tmp_path: Path) -> None:
    code = "import sys; sys.modules['transformers'] = None; import learned_optim.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert 'pip install "transformers>=5" accelerate' in done.stderr


# The horizon


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 5}, 5),
        ({"max_steps": -1, "num_train_epochs": 2}, 16),
        ({"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3}, 6),
    ],
)
def test_the_optimizer_knows_how_long_training_takes(tmp_path: Path, options: dict[str, Any], steps: int) -> None:
    trainer = helped(arguments(tmp_path, **options))
    trainer.train()
    assert {group["total_steps"] for group in inner(trainer).param_groups} == {steps}
    assert clocks(trainer) == {steps}, "its clock counts optimizer steps"


def test_a_longer_run_may_resume_a_shorter_one(tmp_path: Path) -> None:
    helped(arguments(tmp_path, max_steps=8), callbacks=[StopAt(4)]).train()
    trainer = helped(arguments(tmp_path, max_steps=12))
    trainer.train(resume_from_checkpoint=True)
    assert {group["total_steps"] for group in inner(trainer).param_groups} == {12}
    assert clocks(trainer) == {12}


def test_a_second_train_is_a_new_run(tmp_path: Path) -> None:
    trainer = helped(arguments(tmp_path, max_steps=6))
    trainer.train()
    middle = weights(trainer)
    trainer.train()
    assert clocks(trainer) == {6}
    moved = max((param - middle[name]).abs().max().item() for name, param in weights(trainer).items())
    assert moved > 0.01, "at the end of its horizon the optimizer would hardly move"


def test_auto_find_batch_size_starts_again(tmp_path: Path) -> None:
    class OutOfMemory(LearnedOptimizerTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == 2 and len(inputs["input_ids"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    args = arguments(tmp_path, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=8, auto_find_batch_size=True)
    trainer = OutOfMemory(model=gpt(), args=args, train_dataset=Counting())
    trainer.train()
    assert trainer.state.train_batch_size <= 4
    assert trainer.state.max_steps > 4
    assert {group["total_steps"] for group in inner(trainer).param_groups} == {trainer.state.max_steps}
    assert clocks(trainer) == {trainer.state.max_steps}
