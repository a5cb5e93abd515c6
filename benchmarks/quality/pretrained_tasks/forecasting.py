"""Fracast, a model of time series, on profiles of terrain."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from .problems import Batch, Problem, problem

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
