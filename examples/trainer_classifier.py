"""Fine-tunes a text classifier with Hugging Face's Trainer: LearnedOptimizer, without any setting, beside Trainer's default AdamW.

A small GPT is pretrained on Python's manual, then learns to tell which module of the standard library a passage of code comes from. Nothing
is downloaded. Optional argument: steps of fine-tuning. Five minutes on one core. What is printed is written to
runs/trainer_classifier/results.json too.

    pip install ".[transformers]" -c constraints.txt
"""

import argparse
import functools
import inspect
import json
import sys
import tarfile
import turtle
import typing
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from learned_optim import LearnedOptimizer
from learned_optim.integrations.transformers import LearnedOptimizerTrainer

STEPS, SEEDS = int(sys.argv[1]) if len(sys.argv) > 1 else 300, 3
FOLDER, LENGTH, MODULES = "runs/trainer_classifier", 128, [argparse, tarfile, turtle, typing]
CONFIG = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, pad_token_id=0)
OPTIMIZERS = {
    "AdamW, Trainer's default": Trainer,
    "LearnedOptimizer in Trainer": functools.partial(Trainer, optimizer_cls_and_kwargs=(LearnedOptimizer, {})),
    "LearnedOptimizerTrainer": LearnedOptimizerTrainer,
}


def passages(text):
    data = torch.tensor(list(text.encode()))
    return data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)


def arguments(**options):
    return TrainingArguments(FOLDER, use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True, report_to=[], **options)


def pretrain():
    set_seed(0)
    data = [{"input_ids": row, "labels": row} for row in passages("\n".join(topics.values()))]
    trainer = Trainer(GPT2LMHeadModel(CONFIG), arguments(max_steps=3 * STEPS, learning_rate=3e-3), train_dataset=data)
    trainer.train()
    trainer.save_model()


def results(make_trainer, seed, train, test):
    """Returns: evaluation loss and accuracy, (2,)."""
    set_seed(seed)
    model = GPT2ForSequenceClassification.from_pretrained(FOLDER, num_labels=len(MODULES))
    args = arguments(max_steps=STEPS, seed=seed)
    trainer = make_trainer(model=model, args=args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)
    trainer.train()
    metrics = trainer.evaluate()
    return torch.tensor([metrics["eval_loss"], metrics["eval_accuracy"]])


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean().item()}


if __name__ == "__main__":
    pretrain()
    data = [{"input_ids": row, "labels": label} for label, module in enumerate(MODULES) for row in passages(inspect.getsource(module))]
    test = data[::4]
    train = [one for i, one in enumerate(data) if i % 4]
    print(f"fine-tuning on {len(train)} passages for {STEPS} steps; evaluation on {len(test)}: mean, and each of {SEEDS} seeds")
    figures = {}
    for name, make_trainer in OPTIMIZERS.items():
        loss, share = torch.stack([results(make_trainer, seed, train, test) for seed in range(SEEDS)], 1)
        print(f"{name:30} loss {loss.mean():.3f} ({' '.join(f'{one:.3f}' for one in loss)})   accuracy {share.mean():.1%}")
        figures[name] = {"mean": loss.mean().item(), "seeds": loss.tolist(), "accuracy": share.mean().item()}
    Path(FOLDER, "results.json").write_text(json.dumps({"steps": STEPS, "evaluation loss": figures}, indent=1) + "\n")
