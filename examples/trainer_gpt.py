"""Trains a small GPT from scratch with Hugging Face's Trainer: LearnedOptimizer, without any setting, beside Trainer's default AdamW.

The data are the bytes of Python's manual, which comes with Python. Optional argument: optimizer steps. Five minutes on one core. What is
printed is written to runs/trainer_gpt/results.json too.

    pip install ".[transformers]" -c constraints.txt
"""

import functools
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from learned_optim import LearnedOptimizer
from learned_optim.integrations.transformers import LearnedOptimizerTrainer

STEPS, SEEDS = int(sys.argv[1]) if len(sys.argv) > 1 else 300, 3
FOLDER, LENGTH = Path("runs/trainer_gpt"), 64  # bytes

OPTIMIZERS = {
    "AdamW, Trainer's default": Trainer,
    "LearnedOptimizer in Trainer": functools.partial(Trainer, optimizer_cls_and_kwargs=(LearnedOptimizer, {})),
    "LearnedOptimizerTrainer": LearnedOptimizerTrainer,
}


def passages():
    text = torch.tensor(list("\n".join(topics.values()).encode()))
    rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    data = [{"input_ids": row, "labels": row} for row in rows]
    size = 9 * len(data) // 10
    return data[:size], data[size::8]


def evaluation_loss(make_trainer, seed):
    set_seed(seed)
    config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    quiet = {"use_cpu": True, "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "report_to": []}
    args = TrainingArguments(str(FOLDER), max_steps=STEPS, per_device_train_batch_size=16, seed=seed, **quiet)
    trainer = make_trainer(model=GPT2LMHeadModel(config), args=args, train_dataset=TRAIN, eval_dataset=TEST)
    trainer.train()
    return trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    TRAIN, TEST = passages()
    losses = {name: torch.tensor([evaluation_loss(make, seed) for seed in range(SEEDS)]) for name, make in OPTIMIZERS.items()}
    print(f"\nevaluation loss after {STEPS} steps, nats per byte: mean, and each of {SEEDS} seeds")
    for name, loss in losses.items():
        print(f"{name:30} {loss.mean():.3f}   {' '.join(f'{one:.3f}' for one in loss)}")
    figures = {name: {"mean": loss.mean().item(), "seeds": loss.tolist()} for name, loss in losses.items()}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "results.json").write_text(json.dumps({"steps": STEPS, "evaluation loss": figures}, indent=1) + "\n")
