"""The contract of torch's optimizers, driven by torch's own machinery for testing them.

Torch ships `OptimizerInfo`, `optims` and a table of errors that every optimizer must raise, but keeps the test bodies in its repository.
The bodies here check the same properties, written for one optimizer without the `foreach`, `fused`, `capturable` and `maximize` variants.
"""

from __future__ import annotations

import copy
import io
import unittest
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rule_helpers import acting_network
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from learned_optim.optimizer import LearnedOptimizer

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Fail to import hypothesis", ImportWarning)
    from torch.testing._internal.common_device_type import instantiate_device_type_tests
    from torch.testing._internal.common_optimizers import (
        ErrorOptimizerInput,
        OptimizerErrorEnum,
        OptimizerInfo,
        OptimizerInput,
        get_error_inputs_for_all_optims,
        optims,
    )
    from torch.testing._internal.common_utils import TestCase, parametrize

# That import forbids `torch.backends.cudnn.deterministic = ...` and the like in the whole process; other tests may want them.
torch.backends.__allow_nonbracketed_mutation_flag = True


NETWORK = acting_network()


def inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    options: dict[str, dict[str, Any]] = {
        "default": {},
        "non-default lr": {"lr": 0.5},
        "tensor lr": {"lr": torch.tensor(0.5)},
        "weight decay": {"weight_decay": 0.1},
        "horizon": {"total_steps": 30},
        "everything": {"lr": 0.5, "weight_decay": 0.1, "total_steps": 30},
    }
    return [OptimizerInput(params=None, kwargs={"pretrained": NETWORK, **kwargs}, desc=desc) for desc, kwargs in options.items()]


