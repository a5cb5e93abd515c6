"""`LearnedOptimizer`: a `torch.optim.Optimizer` that drives the update rule in place."""

from __future__ import annotations

import contextlib
import copy
import math
import numbers
import operator
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from . import checks, sharding
from .checks.state import Ledger
from .config import NetworkConfig
from .features import SURELY, Layout
from .kernels import cpu, reference
from .network import OptimizerNetwork, load_network
from .rule import CONTROL, Control, State, sit_out
from .storage import stored, zeros
from .weights import fingerprint

if TYPE_CHECKING:  # which builds of torch without distributed training lack
    from torch.distributed import ProcessGroup

MOST_LAYOUTS = 4  # of sharded parameters that are kept

# What may be a table: matrices with so many rows, and so many times as many as columns. What is one: where this share of the rows or less
# has a gradient. Of a hidden layer with rectifiers some half has none.
ROWS, TALL, FEW = 1024, 4, 0.25
TABLE, TRAINED = Control._fields.index("table"), Control._fields.index("trained")
KERNELS = ("auto", "reference", "compiled", "triton")


class LearnedOptimizer(torch.optim.Optimizer):
    r"""A pretrained LSTM in place of AdamW. It needs no learning rate.

        optimizer = LearnedOptimizer(model.parameters())

    The rule is described in `learned_optim.rule`. The state of a parameter is made at its first gradient: for each of its coordinates two
    moments, and the hidden units and cells of the LSTM, in the formats of the weights' configuration, whatever the parameter's
    dtype. Parameters may be DTensors (FSDP2, tensor parallelism), see `learned_optim.sharding`; state is sharded with them.

    Args:
        params: parameters, named parameters or groups of them, as for every torch optimizer.
        pretrained: which weights to use: the name of a bundled set, a local folder, an id on the Hugging Face Hub ("user/name"), or an
            `OptimizerNetwork`, which is copied.
        lr: multiplier of the whole update, dimensionless. 1.0 is what the weights were meta-trained for; a scheduler may change it.
        weight_decay: decoupled weight decay. Each step shrinks a parameter by the share `lr * weight_decay * a`, where `a` is the learned
            step size expressed as the learning rate that gives AdamW steps of that size; so values that suit AdamW suit here.
        total_steps: the number of optimizer steps that the parameters will be trained for, where it is known: the rule then anneals its
            step size towards the end. None, the default, works without that knowledge. A group that is added later counts from its own
            first step.
        matrices: how many matrices the whole model has, convolutions included, where this optimizer is given a part of it only, as with one
            optimizer for each parameter: those of models with one or two take longer steps. None, the default, counts those that it has.
        stacked: True where parameters of three and more dimensions are stacks of matrices (..., fan_out, fan_in), such as the weights of
            experts. False, the default, takes them for convolutions, (fan_out, fan_in, ...). Give a model that has both groups.
        error_if_nonfinite: what a gradient that is not finite, or whose square is not in fp32, does to a step. False, the default, leaves
            its tensor out of it: parameter and state stay as they are, the others move on, `skipped` counts it, and the first time there is
            a warning (not on a GPU, which would have to be waited for). True raises before anything moves, as in
            `torch.nn.utils.clip_grad_norm_`; it waits for GPUs.
        parts_group: the processes that have the model's other parameters, where each of them has an optimizer for some whole parameters
            of one model, as with `torch.distributed.optim.ZeroRedundancyOptimizer` and the stages of a pipeline. They agree at each step
            on the number of matrices and on means over all tensors, so all must step together. Neither DistributedDataParallel nor
            sharded parameters (FSDP2, DTensor) need it.
        revision: branch, tag or commit of a Hub repository.
        kernel: what runs the rule: "reference", PyTorch operations on any device; "compiled", the C code that comes with the package, on a
            CPU, and PyTorch operations elsewhere; "triton", Triton kernels on CUDA devices, which orthogonalise matrices in bfloat16; or
            "auto", the fastest that can run: C code on a CPU, Triton on CUDA devices.

    A group may have its own `lr`, `weight_decay`, `total_steps`, `matrices` and `stacked`, and `maximize` besides: True goes uphill. Any
    other key that is no scheduler's is refused.

    Examples:
        >>> import torch
        >>> from learned_optim import LearnedOptimizer
        >>> inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = LearnedOptimizer(model.parameters(), total_steps=200)
        >>> for _ in range(200):
        ...     loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> loss.item() < 0.1
        True

    Raises:
        ValueError: a hyperparameter is out of range, or the weights cannot be used as asked; the message names the file and the reason. Or
            parameters belong to FSDP1 or DeepSpeed's ZeRO, or are a part of ZeroRedundancyOptimizer's without `parts_group`.
        TypeError: a learning rate was given in place of the weights.
        RuntimeError: a kernel was asked for by name and cannot run; or parameters are sharded, and the weights keep state in int8.
    """

    def __init__(
        self,
        params: ParamsT,
        pretrained: str | os.PathLike[str] | OptimizerNetwork = "default",
        *,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        total_steps: int | None = None,
        matrices: int | None = None,
        stacked: bool = False,
        error_if_nonfinite: bool = False,
        revision: str | None = None,
        kernel: str = "auto",
        parts_group: ProcessGroup | None = None,
    ) -> None:
        if isinstance(pretrained, numbers.Number | Tensor):
            raise TypeError(
                f"the second argument of LearnedOptimizer says which weights to use, got {pretrained!r}. If that is a learning rate, leave "
                "it out: none is needed here, and lr= is a multiplier of the learned update, whose default is 1.0."
            )
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {list(KERNELS)}, got {kernel!r}")
        self.kernel = kernel
        network = copy.deepcopy(pretrained) if isinstance(pretrained, OptimizerNetwork) else load_network(pretrained, revision=revision)
        self.network = checks.parameters.usable_network(network).requires_grad_(False)
        self.kernels: dict[str, str] = {}  # what runs on each type of device
        self.error_if_nonfinite = error_if_nonfinite
        self._skipped, self._warned = 0, False  # tensors before this object was a copy; whether the user knows of them
        self._ledgers: dict[torch.device, Ledger] = {}
        self._networks: dict[torch.device, OptimizerNetwork] = {}  # copies of the network on devices where it is not
        checks.groups.check_caller(sys._getframe(1), parts_group)
        self._parts = None if parts_group is None else sharding.Parts(parts_group)
        self._layouts: dict[Any, sharding.ShardedLayout] = {}  # of the last steps; not those of all optimizers, as they hold meshes
        self._given: list[tuple[dict[str, Any], list[int]]] = []  # each group and the dimensions of its parameters
        self._options: list[tuple[Any, ...]] = []  # what the groups said at the last step
        # What is known of parameters: which of those that may be tables are, and which looked trained, see `Layout`.
        self._tables: dict[Tensor, bool] = {}
        self._trained: dict[Tensor, bool] = {}
        self._looks: tuple[Sequence[Tensor], tuple[bool, ...]] = (), ()  # the latter, of the last step's parameters
        defaults = {"lr": lr, "weight_decay": weight_decay, "total_steps": total_steps, "weights": fingerprint(self.network)}
        super().__init__(params, defaults | {"maximize": False, "matrices": matrices, "stacked": stacked})
        # OneCycleLR and CyclicLR want to cycle some momentum, unless told otherwise, of an optimizer that has one. The rule's is not theirs
        # to change; what they write into groups has no effect.
        self.defaults["momentum"] = self.network.config.momentum
        checks.groups.warn_of_trainer(sys._getframe(1), stacklevel=3)
        checks.groups.warn_of_lr(self.param_groups, stacklevel=3)
        checks.groups.warn_of_experts(checks.groups.named_parameters(self.param_groups), stacklevel=3)
        for device in {param.device: None for group in self.param_groups for param in group["params"]}:
            self._choose_kernel(device, stacklevel=3)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            checks.groups.check_keys(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.pop("momentum", None)
        try:
            checks.groups.check_group(group)
            for param in group["params"]:
                # What is frozen may be of any kind, as the integers of a quantised model, unless it gets a gradient one day.
                if param.requires_grad and not checks.parameters.is_lazy(param):
                    checks.parameters.check_parameter(param, self._name(param))
                    checks.parameters.check_format(param, self._name(param), self.network.config)
        except (ValueError, TypeError, RuntimeError):
            self.param_groups.pop()
            raise
        if "momentum" in self.defaults:  # which the constructor adds when it is done with its groups
            checks.groups.warn_of_lr([group], stacklevel=3)
            checks.groups.warn_of_experts(checks.groups.named_parameters([group]), stacklevel=3)
        self._given.append((group, [0 if checks.parameters.is_lazy(param) else param.ndim for param in group["params"]]))

    @property
    def skipped(self) -> int:
        """How many times a tensor was left out of a step because its gradient was not finite. To ask waits for a GPU."""
        return self._skipped + sum(int(ledger.skipped) for ledger in self._ledgers.values())

    def _name(self, param: Tensor) -> str:
        return checks.parameters.name_of(param, self.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # Kernels write to addresses, which torch.compile does not see: it would leave out what it takes for unused. So steps are not traced.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss; optional, and called once.

        Raises:
            RuntimeError: a parameter, its gradient or its state is none that can be trained with: sparse, flattened, of another shape; or,
                with `error_if_nonfinite`, a gradient is not finite. Nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.is_inference_mode_enabled():  # state that is made there could be changed nowhere else
            with torch.inference_mode(False), torch.no_grad():
                self._move()
        else:
            self._move()
        return loss

    def _move(self) -> None:
        checks.parameters.check_mode()
        self._options = checks.groups.changed_options(self.param_groups, self._options, stacklevel=8)
        # Each parameter with its gradient and group; a dict, so that a parameter named twice moves once.
        by_device: dict[torch.device, dict[int, tuple[Tensor, Tensor, dict[str, Any]]]] = defaultdict(dict)
        for group in self.param_groups:
            maximize = group["maximize"]
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if type(grad) is not Tensor or grad.layout is not torch.strided or grad.is_neg():
                    grad = checks.parameters.usable_gradient(grad, param, self._name(param))
                by_device[param.device][id(param)] = param, -grad if maximize else grad, group
        if not by_device:
            warnings.warn(
                "LearnedOptimizer.step() found no gradient on any of its parameters, so it changed nothing. Call loss.backward() first, "
                "and check that the optimizer was built from the parameters of the model that is being trained.",
                stacklevel=7,  # the caller of `step`, behind four wrappers of torch
            )
        work = [self._prepare(device, members.values()) for device, members in by_device.items()]
        if self.error_if_nonfinite:
            self._check_finite(filter(None, work))
        if self._parts is not None and not any(work):
            sit_out(sharding.ShardedLayout((), (), self._device(), parts=self._parts))
        for device, step, arguments in filter(None, work):
            mixed = torch.is_autocast_enabled(device.type)  # mostly not, and to switch it off takes longer than to look
            with torch.autocast(device.type, enabled=False) if mixed else contextlib.nullcontext():
                step(self._network_on(device), *arguments)
            ledger = arguments[-1]
            if not self._warned and device.type == "cpu" and ledger.skipped.item():
                self._warned = True
                warnings.warn(checks.state.left_out(by_device[device].values(), self.state, ledger.keys, self._name), stacklevel=7)

    def _device(self) -> torch.device:
        """Where the parameters are; of a process that has none, where those of the others will be."""
        params: list[Tensor] = [param for group in self.param_groups for param in group["params"]]
        if params:
            return params[0].device
        assert self._parts is not None
        return self._parts.device()

    def _prepare(
        self, device: torch.device, members: Iterable[tuple[Tensor, Tensor, dict[str, Any]]]
    ) -> tuple[torch.device, Callable[..., None], tuple[Any, ...]] | None:
        """What runs the rule for all parameters of a device at once, and on what; None where there is nothing to change. All that might be
        refused is looked at here, before any device has begun."""
        params, grads, states, groups, fresh = [], [], [], [], []
        for param, grad, group in members:
            state = self.state[param]  # looking a tensor up is slow enough to be done once
            if "control" not in state:
                fresh.append((param, state, group))
            if param.numel():
                params.append(param)
                grads.append(grad)
                states.append(state)
                groups.append(group)
        for param, _, _ in fresh:
            checks.parameters.check_place(param, self._name(param))
            checks.parameters.check_format(param, self._name(param), self.network.config)
        if fresh:
            for group, given in self._given:
                checks.parameters.check_flattened(group, given, f"parameter group with {len(given)} parameters")
        for param, state, group in fresh:
            with torch.autocast(device.type, enabled=False):
                state.update(init_state(param, self.network.config, group["stacked"]))
            self._tables.pop(param, None)
            self._trained.pop(param, None)
            self._looks = (), ()
        if not params:
            return None
        tables = tuple([is_long(param) and self._is_table(param, *rest) for param, *rest in zip(params, grads, states, strict=True)])
        trained = self._were_trained(params, states)
        whole = params
        if self._parts is not None or any(map(sharding.is_sharded_type, set(map(type, params)))):
            params = [sharding.local(param) for param in params]
            states = [{key: sharding.local(value) for key, value in state.items() if isinstance(value, Tensor)} for state in states]
        shapes = tuple([param.shape for param in params])
        if tuple([grad.shape for grad in grads]) != shapes:
            raise RuntimeError(
                f"a parameter was given other memory after its gradient was made: shapes {list(map(tuple, shapes))}, gradients "
                f"{[tuple(grad.shape) for grad in grads]}. Call zero_grad() after changing a model."
            )
        of_groups: tuple[tuple[Any, ...], ...] = ()
        if any(tables) or any(trained) or any(group["stacked"] or group["matrices"] is not None for group in self.param_groups):
            of_groups = *(tuple(group[key] for group in groups) for key in ("stacked", "matrices")), tables, trained
        layout = Layout.of(shapes, device, *of_groups) if whole is params else self._sharded_layout(whole, device, *of_groups)
        if device not in self._ledgers:
            self._ledgers[device] = Ledger(device, self.network.config, CONTROL, self._name)
        ledger = self._ledgers[device]
        ledger.check(layout, params, grads, states)
        horizons = layout.per_tensor([group["total_steps"] or math.inf for group in groups])
        rates, decays = ([group[key] for group in groups] for key in ("lr", "weight_decay"))
        kernel = self._choose_kernel(device, stacklevel=9)
        if isinstance(layout, sharding.ShardedLayout) and layout.runs is None:
            kernel = "reference"  # the others do not know where in their tensors the coordinates of these parts lie
        step = _step_function(kernel)
        return device, step, (layout, params, grads, states, horizons, rates, decays, ledger)

    def _is_table(self, param: Tensor, grad: Tensor, state: State) -> bool:
        """Whether few rows of a long matrix had a gradient when it first had one. The state remembers it; to look there waits for a GPU."""
        if param not in self._tables:
            row = state["control"][TABLE]
            if not row:
                used = sharding.rows_in_use(param, grad)
                row.fill_(0 if not used else 1 if used <= FEW else -1)
            if row:
                self._tables[param] = bool(row > 0)
        return self._tables.get(param, False)

    def _were_trained(self, params: Sequence[Tensor], states: Sequence[State]) -> tuple[bool, ...]:
        """Which parameters looked trained before their first step. The states remember it; to look there waits for a GPU, so it is done
        once, for all of them together."""
        before, looks = self._looks
        if len(before) == len(params) and all(map(operator.is_, before, params)):  # as nearly always, and to look tensors up takes longer
            return looks
        if not all(map(self._trained.__contains__, params)):
            try:
                found = torch.stack([state["control"][TRAINED] for state in states]).tolist()
            except (KeyError, TypeError, IndexError, RuntimeError):  # a state does not fit, and the ledger says how
                return ()
            for param, look in zip(params, found, strict=True):
                self._trained.setdefault(param, look > SURELY)
        self._looks = params, tuple([self._trained[param] for param in params])
        return self._looks[1]

    def _network_on(self, device: torch.device) -> OptimizerNetwork:
        """The network, or its copy on another device: a model may lie on several, and to move it at each step would take longer than the
        step."""
        if self.network.log_step_size.device == device:
            return self.network
        if device not in self._networks:
            self._networks[device] = copy.deepcopy(self.network).to(device)
        return self._networks[device]

    def _sharded_layout(self, params: Sequence[Tensor], device: torch.device, *of_groups: tuple[Any, ...]) -> sharding.ShardedLayout:
        shards = tuple([sharding.shards_of(param) if sharding.is_sharded(param) else None for param in params])
        shapes = tuple([param.shape for param in params])
        key = shapes, shards, device, *of_groups
        if key not in self._layouts:
            while len(self._layouts) >= MOST_LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
            stacked, matrices, tables, trained = of_groups or ((), (), (), ())
            self._layouts[key] = sharding.ShardedLayout(shapes, shards, device, stacked, matrices, tables, trained, self._parts)
        return self._layouts[key]

    def _check_finite(self, work: Iterable[tuple[torch.device, Callable[..., None], tuple[Any, ...]]]) -> None:
        found = []
        for device, _, (layout, params, grads, *_) in work:
            broken = torch.tensor([not checks.parameters.is_finite(grad) for grad in grads], dtype=torch.float32, device=device)
            if isinstance(layout, sharding.ShardedLayout):  # what one process finds all must know of, or they would wait for it
                broken = layout.total(broken)
            found += [self._name(param) for param, bad in zip(params, broken.tolist(), strict=True) if bad]
        if self._parts is not None and self._parts.any(bool(found), self._device()) and not found:
            found = ["a parameter of another process"]
        if found:
            raise RuntimeError(
                f"the gradient of {', '.join(found)} is not finite, or its square is not. Nothing was changed. With "
                "error_if_nonfinite=False, the default, the step leaves such parameters out."
            )

    def _choose_kernel(self, device: torch.device, stacklevel: int) -> str:
        """What runs the rule on a device; where that is not what one would expect, the first call for its type warns or raises."""
        if device.type not in self.kernels:
            fastest = {"cpu": "compiled", "cuda": "triton"}.get(device.type, "reference")
            chosen = fastest if self.kernel == "auto" else self.kernel
            if chosen == "compiled" and device.type != "cpu":
                chosen = "reference"
            if trouble := _trouble(chosen, self.network, device):
                if self.kernel == chosen:
                    raise RuntimeError(trouble)
                place = "a CPU" if device.type == "cpu" else "CUDA devices"
                message = f"{trouble} Steps on {place} take PyTorch operations instead, and several times as long."
                warnings.warn(message, stacklevel=stacklevel)
                chosen = "reference"
            self.kernels[device.type] = chosen
        return self.kernels[device.type]

    def __getstate__(self) -> dict[str, Any]:
        # Where a copy wakes up, other kernels may run.
        own = {"network": self.network, "kernel": self.kernel, "kernels": {}, "error_if_nonfinite": self.error_if_nonfinite}
        own |= {"_parts": self._parts, "_layouts": {}, "_given": self._given, "_options": []}
        own |= {"_tables": {}, "_trained": {}, "_looks": ((), ()), "_networks": {}}
        return {**super().__getstate__(), **own, "_skipped": self.skipped, "_ledgers": {}, "_warned": self._warned}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; the optimizer must run the same weights.

        Torch casts floating-point state to the parameter's dtype here, which would round the LSTM's state of a bf16 parameter. This
        restores each tensor as it was saved; where the file holds it in another precision, in the one that it needs.

        Raises:
            ValueError: the groups do not match, the state belongs to other weights or does not fit its parameter, or a number is out of
                range; the optimizer is as before.
        """
        if torch.is_inference_mode_enabled():  # state that is made there could be changed nowhere else
            with torch.inference_mode(False):
                self.load_state_dict(state_dict)
            return
        fitted: dict[Tensor, dict[str, Tensor]] = {}
        given = {id(group): dimensions for group, dimensions in self._given}
        dimensions = [given.get(id(group)) for group in self.param_groups]

        def check(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            fitted.clear()
            members = checks.groups.match(state_dict, self.param_groups, self.defaults, fingerprint(self.network))
            state = dict(state_dict["state"])
            for index, param in members.items():
                # An optimizer that has not begun may carry entries of the user's already.
                entry = state.get(index, {})
                if not isinstance(entry, dict) or any(key in entry for key in self._keys()):
                    name = self._name(param)
                    fitted[param] = checks.state.fitted(param, name, entry, self.network.config, CONTROL)
                    state[index] = {key: value for key, value in entry.items() if key not in fitted[param]}
            options = {key: self.defaults[key] for key in checks.groups.LATER}
            return {**state_dict, "state": state, "param_groups": [options | group for group in state_dict["param_groups"]]}

        def restore(_: torch.optim.Optimizer) -> None:
            for group in self.param_groups:
                checks.groups.check_group(group)
            groups = zip(self.param_groups, dimensions, strict=True)  # which torch has replaced
            self._given = [(group, known) for group, known in groups if known is not None]
            for param, state in fitted.items():
                self.state[param] = {**state, **self.state[param]}
            self._tables.clear()
            self._trained.clear()
            self._looks = (), ()

        # Between the user's hooks: one of theirs may replace the dict before, and those after find the state as it was saved.
        hooks = [self.register_load_state_dict_pre_hook(check), self.register_load_state_dict_post_hook(restore, prepend=True)]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _keys(self) -> tuple[str, ...]:
        """What the rule keeps of a parameter."""
        return tuple(checks.state.expected(torch.empty(0), self.network.config, CONTROL))


def is_long(param: Tensor) -> bool:
    """Whether a parameter's shape is one that embeddings of words have."""
    return param.ndim == 2 and param.shape[0] >= max(ROWS, TALL * param.shape[1])


def init_state(param: Tensor, config: NetworkConfig, stacked: bool = False) -> State:
    """The state of a parameter that has seen no gradient.

    What belongs to coordinates is placed like the parameter, and of a DTensor sharded like it, in the formats of the configuration:
    `moments`, momentum and second moment, (2, *shape), and `lstm`, hidden units, then cells, (2 H, *shape), to which "int8" adds
    `lstm_scale`, (2 H, blocks). `control`, see `rule.Control`, is (CONTROL,) and fp32, and whole in each process; its
    first number is the parameter's steps.
    """
    layout = Layout.of((param.shape,), param.device, (stacked,))
    looks = layout.looks_trained(sharding.whole(param).detach().reshape(-1).float())
    state = {"control": Control.of(looks.new_zeros(CONTROL, 1))._replace(trained=looks).rows()[:, 0]}
    for key, tensor in stored(config).items():
        count = sum(tensor.counts)
        values, scales = zeros(sharding.local(param), count, tensor.fmt)
        state[key] = sharding.like(param, values, count) if sharding.is_sharded(param) else values
        if scales is not None:
            state[f"{key}_scale"] = scales
    return state


def _trouble(kernel: str, network: OptimizerNetwork, device: torch.device) -> str | None:
    """Why a kernel cannot run a network on a device, or None."""
    if kernel == "compiled":
        return cpu.trouble(network)
    if kernel == "reference":
        return None
    try:
        from .kernels import gpu  # imports Triton, which takes longer than the whole package
    except ImportError as error:
        return f"the Triton kernel needs Triton, and it cannot be imported ({error}). Install it with: pip install triton."
    return gpu.trouble(network, device)


def _step_function(kernel: str) -> Callable[..., None]:
    if kernel == "triton":
        from .kernels import gpu

        return gpu.step
    return cpu.step if kernel == "compiled" else reference.step
