"""Fine-tunes a text classifier with the Hugging Face Trainer: `LearnedOptimizer` without any setting beside the Trainer's default AdamW.

    pip install "learned-optim[transformers]"
    python examples/trainer_classifier.py

A small GPT first learns to read the manual that comes with Python (as in trainer_gpt.py), then gets a head that tells the manual from
source code and from docstrings. With a model from the Hub, `pretrained()` would be `AutoModelForSequenceClassification.from_pretrained`.
"""

from __future__ import annotations

import argparse
import builtins
import inspect
import statistics
import tempfile
import typing
from pathlib import Path
from pydoc_data.topics import topics

import torch
from learned_optim.integrations.transformers import LearnedOptimizerTrainer
from trainer_gpt import LENGTH, data
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

OPTIONS = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}


class Labelled(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows of three kinds of text: a manual, source code, docstrings. A fifth is held out."""

    def __init__(self, held_out: bool) -> None:
        docstrings = [inspect.getdoc(getattr(builtins, name)) or "" for name in dir(builtins)]
        texts = "\n".join(topics.values())[:60_000], Path(typing.__file__).read_text()[:60_000], "\n".join(docstrings)[:60_000]
        kinds = [torch.tensor(list(text.encode("ascii", "replace"))).unfold(0, LENGTH, 60) for text in texts]
        self.rows = [(window, kind) for kind, windows in enumerate(kinds) for i, window in enumerate(windows) if (i % 5 == 0) == held_out]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index][0], "labels": torch.tensor(self.rows[index][1])}


def pretrained(steps: int, folder: str) -> None:
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, pad_token_id=0))
    args = TrainingArguments(folder, max_steps=steps, learning_rate=2e-3, dataloader_pin_memory=False, **OPTIONS)
    Trainer(model, args, train_dataset=data()[0]).train()
    model.save_pretrained(folder)


def fine_tune(trainer_class: type[Trainer], base: str, seed: int, steps: int) -> float:
    """Returns: the loss on text that was not trained on."""
    set_seed(seed)
    model = GPT2ForSequenceClassification.from_pretrained(base, num_labels=3)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, max_steps=steps, seed=seed, dataloader_pin_memory=False, **OPTIONS)
        trainer = trainer_class(model, args, train_dataset=Labelled(held_out=False), eval_dataset=Labelled(held_out=True))
        trainer.train()
        return trainer.evaluate()["eval_loss"]


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as base:
        pretrained(3 * arguments.steps, base)
        losses = {
            name: [fine_tune(trainer, base, seed, arguments.steps) for seed in range(arguments.seeds)]
            for name, trainer in (("Trainer, as it comes", Trainer), ("LearnedOptimizerTrainer", LearnedOptimizerTrainer))
        }
    print(f"\nLoss on unseen text after {arguments.steps} steps of fine-tuning, {arguments.seeds} seeds")
    for name, found in losses.items():
        print(f"{name:25} {statistics.fmean(found):.3f}  ({', '.join(f'{loss:.3f}' for loss in found)})")
    return losses


if __name__ == "__main__":
    main()
