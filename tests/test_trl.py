"""LoRA by PEFT, through TRL's real SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs trl: make test-integrations")
pytest.importorskip("peft", reason="needs peft: make test-integrations")

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer_helpers import clocks, gpt, inner
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from learned_optim import LearnedOptimizer, load_network
from learned_optim.integrations.transformers import LearnedOptimizerTrainer
from learned_optim.weights import fingerprint

# TRL and PEFT still use transformers' old name for it.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated and will be removed in v6:FutureWarning")

LORA = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)


class LearnedSFTTrainer(LearnedOptimizerTrainer, SFTTrainer):
    pass


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"a": 1, "b": 2, "c": 3, "d": 4, "<eos>": 0}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def options(folder: Path, **config: Any) -> dict[str, Any]:
    args = SFTConfig(
        str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no", max_steps=20, max_length=8, **config
    )
    data = Dataset.from_dict({"text": ["a b c d a b c", "b c d a b c d"] * 16})
    return {"model": gpt(), "args": args, "train_dataset": data, "processing_class": tokenizer(), "peft_config": LORA}


@pytest.mark.parametrize("kind", ["plain", "helped"])
def test_lora_trains_the_adapters_and_nothing_else(tmp_path: Path, kind: str) -> None:
    if kind == "plain":
        trainer = SFTTrainer(**options(tmp_path), optimizer_cls_and_kwargs=(LearnedOptimizer, {}))
    else:
        trainer = LearnedSFTTrainer(**options(tmp_path))
    start = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, param in trainer.model.named_parameters() if not torch.equal(param, start[name])}
    assert moved == {name for name in start if "lora_" in name}
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    assert max(clocks(trainer)) == 20, "half of the adapters have no gradient at the first step"
    assert inner(trainer).param_groups[0]["total_steps"] == (20 if kind == "helped" else None)


def test_an_optimizer_made_before_the_adapters_says_that_it_finds_no_gradient(tmp_path: Path) -> None:
    """SFTTrainer freezes the model's own parameters when it adds the adapters, which this optimizer has never heard of."""
    arguments = options(tmp_path)
    optimizer = LearnedOptimizer(arguments["model"].parameters())
    trainer = SFTTrainer(**arguments, optimizers=(optimizer, None))
    with pytest.warns(UserWarning, match="found no gradient on any of its parameters, so it changed nothing"):
        trainer.train()


def test_the_model_card_names_the_optimizer(tmp_path: Path) -> None:
    trainer = LearnedSFTTrainer(**options(tmp_path))
    trainer.create_model_card(model_name="mine")
    text = (tmp_path / "README.md").read_text()
    assert f"`learned_optim.LearnedOptimizer`: pretrained='default', weights {fingerprint(load_network('default'))}" in text
    assert "adamw" not in text.lower()


def test_sft_config_may_keep_its_own_defaults(tmp_path: Path) -> None:
    assert SFTConfig(str(tmp_path), use_cpu=True, bf16=False).learning_rate == 2e-5
    with pytest.raises(ValueError, match=r"learning_rate=0\.0001"):
        LearnedSFTTrainer(**options(tmp_path, learning_rate=1e-4))
