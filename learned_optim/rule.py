r"""The update rule: gradient -> features -> LSTM -> direction -> update.

This file is the only definition of the rule. It is pure (it changes none of its arguments) and differentiable: the optimizer runs it
without gradients, meta-training differentiates it, and every kernel is compared with it.

Method
------
For each tensor :math:`\theta` of the model, with gradient :math:`g_t` at its step `t`:

1. **Moments** as in Adam (Kingma & Ba 2015): :math:`m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t`,
   :math:`v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2`, used bias-corrected.
2. **Step size.** Two statistics of each tensor, both free of scale, say whether its steps are too short or too long:

   - the *agreement* :math:`a_t` of its recent gradients: the length of their mean, in units of what it would be by chance. It is 1 where
     they are noise, 4.4 where all are the same, and a quarter where each turns back the one before;
   - the *trend*: the mean, over some ten steps, of the cosine of its gradient with its momentum. It is the hypergradient of the step size.

   From the trend `network.Controller` makes a correction :math:`e^{\kappa_t}` of the prior step size, which adds up over the run, and a
   warm-up :math:`e^{r_t}`. The warm-up begins at a fiftieth and rises while gradients go on pointing where the steps before them went. A
   model from scratch leaves it behind within a few steps. One that was trained before stays in it, so that what it knows is not lost before
   its gradients have shown what it bears. Matrices that look trained before their first step, by their singular values, rise more slowly,
   and a little also where gradients show nothing.
3. **Direction.** Features of each coordinate (`features.coordinate_features`), normalised by :math:`\sqrt{v_t}`, go to the coordinate-wise
   LSTM, with one state per coordinate. It returns :math:`d_t`; untrained, :math:`d_t = m_t / \sqrt{v_t}`.
4. **Length.** The direction loses its length, so that the LSTM cannot change the step size by accident. A matrix (fan_out x fan_in;
   convolution kernels flattened) is orthogonalised by Newton-Schulz and given a spectral norm of
   :math:`\sqrt{\max(1, fan_{out}/fan_{in})}` (Muon, Jordan et al. 2024), times :math:`3/L` where a model has fewer than three matrices,
   :math:`L`: each of many layers moves the outputs by a share only (Large et al. 2024, "Scalable optimization in the modular norm"). Any
   other tensor is divided by its root mean square and scaled by a learned constant. Two kinds of matrix are not orthogonalised, keep the
   direction's length, and are scaled by the same constant. One is what looked trained before its first step. Mostly Adam trained it, and
   orthogonal steps break more of what Adam made (Qu et al. 2026, "Can Muon fine-tune Adam-pretrained models?"). The other is a table, such
   as an embedding of many words of which a step sees few. To orthogonalise it would take longer than all the rest and throw rare words far,
   and where most rows are zero a root mean square says nothing of the others.
5. **Update.** :math:`\theta_{t+1} = \theta_t - \eta_0 \, s(t) \, e^{\kappa_t + r_t} \, p_t^q \, d_t`. The pace :math:`p_t` is the
   agreement, or the length of the last gradient in units of :math:`\sqrt{v_t}`, at most 1, if that is more: long where gradients agree,
   short where they vanish; its power :math:`q`, of `Controller`, is 1 unless it is learned. Adam's steps have such a factor in each
   coordinate, and step 4 would lose it. The schedule :math:`s` is constant and then falls linearly to zero over the last 60 % of `T` if
   that is known (Haegele et al. 2024, "Scaling laws and compute-optimal training beyond fixed training durations"), else
   :math:`1/\sqrt{1 + t/100}`. All steps of a run of more than 200 are shorter by :math:`(200/T)^{1/4}`: it has the time to go as far with
   them, and their noise is less (Bjorck et al. 2024, "Scaling optimal LR across token horizons").

A tensor's clock `t` starts with its first non-zero gradient. Until then its state stays as it was made and its update is zero.

Shapes: `N` coordinates of `K` tensors laid end to end, `H` hidden units, `...` any leading dimensions (replicas).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .config import NetworkConfig
from .features import ABSOLUTE_FLOOR, Block, Layout, coordinate_features, cosine
from .network import OptimizerNetwork
from .sharding import ShardedLayout

State = dict[str, Tensor]

# Newton-Schulz coefficients of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): singular values end within about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

COOLDOWN = 0.6  # share of a known horizon over which the step size falls to zero
SHORT_RUN = 200.0  # a known horizon, in steps, beyond which steps are shorter the longer it is
TREND_STEPS = 10.0  # time constant of the trend, in steps; before that it is the mean so far
DECAY_STEPS = 100.0  # time constant of the prior step size's decay without a horizon, in steps
EPSILON = 1e-12
LEAST_AGREEMENT = 0.01  # keeps the derivative of its root finite
MANY = 3  # matrices, from which on their steps are as long as in any deeper model
LONG = 3  # the ratio of sides from which on large matrices are orthogonalised by their Gram matrix
TOGETHER = 2**25  # weights at most of matrices that are orthogonalised at once, unless one has more
SMALL = 128  # the shorter side of matrices that are orthogonalised in the precision that they have: fewer bits would not be faster

# AdamW's updates have a root mean square of 0.2 to 0.4 times its learning rate (Liu et al. 2025, "Muon is scalable for LLM training",
# section 2.2), so this turns the size of our update into the learning rate that AdamW's weight decay would be multiplied by.
ADAMW_UPDATE_RMS = 0.2

# Coordinates of a block; its intermediate results then fit into a core's L2 cache. Many coordinates have larger blocks, up to the second
# number: to start some hundred operations for each block takes longer by then than the cache saves.
BLOCK, LARGE_BLOCK = 2**15, 2**17


class Control(NamedTuple):
    """What each tensor has once. Its state is one tensor with all of them as rows, since to look at many small tensors takes time."""

    step: Tensor  # its clock, (..., K)
    trend: Tensor  # the recent cosine of its gradient and momentum, (..., K)
    correction: Tensor  # the logarithm of its step size's, (..., K)
    climbed: Tensor  # what its warm-up has gained on the first step's size, a logarithm; above full length until it is over, (..., K)
    table: Tensor  # whether it is a table, see `Layout`: 1 if it is, -1 if not, 0 while nobody has looked, (..., K)
    trained: Tensor  # whether it looked trained before its first step, see `Layout.looks_trained`, (..., K)

    @staticmethod
    def of(rows: Tensor) -> Control:
        """From (CONTROL, ..., K)."""
        return Control._make(rows)

    def rows(self) -> Tensor:
        """The way back."""
        return torch.stack(self)


CONTROL = len(Control._fields)


def init_state(layout: Layout, config: NetworkConfig, params: Tensor) -> State:
    """The state of tensors that have seen no gradient, in the parameters' dtype: zeros, which take no memory, but for what their weights
    look like.

    `control`, what a tensor has once, is (CONTROL, ..., K), see `Control`; `momentum` and `second_moment` are (..., N), `hidden` and
    `cell` (H, ..., N).

    Args:
        params: (..., N).
    """
    zero, trained = params.new_zeros(()), layout.looks_trained(params.detach())
    shapes = {"momentum": (), "second_moment": (), "hidden": (config.hidden_units,), "cell": (config.hidden_units,)}
    state = {key: zero.expand(*rows, *params.shape) for key, rows in shapes.items()}
    control = Control.of(zero.expand(CONTROL, *trained.shape))._replace(trained=trained)
    return {"control": control.rows()} | state


def update(
    network: OptimizerNetwork,
    layout: Layout,
    grad: Tensor,
    state: State,
    total_steps: Tensor,
    matrix_dtype: torch.dtype | None = None,
) -> tuple[Tensor, State]:
    """One step of the rule for all tensors at once.

    Args:
        layout: the tensors' shapes.
        grad: gradients, (..., N), in the network's dtype.
        state: see `init_state`.
        total_steps: each tensor's horizon in steps, (..., K); infinite where it is not known.
        matrix_dtype: what large matrices are orthogonalised in; None is the network's.

    Returns:
        what to add to the parameters, (..., N), and the new state.
    """
    config = network.config
    # 1. Moments
    momentum = torch.lerp(grad, state["momentum"], config.momentum)
    second_moment = torch.lerp(grad.square(), state["second_moment"], config.second_moment)
    means = layout.means([grad.square(), state["momentum"].square(), grad * state["momentum"], second_moment])

    # 2. Step size
    clock, step_size, control = decide(network, layout, means, Control.of(state["control"]), total_steps)

    # 3. Direction
    def direct(
        block: Block, grad: Tensor, momentum: Tensor, second_moment: Tensor, hidden: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        moments = momentum / block.spread(clock.correction1), second_moment / block.spread(clock.correction2)
        direction, hidden, cell = network.coordinate(coordinate_features(grad, *moments, block.spread(clock.mean)), hidden, cell)
        return direction, hidden, cell

    before = grad, momentum, second_moment, state["hidden"], state["cell"]
    direction, hidden, cell = blockwise(direct, layout, before)

    # 4. Length, 5. Update
    directions = normalize(direction.split(layout.sizes, -1), layout, network, matrix_dtype)
    change = [-size * direction for size, direction in zip(step_size.split(1, -1), directions, strict=True)]
    state = {"control": control.rows(), "momentum": momentum, "second_moment": second_moment}
    return torch.cat(change, -1), state | {"hidden": hidden, "cell": cell}


class Clock(NamedTuple):
    """What follows from each tensor's clock; all (..., K)."""

    started: Tensor  # 1 from the first non-zero gradient on, before that 0
    step: Tensor  # steps since then, that one included
    correction1: Tensor  # of the momentum's bias
    correction2: Tensor  # of the second moment's
    mean: Tensor  # of the tensor's second moments, corrected

    @staticmethod
    def after(step: Tensor, mean: Tensor, config: NetworkConfig) -> Clock:
        """The clock after `step` steps and one more, with the mean of the tensor's new second moments, (..., K)."""
        started = (mean > 0).to(mean.dtype)
        step = step + started
        age = step.clamp(min=1)
        correction1, correction2 = 1 - config.momentum**age, 1 - config.second_moment**age
        return Clock(started, step, correction1, correction2, mean / correction2)


