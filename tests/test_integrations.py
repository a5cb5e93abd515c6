"""Other libraries that take an optimizer, each the real one: `make test-integrations` installs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from learned_optim import LearnedOptimizer

REASON = "needs {}: make test-integrations"
# What these libraries warn of by themselves, with any optimizer.
pytestmark = pytest.mark.filterwarnings("default")


def problem() -> tuple[nn.Module, DataLoader[tuple[torch.Tensor, ...]]]:
    torch.manual_seed(0)
    inputs = torch.randn(64, 6)
    targets = torch.tanh(inputs @ torch.randn(6, 2))
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)), DataLoader(TensorDataset(inputs, targets), batch_size=16)


def loss_of(model: nn.Module, data: DataLoader[tuple[torch.Tensor, ...]]) -> float:
    with torch.no_grad():
        return float(torch.stack([F.mse_loss(model(inputs), targets) for inputs, targets in data]).mean())


def test_accelerate_alone(tmp_path: Path) -> None:
    """Gradient accumulation, and a saved state that goes on with the same bits."""
    accelerate = pytest.importorskip("accelerate", reason=REASON.format("accelerate"))

    def train(folder: Path | None, load: bool) -> list[torch.Tensor]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, data = problem()
        model, optimizer, data = accelerator.prepare(model, LearnedOptimizer(model.parameters()), data)
        for epoch in range(4):
            if load and epoch < 2:
                continue
            if load and epoch == 2:
                accelerator.load_state(str(folder))
            for inputs, targets in data:
                with accelerator.accumulate(model):
                    accelerator.backward(F.mse_loss(model(inputs), targets))
                    optimizer.step()
                    optimizer.zero_grad()
            if folder and not load and epoch == 1:
                accelerator.save_state(str(folder))
        return [param.detach().clone() for param in model.parameters()]

    whole = train(tmp_path / "state", load=False)
    resumed = train(tmp_path / "state", load=True)
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))


def test_lightning(tmp_path: Path) -> None:
    """The horizon comes from the trainer; a checkpoint goes on with the same bits."""
    lightning = pytest.importorskip("lightning", reason=REASON.format("lightning"))
    model, data = problem()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = problem()[0]

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return F.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return LearnedOptimizer(self.parameters(), total_steps=int(self.trainer.estimated_stepping_batches))

    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    whole = Module()
    trainer = lightning.Trainer(max_epochs=6, enable_checkpointing=False, **options)
    trainer.fit(whole, data)
    assert trainer.optimizers[0].param_groups[0]["total_steps"] == 24
    assert loss_of(whole.net, data) < 0.2 * loss_of(model, data)

    stopped = lightning.Trainer(max_epochs=6, max_steps=8, enable_checkpointing=False, **options)
    half = Module()
    half.configure_optimizers = lambda: LearnedOptimizer(half.parameters(), total_steps=24)
    stopped.fit(half, data)
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Module()
    lightning.Trainer(max_epochs=6, enable_checkpointing=False, **options).fit(resumed, data, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))


def tiny_causal_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2))


def tokenizer() -> Any:
    """One token a letter, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "])}
    made = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_sft_trainer_trains_lora_adapters_and_nothing_else(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason=REASON.format("trl"))
    peft = pytest.importorskip("peft", reason=REASON.format("peft"))
    from datasets import Dataset
    from learned_optim.integrations.transformers import LearnedOptimizerMixin

    class LearnedSFTTrainer(LearnedOptimizerMixin, trl.SFTTrainer):
        pass

    args = trl.SFTConfig(
        str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        max_length=24,
        logging_steps=4,
    )
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    dataset = Dataset.from_dict({"text": ["the quick brown fox", "jumps over the dog"] * 16})
    trainer = LearnedSFTTrainer(tiny_causal_model(), args, train_dataset=dataset, processing_class=tokenizer(), peft_config=lora)
    before = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    trainer.train()
    for name, param in trainer.model.named_parameters():
        assert torch.equal(before[name], param) != ("lora_" in name), name
    assert trainer.optimizer.param_groups[0]["total_steps"] == 8


def test_sentence_transformers(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason=REASON.format("sentence-transformers"))
    from datasets import Dataset
    from learned_optim.integrations.transformers import LearnedOptimizerMixin
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
    from transformers import BertConfig, BertModel

    class LearnedTrainer(LearnedOptimizerMixin, library.SentenceTransformerTrainer):
        pass

    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    model = library.SentenceTransformer(str(tmp_path / "bert"), device="cpu")  # mean pooling, since the folder says nothing else
    pairs = {"sentence1": ["a cat", "a dog"] * 16, "sentence2": ["the cat", "the fish"] * 16, "score": [1.0, 0.0] * 16}
    args = library.SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), max_steps=12, per_device_train_batch_size=8, report_to=[], save_strategy="no", use_cpu=True, logging_steps=4
    )
    trainer = LearnedTrainer(model=model, args=args, train_dataset=Dataset.from_dict(pairs), loss=CosineSimilarityLoss(model))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