def error_inputs(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    def refused(kwargs: dict[str, Any], message: str) -> ErrorOptimizerInput:
        return ErrorOptimizerInput(OptimizerInput(params=None, kwargs=kwargs), error_type=ValueError, error_regex=message)

    sparse = Parameter(torch.ones(3, 2, device=device, dtype=dtype))
    sparse.grad = torch.ones_like(sparse).to_sparse()
    return [
        *get_error_inputs_for_all_optims(device, dtype),
        refused({"lr": -1.0}, "must not be negative, got -1.0"),
        refused({"weight_decay": -1.0}, "must not be negative, got -1.0"),
        refused({"total_steps": 0}, "must be a positive number of optimizer steps"),
        ErrorOptimizerInput(
            OptimizerInput(params=[Parameter(torch.ones(2, device=device, dtype=torch.complex64))], kwargs={}),
            error_type=ValueError,
            error_regex="complex64",
        ),
        ErrorOptimizerInput(
            OptimizerInput(params=[sparse], kwargs={}),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_type=RuntimeError,
            error_regex="does not support sparse gradients",
        ),
    ]


LEARNED = OptimizerInfo(
    LearnedOptimizer,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=(
        [lambda optimizer: StepLR(optimizer, gamma=0.9, step_size=10)],
        [lambda optimizer: LinearLR(optimizer, start_factor=0.4, total_iters=4)],
        [lambda optimizer: ExponentialLR(optimizer, gamma=0.95), lambda optimizer: ReduceLROnPlateau(optimizer)],
    ),
    supported_impls=(),
    not_og_supported_flags=(),
    supports_complex=False,
)


def closure_for(weight: Tensor, bias: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    """The loss of a linear map on a fixed input."""
    vector = torch.linspace(-1, 1, 5, device=weight.device, dtype=weight.dtype)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(vector) + bias).pow(2).sum()
        loss.backward()
        return loss

    return closure


def advance(scheduler: Any, loss: Tensor) -> None:
    scheduler.step(*[loss.detach()] if isinstance(scheduler, ReduceLROnPlateau) else [])


class TestContract(TestCase):
    def params(self, device: str, dtype: torch.dtype, contiguous: bool = True) -> tuple[Parameter, Parameter]:
        """The same weight (10, 5) and bias (10,) at every call."""
        generator = torch.Generator().manual_seed(0)
        weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in [(10, 5), (10,)])
        if not contiguous:
            weight, bias = (torch.stack([tensor, tensor], -1)[..., 0] for tensor in (weight, bias))
            self.assertFalse(weight.is_contiguous() or bias.is_contiguous())
        return Parameter(weight), Parameter(bias)

    def runs(self, device: str, dtype: torch.dtype, info: OptimizerInfo) -> Iterator[tuple[Parameter, Parameter, torch.optim.Optimizer]]:
        """A weight, a bias and an optimizer of both, for every set of options."""
        for optim_input in info.optim_inputs_func(device, dtype):
            with self.subTest(optim_input.desc):
                weight, bias = self.params(device, dtype)
                yield weight, bias, info.optim_cls([weight, bias], **copy.deepcopy(optim_input.kwargs))

    @optims([LEARNED])
    def test_errors(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for error_input in optim_info.optim_error_inputs_func(device, dtype):
            case = error_input.optimizer_error_input
            params = [Parameter(torch.ones(2, device=device, dtype=dtype))] if case.params is None else case.params
            with self.subTest(case.desc):
                optimizer = None
                if error_input.error_on is OptimizerErrorEnum.STEP_ERROR:
                    optimizer = optim_info.optim_cls(params, pretrained=NETWORK, **case.kwargs)
                expect = self.assertWarnsRegex if issubclass(error_input.error_type, Warning) else self.assertRaisesRegex
                with expect(error_input.error_type, error_input.error_regex):
                    if optimizer is None:
                        optim_info.optim_cls(params, pretrained=NETWORK, **case.kwargs)
                    else:
                        optimizer.step()

    @parametrize("contiguous", [True, False])
    @parametrize("with_lrsched", [True, False])
    @optims([LEARNED])
    def test_forloop_goes_right_direction(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo, contiguous: bool, with_lrsched: bool
    ) -> None:
        for makers in optim_info.scheduler_inputs if with_lrsched else [[]]:
            for optim_input in optim_info.optim_inputs_func(device, dtype):
                with self.subTest(optim_input.desc):
                    weight, bias = self.params(device, dtype, contiguous)
                    optimizer = optim_info.optim_cls([weight, bias], **copy.deepcopy(optim_input.kwargs))
                    schedulers = [make(optimizer) for make in makers]
                    closure = closure_for(weight, bias, optimizer)
                    first = closure().item()
                    for _ in range(12):
                        loss = closure()
                        optimizer.step()
                        for scheduler in schedulers:
                            advance(scheduler, loss)
                    self.assertLess(closure().item(), 0.95 * first)

    @optims([LEARNED])
    def test_param_groups_with_lrscheduler_go_right_direction(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for makers in optim_info.scheduler_inputs:
            weight, bias = self.params(device, dtype)
            optimizer = optim_info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 0.3}], pretrained=NETWORK)
            schedulers = [make(optimizer) for make in makers]
            closure = closure_for(weight, bias, optimizer)
            first = closure().item()
            for _ in range(20):
                loss = optimizer.step(closure)
                for scheduler in schedulers:
                    advance(scheduler, loss)
            self.assertLess(closure().item(), 0.95 * first)
            ratio = optimizer.param_groups[1]["lr"] / optimizer.param_groups[0]["lr"]
            self.assertEqual(float(ratio), 0.3)

    @parametrize("num_dim", [0, 1])
    @optims([LEARNED])
    def test_tensor_lr(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo, num_dim: int) -> None:
        for optim_input in optim_info.optim_inputs_func(device, dtype):
            kwargs = copy.deepcopy(optim_input.kwargs)
            number = float(kwargs.pop("lr", 1.0))
            weight, bias = self.params(device, dtype)
            other_weight, other_bias = self.params(device, dtype)
            scalar, other_scalar = (Parameter(torch.ones((), device=device, dtype=dtype)) for _ in range(2))
            optimizer = optim_info.optim_cls([weight, bias, scalar], lr=torch.tensor([number] if num_dim else number), **kwargs)
            other = optim_info.optim_cls([other_weight, other_bias, other_scalar], lr=number, **kwargs)
            for _ in range(5):
                optimizer.step(closure_for(weight, bias + scalar, optimizer))
                other.step(closure_for(other_weight, other_bias + other_scalar, other))
                self.assertEqual([weight, bias, scalar], [other_weight, other_bias, other_scalar])
            self.assertEqual(optimizer.param_groups[0]["lr"].dim(), num_dim)

    @optims([LEARNED])
    def test_param_groups_lr(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """A group with lr=0 stays where it is, and the other does as well as it can alone."""
        weight, bias = self.params(device, dtype)
        before = weight.detach().clone()
        optimizer = optim_info.optim_cls([{"params": [weight], "lr": 0.0}, {"params": [bias]}], pretrained=NETWORK, weight_decay=0.1)
        closure = closure_for(weight, bias, optimizer)
        first = closure().item()
        for _ in range(20):
            optimizer.step(closure)
        self.assertEqual(weight, before, rtol=0, atol=0)
        self.assertLess(closure().item(), first)

    @optims([LEARNED])
    def test_param_groups_weight_decay(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """The group with weight decay ends up smaller than without."""
        sizes = []
        for weight_decay in (0.0, 3.0):
            weight, bias = self.params(device, dtype)
            optimizer = optim_info.optim_cls([{"params": [weight], "weight_decay": weight_decay}, {"params": [bias]}], pretrained=NETWORK)
            closure = closure_for(weight, bias, optimizer)
            for _ in range(20):
                optimizer.step(closure)
            sizes.append(weight.norm().item())
        self.assertLess(sizes[1], 0.9 * sizes[0])

    @optims([LEARNED])
    def test_step_is_noop_when_params_have_no_grad(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for weight, bias, optimizer in self.runs(device, dtype, optim_info):
            before = [weight.detach().clone(), bias.detach().clone()]
            with self.assertWarnsRegex(UserWarning, "found no gradient"):
                optimizer.step()
            self.assertEqual([weight, bias], before, rtol=0, atol=0)
            self.assertEqual(len(optimizer.state), 0)

    @optims([LEARNED])
    def test_step_is_noop_for_zero_grads(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for weight, bias, optimizer in self.runs(device, dtype, optim_info):
            before = [weight.detach().clone(), bias.detach().clone()]
            weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
            for _ in range(3):
                optimizer.step()
            self.assertEqual([weight, bias], before, rtol=0, atol=0)

    @optims([LEARNED])
    def test_optimizer_can_be_printed(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for _, _, optimizer in self.runs(device, dtype, optim_info):
            text = repr(optimizer)
            self.assertIn("LearnedOptimizer", text)
            for key in ("lr", "weight_decay", "total_steps", "weights"):
                self.assertIn(f"{key}: {optimizer.param_groups[0][key]}", text)

    @optims([LEARNED])
    def test_state_is_made_in_step(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for weight, bias, optimizer in self.runs(device, dtype, optim_info):
            self.assertEqual(len(optimizer.state), 0)
            optimizer.step(closure_for(weight, bias, optimizer))
            self.assertEqual(set(optimizer.state), {weight, bias})
            for state in optimizer.state.values():
                self.assertTrue(all(isinstance(value, Tensor) for value in state.values()))

    @parametrize("is_named", [True, False])
    @optims([LEARNED], dtypes=[torch.float32, torch.bfloat16])
    def test_state_dict_deterministic(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo, is_named: bool) -> None:
        """Loading does not change the dict, and training goes on the same from there, with equal dicts at its end."""
        for optim_input in optim_info.optim_inputs_func(device, dtype):

            def make(weight: Parameter, bias: Parameter, kwargs: dict[str, Any] = optim_input.kwargs) -> torch.optim.Optimizer:
                params = [("weight", weight), ("bias", bias)] if is_named else [weight, bias]
                return optim_info.optim_cls(params, **copy.deepcopy(kwargs))

            weight, bias = self.params(device, dtype)
            optimizer = make(weight, bias)
            closure = closure_for(weight, bias, optimizer)
            for _ in range(5):
                optimizer.step(closure)
            other_weight, other_bias = (Parameter(param.detach().clone()) for param in (weight, bias))
            other = make(other_weight, other_bias)
            other_closure = closure_for(other_weight, other_bias, other)
            saved = copy.deepcopy(optimizer.state_dict())
            kept = copy.deepcopy(saved)
            other.load_state_dict(saved)
            for _ in range(5):
                optimizer.step(closure)
                other.step(other_closure)
                self.assertEqual([weight, bias], [other_weight, other_bias], rtol=0, atol=0)
            self.assertEqual(saved, kept, rtol=0, atol=0)
            self.assertEqual(optimizer.state_dict(), other.state_dict(), rtol=0, atol=0)
            self.assertEqual("param_names" in other.param_groups[0], is_named)

    @parametrize("saved_named", [True, False])
    @parametrize("loaded_named", [True, False])
    @optims([LEARNED])
    def test_named_and_unnamed_load(
        self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo, saved_named: bool, loaded_named: bool
    ) -> None:
        """Names in the dict replace those of the optimizer; without them it keeps its own."""

        def make(named: bool, names: tuple[str, str]) -> tuple[Parameter, Parameter, torch.optim.Optimizer]:
            params = self.params(device, dtype)
            return *params, optim_info.optim_cls(zip(names, params, strict=True) if named else params, pretrained=NETWORK)

        weight, bias, optimizer = make(saved_named, ("weight", "bias"))
        optimizer.step(closure_for(weight, bias, optimizer))
        other_weight, other_bias, other = make(loaded_named, ("a", "b"))
        other.load_state_dict(optimizer.state_dict())
        self.assertEqual(other.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)
        expected = ["weight", "bias"] if saved_named else ["a", "b"] if loaded_named else None
        self.assertEqual(other.param_groups[0].get("param_names"), expected)
        other.step(closure_for(other_weight, other_bias, other))

    @optims([LEARNED], dtypes=[torch.float32, torch.bfloat16])
    def test_save_load_equality_with_weights_only(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for weight, bias, optimizer in self.runs(device, dtype, optim_info):
            closure = closure_for(weight, bias, optimizer)
            for _ in range(3):
                optimizer.step(closure)
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            for weights_only in (True, False):
                file.seek(0)
                self.assertEqual(torch.load(file, weights_only=weights_only), optimizer.state_dict(), rtol=0, atol=0)

    @optims([LEARNED])
    def test_state_dict_hooks(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """Pre-hooks see the optimizer, post-hooks the dict, which they may replace; `prepend` puts one first."""
        for _, _, optimizer in self.runs(device, dtype, optim_info):
            calls: list[str] = []
            optimizer.register_state_dict_pre_hook(lambda _, calls=calls: calls.append("pre"))
            optimizer.register_state_dict_pre_hook(lambda _, calls=calls: calls.append("first pre"), prepend=True)
            optimizer.register_state_dict_post_hook(lambda _, state, calls=calls: calls.append("post") or {**state, "extra": 1})
            optimizer.register_state_dict_post_hook(lambda _, state, calls=calls: calls.append("first post"), prepend=True)
            self.assertEqual(optimizer.state_dict()["extra"], 1)
            self.assertEqual(calls, ["first pre", "pre", "first post", "post"])

    @optims([LEARNED])
    def test_load_state_dict_hooks(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """A pre-hook may change or replace the dict; the user's hooks are all that is left afterwards."""

        def halve_lr(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            for group in state_dict["param_groups"]:
                group["lr"] = 0.5 * group["lr"]

        for weight, bias, optimizer in self.runs(device, dtype, optim_info):
            optimizer.step(closure_for(weight, bias, optimizer))
            other = optim_info.optim_cls(self.params(device, dtype), pretrained=NETWORK)
            calls: list[str] = []
            other.register_load_state_dict_pre_hook(halve_lr)
            other.register_load_state_dict_pre_hook(
                lambda _, state, calls=calls: calls.append("first pre") or copy.deepcopy(state), prepend=True
            )
            other.register_load_state_dict_post_hook(lambda _, calls=calls: calls.append("post"))
            other.register_load_state_dict_post_hook(lambda _, calls=calls: calls.append("first post"), prepend=True)
            for _ in range(2):
                calls.clear()
                optimizer.step()
                other.load_state_dict(optimizer.state_dict())
                self.assertEqual(calls, ["first pre", "first post", "post"])
                self.assertEqual(
                    [len(other._optimizer_load_state_dict_pre_hooks), len(other._optimizer_load_state_dict_post_hooks)], [2, 2]
                )
                self.assertEqual(float(other.param_groups[0]["lr"]), 0.5 * float(optimizer.param_groups[0]["lr"]))
                self.assertEqual(other.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)

    @optims([LEARNED])
    def test_step_hooks(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        """Global and own, before and after the step; a pre-hook may change the arguments; a removed hook is not called."""
        for weight, bias, optimizer in self.runs(device, dtype, optim_info):
            calls: list[str] = []
            closure = closure_for(weight, bias, optimizer)
            handles = [
                register_optimizer_step_pre_hook(lambda *_, calls=calls: calls.append("global pre")),
                optimizer.register_step_pre_hook(lambda self, args, kwargs, calls=calls, c=closure: calls.append("pre") or ((self, c), {})),
                optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("post")),
                register_optimizer_step_post_hook(lambda *_, calls=calls: calls.append("global post")),
            ]
            self.assertIsNotNone(optimizer.step())
            for handle in handles:
                handle.remove()
            optimizer.step()
            self.assertEqual(calls, ["global pre", "pre", "post", "global post"])

    @optims([LEARNED])
    def test_deepcopy_copies_all_public_attributes(self, device: str, dtype: torch.dtype, optim_info: OptimizerInfo) -> None:
        for weight, bias, optimizer in self.runs(device, dtype, optim_info):
            optimizer.step(closure_for(weight, bias, optimizer))
            clone = copy.deepcopy(optimizer)
            public, cloned = ({name for name in vars(each) if not name.startswith("_")} for each in (optimizer, clone))
            self.assertEqual(public, cloned)
            self.assertEqual(clone.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
            self.assertEqual(dict(clone.network.state_dict()), dict(optimizer.network.state_dict()), rtol=0, atol=0)


instantiate_device_type_tests(TestContract, globals(), only_for=("cpu", "cuda"))
if "TestContractCUDA" in globals():
    pytest.mark.gpu(globals()["TestContractCUDA"])

if __name__ == "__main__":
    unittest.main()