def decide(
    network: OptimizerNetwork, layout: Layout, means: Tensor, control: Control, total_steps: Tensor
) -> tuple[Clock, Tensor, Control]:
    """The clock, and what `step_sizes` makes of it; with the tensors that other processes have, where the layout has such.

    Args:
        means: those of `step_sizes` and of the new second moment, (4, ..., K).
    """
    if not isinstance(layout, ShardedLayout) or layout.parts is None:
        clock = Clock.after(control.step, means[3], network.config)
        return clock, *step_sizes(network, clock, means[:3], control, total_steps)
    rows, mine = layout.with_others(torch.cat([means, total_steps[None], control.rows()]))
    control = Control.of(rows[5:])
    clock = Clock.after(control.step, rows[3], network.config)
    step_size, control = step_sizes(network, clock, rows[:3], control, rows[4])
    return Clock(*(each[..., mine] for each in clock)), step_size[..., mine], Control(*(each[..., mine] for each in control))


def sit_out(layout: Layout) -> None:
    """What `decide` exchanges with other processes, where there is nothing to decide here and they would wait."""
    if isinstance(layout, ShardedLayout) and layout.parts is not None:
        layout.with_others(torch.empty(5 + CONTROL, 0, device=layout.device))


def step_sizes(network: OptimizerNetwork, clock: Clock, products: Tensor, control: Control, total_steps: Tensor) -> tuple[Tensor, Control]:
    """Step 2 of the method, and the factors of step 5.

    Args:
        products: means of the squared gradient, of the squared momentum before it and of their product, (3, ..., K).
        total_steps: (..., K).

    Returns:
        step sizes, (..., K), and the new control.
    """
    age = clock.step.clamp(min=1)
    known = total_steps.isfinite().to(age.dtype)
    progress = ((age - 1) / total_steps).clamp(max=1)
    trend = torch.lerp(control.trend, cosine(products), (1 / age).clamp(min=1 / TREND_STEPS))
    correction = network.controller(trend, age, progress, known, control.correction)
    climbed, warm = network.controller.climb(trend, control.climbed, control.trained, age)
    annealed = ((1 - progress) / COOLDOWN).clamp(max=1) * (total_steps / SHORT_RUN).clamp(min=1).rsqrt().sqrt()
    decayed = (1 + clock.step / DECAY_STEPS).rsqrt()
    schedule = torch.where(known > 0, annealed, decayed)
    last = ((products[0] + ABSOLUTE_FLOOR) / (clock.mean + ABSOLUTE_FLOOR)).sqrt().clamp(max=1)
    pace = torch.maximum(agreement(products, clock, network.config), last) ** network.controller.power
    step_size = (network.log_step_size + correction + warm).exp() * pace * schedule * clock.started
    trend, correction, climbed = (part * clock.started for part in (trend, correction, climbed))
    return step_size, control._replace(step=clock.step, trend=trend, correction=correction, climbed=climbed)


