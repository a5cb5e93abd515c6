"""A small GPT from scratch with the Hugging Face Trainer: `LearnedOptimizer` without any setting beside the Trainer's default AdamW.

    pip install "learned-optim[transformers]"
    python examples/trainer_gpt.py

The text is the manual that comes with Python, character by character. Shapes: a batch is (8, 64) characters.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pydoc_data.topics import topics
from typing import Any

import torch
from learned_optim.integrations.transformers import LearnedOptimizerTrainer
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

LENGTH = 64


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Every stretch of `LENGTH` characters that begins at a multiple of `stride`."""

    def __init__(self, text: torch.Tensor, stride: int) -> None:
        self.windows = text.unfold(0, LENGTH, stride)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def data() -> tuple[Windows, Windows]:
    text = torch.tensor(list("\n".join(topics.values()).encode("ascii", "replace")))
    border = len(text) * 9 // 10
    return Windows(text[:border], stride=7), Windows(text[border:], stride=500)


def train(trainer_class: type[Trainer], seed: int, steps: int) -> float:
    """Returns: the loss on text that was not trained on."""
    set_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4))
    options: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    train_data, validation = data()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, max_steps=steps, seed=seed, dataloader_pin_memory=False, **options)
        trainer = trainer_class(model, args, train_dataset=train_data, eval_dataset=validation)
        trainer.train()
        return trainer.evaluate()["eval_loss"]


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    losses = {
        name: [train(trainer, seed, arguments.steps) for seed in range(arguments.seeds)]
        for name, trainer in (("Trainer, as it comes", Trainer), ("LearnedOptimizerTrainer", LearnedOptimizerTrainer))
    }
    print(f"\nLoss on unseen text after {arguments.steps} steps, {arguments.seeds} seeds")
    for name, found in losses.items():
        print(f"{name:25} {statistics.fmean(found):.3f}  ({', '.join(f'{loss:.3f}' for loss in found)})")
    return losses


if __name__ == "__main__":
    main()
