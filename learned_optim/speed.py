"""Speed: the steps that tuned AdamW needs for the loss where an optimizer ends, over the steps that this one took.

VeLOdrome's measure (Metz et al. 2022, "VeLO", section 4). AdamW may take its best setting for each of several lengths of training. A speed
lies between 1/8 and 4: what AdamW does not reach in four times the steps counts as 4; what diverges, or ends above where AdamW is after an
eighth of the steps, as 1/8.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

LENGTHS = (0.125, 0.25, 0.5, 2.0, 4.0)  # of AdamW's runs, beside 1, in units of the steps
BOUNDS = min(LENGTHS), max(LENGTHS)  # of a speed
EVALUATIONS = 40  # of a run
WARM_UP = 0.05  # of AdamW's steps

Curve = Sequence[tuple[float, float]]  # (steps, loss), from before the first step to after the last


def moments(steps: int, count: int = EVALUATIONS) -> list[int]:
    """The steps after which a run is evaluated: evenly spread, the last one among them, at most `count`."""
    return sorted({math.ceil(steps * k / count) for k in range(1, count + 1)})


def schedule(name: str, optimizer: Optimizer, steps: int) -> LambdaLR:
    """A linear warm-up over the first twentieth of the steps, then "constant", or "cosine" or "linear" to zero."""
    warm = max(1, round(WARM_UP * steps))
    fall: dict[str, Callable[[float], float]] = {
        "constant": lambda _: 1.0,
        "cosine": lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress),
        "linear": lambda progress: 1 - progress,
    }
    return LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / warm) * fall[name](min(1.0, t / steps)))


def final(curve: Curve) -> float:
    """The loss at the end, the mean of the last three measurements; infinite for a run that diverged."""
    tail = [loss for _, loss in curve[-3:]]
    return statistics.fmean(tail) if all(map(math.isfinite, tail)) else math.inf


def mean(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """The mean of several runs, as far as all of them got."""
    return [(points[0][0], statistics.fmean(loss for _, loss in points)) for points in zip(*curves, strict=False)]


def envelope(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """(steps, lowest loss) that is reached by then in any of the runs, each smoothed over three measurements."""
    points = [
        (curve[i][0], statistics.fmean(loss for _, loss in curve[max(0, i - 2) : i + 1])) for curve in curves for i in range(1, len(curve))
    ]
    lowest, found = math.inf, []
    for steps, loss in sorted(points):
        if loss < lowest:
            lowest = loss
            found.append((float(steps), loss))
    return found


def steps_to(curve: Curve, loss: float) -> float:
    """Where a falling curve first gets to a loss, interpolated in the logarithms; infinite where it does not."""
    for (a, high), (b, low) in itertools.pairwise(curve):
        if high <= loss:
            return a
        if low <= loss:
            share = math.log(high / loss) / math.log(high / low) if low > 0 else 1.0
            return float(a * (b / a) ** share)
    return math.inf


def speed(curve: Curve, reference: Curve, solved: float) -> float:
    """The speed of a run.

    Args:
        reference: AdamW's `envelope`.
        solved: a loss below which nothing is the better one; runs that get there are timed to there.
    """
    end, mine = final(curve), curve[-1][0]
    if not math.isfinite(end):
        return BOUNDS[0]
    if end <= solved:
        end, mine = solved, next((steps for steps, loss in curve[1:] if loss <= solved), mine)
    return min(max(steps_to(reference, end) / mine, BOUNDS[0]), BOUNDS[1])


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))