def agreement(products: Tensor, clock: Clock, config: NetworkConfig) -> Tensor:
    """How far recent gradients agree, (..., K): the root mean square of the momentum over what it would be, by chance, of independent
    gradients without a mean. The geometric mean of each tensor's own and the mean of all, since that of a small tensor scatters.

    Args:
        products: see `step_sizes`.
    """
    grad_square, before_square, product = products
    new, old = 1 - config.momentum, config.momentum
    momentum_square = new**2 * grad_square + 2 * new * old * product + old**2 * before_square
    by_chance = new / (1 + old) * clock.correction1 * (2 - clock.correction1)  # of the gradient's mean square
    ratio = (momentum_square / by_chance + ABSOLUTE_FLOOR) / (clock.mean + ABSOLUTE_FLOOR)  # 1 where both have vanished
    own = ratio.clamp(LEAST_AGREEMENT**2, (1 + old) / new).sqrt()
    everyone = (own * clock.started).sum(-1, keepdim=True) / clock.started.sum(-1, keepdim=True).clamp(min=1)
    agreed: Tensor = (own * everyone.clamp(min=LEAST_AGREEMENT)).sqrt()
    return agreed


def blockwise(function: Callable[..., tuple[Tensor, ...]], layout: Layout, tensors: Sequence[Tensor]) -> list[Tensor]:
    """`function` of coordinates alone, in blocks that fit into a processor's cache.

    Where gradients are wanted, a graph keeps the blocks' inputs only and computes what is between once more on the way back, since the
    LSTM's insides take several times the memory of its state.

    Args:
        function: (block, tensors (..., n)) -> tensors (..., n).
        tensors: (..., N).
    """
    total = tensors[0].numel()
    size = min(max(BLOCK, total // 64), LARGE_BLOCK)
    blocks = layout.blocks(max(1, size * sum(layout.sizes) // max(1, total)))
    if len(blocks) == 1:
        return list(function(blocks[0], *tensors))
    if torch.is_grad_enabled():
        function = functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    # One split, whose derivative is one concatenation; that of a slice would be as large as the whole, for every block.
    stretches = zip(*(tensor.split([block.end - block.begin for block in blocks], -1) for tensor in tensors), strict=True)
    parts = [function(block, *stretch) for block, stretch in zip(blocks, stretches, strict=True)]
    return [torch.cat(pieces, -1) for pieces in zip(*parts, strict=True)]


def normalize(
    directions: Sequence[Tensor], layout: Layout, network: OptimizerNetwork, matrix_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Each tensor's direction (..., n) with the length that its shape calls for (step 4 of the method)."""
    matrices = dict(orthogonalize_all(directions, layout, network.config, matrix_dtype))
    others = [k for k in range(len(directions)) if k not in matrices]
    squares = layout.mean_squares(directions, others)
    vectors = {k: directions[k] * vector_scale(network, square, layout.plain[k]) for k, square in zip(others, squares, strict=True)}
    return [part for _, part in sorted((matrices | vectors).items())]


def is_orthogonal(layout: Layout, config: NetworkConfig) -> list[bool]:
    """Which tensors are orthogonalised; the others are vectors or plain, see `vector_scale`."""
    return [fresh and config.orthogonalize_steps > 0 for fresh in layout.is_fresh_matrix]


def vector_scale(network: OptimizerNetwork, mean_square: Tensor, is_plain: Tensor | bool) -> Tensor:
    """What gives a direction of this mean square the length of a vector's; one that is plain keeps its own."""
    return torch.where(torch.as_tensor(is_plain) > 0, 1, (mean_square + EPSILON).rsqrt()) * network.log_vector_gain.exp()


def spectral_norms(layout: Layout, config: NetworkConfig) -> dict[int, float]:
    """Those of step 4, of the tensors that are orthogonalised, by index."""
    members = [k for k, orthogonal in enumerate(is_orthogonal(layout, config)) if orthogonal]
    here = layout.count_matrices()
    few = {k: max(1, MANY / (layout.matrices[k] or here)) for k in members}
    return {k: few[k] * math.sqrt(max(1, layout.fans[k][0] / layout.fans[k][1])) for k in members}


def orthogonalize_all(
    directions: Sequence[Tensor],
    layout: Layout,
    config: NetworkConfig,
    dtype: torch.dtype | None = None,
    members: Iterable[int] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """The directions (..., n) of matrices, by index, orthogonalised and with the spectral norms of step 4; `dtype` as in
    `orthogonalize`. They come one after the other, so that who puts each away at once needs room for `TOGETHER` weights only. `members`
    are those that are wanted; None is all."""
    if isinstance(layout, ShardedLayout):
        if any(is_orthogonal(layout, config)):
            whole = layout.on_whole_matrices(directions, lambda parts, layout: dict(orthogonalize_all(parts, layout, config, dtype)))
            yield from whole.items()
        return
    norms = spectral_norms(layout, config)
    groups: dict[tuple[tuple[int, ...], float], list[int]] = {}  # matrices of one shape are orthogonalised together
    for k in norms if members is None else members:
        groups.setdefault(((*layout.stacks[k], *layout.fans[k]), norms[k]), []).append(k)
    for (shape, norm), chosen in groups.items():
        fast = dtype if min(shape[-2:]) >= SMALL else None
        together = max(1, TOGETHER // math.prod(shape))
        for batch in (chosen[i : i + together] for i in range(0, len(chosen), together)):
            matrices = torch.stack([directions[k].unflatten(-1, shape) for k in batch])
            matrices = orthogonalize(matrices, config.orthogonalize_steps, fast)
            if norm > 1:
                matrices = norm * matrices
            yield from zip(batch, matrices.flatten(-len(shape)).unbind(), strict=True)
            del matrices  # before the next ones are made


def orthogonalize(matrix: Tensor, steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """The nearest semi-orthogonal matrix, approximately: Newton-Schulz iteration on the singular values.

    They have to begin below 1.3, and the first iterations only lengthen them. The Schatten 4-norm, the root of the Frobenius norm of the
    Gram matrix, which the first iteration needs anyway, bounds them more closely than the Frobenius norm: of n equal ones it leaves
    n^-1/4, where that leaves n^-1/2, and so saves an iteration or two.

    Args:
        matrix: (..., fan_out, fan_in).
        steps: iterations; 3 bring singular values above 0.02 of the Schatten 4-norm to within [0.68, 1.2], 5 those above 0.002.
        dtype: of the iteration and of what is returned; None is the matrix's.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = (matrix.mT if tall else matrix).reshape(-1, *sorted(matrix.shape[-2:]))
    scale = (wide.square().sum((-2, -1), keepdim=True) + EPSILON).rsqrt()
    wide = wide.to(dtype or matrix.dtype) * scale.to(dtype or matrix.dtype)
    rows, columns = wide.shape[-2:]
    gram = torch.bmm(wide, wide.mT)
    scale = (gram.square().sum((-2, -1), keepdim=True) + EPSILON).rsqrt()
    wide, gram = wide * scale.sqrt(), gram * scale
    if rows >= SMALL and columns >= LONG * rows and wide.dtype != torch.bfloat16:
        wide = torch.bmm(gram_newton_schulz(gram, steps), wide)
    else:
        iterate = NewtonSchulz.apply if torch.is_grad_enabled() and rows >= SMALL else newton_schulz
        for step in range(steps):
            wide = iterate(wide, gram if step == 0 else torch.bmm(wide, wide.mT))[0]
    return (wide.mT if tall else wide).reshape(matrix.shape)


def newton_schulz(wide: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """One iteration.

    Args:
        wide: (batch, rows, columns).
        gram: `wide @ wide.mT`.

    Returns:
        the new matrices, and what their derivative needs, the polynomial of the Gram matrices.
    """
    a, b, c = NEWTON_SCHULZ
    # Fused products, and `bmm` where one side is transposed, since `matmul` would copy it first.
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    return torch.baddbmm(wide, polynomial, wide, beta=a), polynomial


def gram_newton_schulz(gram: Tensor, steps: int) -> Tensor:
    """What iterations of `newton_schulz` multiply a matrix by, from its Gram matrix alone (batch, rows, rows): each multiplies by a
    polynomial of it, and polynomials of one matrix commute. Long matrices are multiplied twice then, however many iterations there are."""
    a, b, c = NEWTON_SCHULZ
    product = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    for step in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = torch.baddbmm(product, polynomial, product, beta=a) if step else a * product + polynomial
        if step < steps - 1:
            once = torch.baddbmm(gram, polynomial, gram, beta=a)
            gram = torch.baddbmm(once, polynomial, once, beta=a)
    return product


class NewtonSchulz(torch.autograd.Function):
    """`newton_schulz` with a derivative of five products instead of the six of automatic differentiation, which cannot know that two of
    its matrices are symmetric. Between small matrices a call of it costs more than the products."""

    generate_vmap_rule = True

    @staticmethod
    def forward(wide: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        return newton_schulz(wide, gram)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = NEWTON_SCHULZ
        wide, gram, polynomial = ctx.saved_tensors
        slope = torch.bmm(grad, wide.mT)
        slope = (slope + slope.mT) / 2  # of the polynomial, as far as it acts on symmetric matrices
        product = torch.bmm(slope, gram)
        return torch.baddbmm(grad, polynomial, grad, beta=a), b * slope + c * (product + product.mT)
