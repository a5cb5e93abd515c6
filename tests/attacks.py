"""Attacks the package and counts what becomes of it: `python tests/attacks.py` writes benchmarks/results/attacks.json.

Files are damaged (fuzz.py), states replaced by what does not fit, gradients and parameters made of every kind, and runs killed. Each must
be refused by an error that names what is wrong, with nothing changed, or go well: then the compiled kernel does what the rule says, and a
killed run goes on with the same bits. States and gradients are tried in processes of their own, so that a crash is counted.

The program takes some ten minutes, and goes on where it was stopped. tests/test_attacks_*.py try a few of each.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fuzz import fuzz, targets
from meta_train_helpers import acting_network, tiny_config, tiny_task
from optimizer_helpers import assert_same, make_model, train, values
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, load_network
from learned_optim.meta_train import meta_train

RESULTS = Path(__file__).parents[1] / "benchmarks/results/attacks.json"
REFUSED, FINE = "refused by name", "as the rule says"


class Labelled(Tensor):
    """A subclass that only has a name."""


def freed(tensor: Tensor, size: int = 0) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(size)
    return tensor


def inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


# States

# What a tensor of the state is replaced by; in a checkpoint, and in the optimizer's hands.
TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "float16": lambda tensor: tensor.half(),
    "bfloat16": lambda tensor: tensor.bfloat16(),
    "float64": lambda tensor: tensor.double(),
    "float8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "int32": lambda tensor: tensor.int(),
    "int64": lambda tensor: tensor.long(),
    "uint8": lambda tensor: tensor.to(torch.uint8),
    "bool": lambda tensor: tensor.bool(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "NumPy": lambda tensor: tensor.float().numpy(),
    "list": lambda tensor: tensor.tolist(),
    "None": lambda tensor: None,
    "dictionary": lambda tensor: {"tensor": tensor},
    "flat": lambda tensor: tensor.flatten(),
    "one dimension more": lambda tensor: tensor[None],
    "transposed": lambda tensor: tensor.transpose(0, -1),
    "doubled": lambda tensor: torch.cat([tensor, tensor], -1),
    "halved": lambda tensor: tensor[..., : (tensor.shape[-1] + 1) // 2],
    "empty": lambda tensor: tensor[:0],
    "scalar": lambda tensor: tensor.flatten()[0],
    "expanded": lambda tensor: tensor.flatten()[0].expand(tensor.shape),
    "with gaps": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "negated": lambda tensor: torch._neg_view(-tensor),
    "imaginary part of a conjugate": lambda tensor: torch.complex(torch.zeros_like(tensor.float()), -tensor.float()).conj().imag,
    "sparse": lambda tensor: tensor.to_sparse(),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor.float()]),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
    "mkldnn": lambda tensor: tensor.float().to_mkldnn(),
    "on meta": lambda tensor: tensor.to("meta"),
    "zeros that have no memory": lambda tensor: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype),
    "freed": freed,
    "too little memory": lambda tensor: freed(tensor, 4),
    "subclass": lambda tensor: tensor.as_subclass(Labelled),
    "parameter": lambda tensor: nn.Parameter(tensor.float()),
    "part of a graph": lambda tensor: tensor.float().requires_grad_() * 1,
    "of inference mode": inference,
    "NaN": lambda tensor: torch.full(tensor.shape, torch.nan),
    "infinite": lambda tensor: torch.full(tensor.shape, torch.inf),
    "1e30": lambda tensor: torch.full(tensor.shape, 1e30),
    "1e200": lambda tensor: torch.full(tensor.shape, 1e200, dtype=torch.float64),
    "denormal": lambda tensor: torch.full(tensor.shape, 1e-42),
    "negative": lambda tensor: -tensor.float().abs() - 1,
}


def _group(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: saved["param_groups"][0].__setitem__(key, value)


def _state(index: int, entry: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: saved["state"].__setitem__(index, entry)


# What is done to a checkpoint as a whole.
CHECKPOINTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{f"{key}={value!r:.20}": _group(key, value) for key in ("lr", "weight_decay") for value in (torch.nan, torch.inf, -1, "x", 10**400)},
    **{f"{key}={value!r:.20}": _group(key, value) for key in ("total_steps", "matrices") for value in (0, -1, 1.5, "x", True, 10**400)},
    **{f"{key}={value!r:.20}": _group(key, value) for key in ("maximize", "stacked") for value in (None, "x", torch.tensor(True))},
    "lr of two": _group("lr", torch.ones(2)),
    "complex lr": _group("lr", torch.tensor(1 + 0j)),
    "lr on meta": _group("lr", torch.tensor(1.0, device="meta")),
    "weights of others": _group("weights", "sha256:0"),
    "parameters reversed": lambda saved: saved["param_groups"][0]["params"].reverse(),
    "a parameter twice": lambda saved: saved["param_groups"][0]["params"].__setitem__(0, 1),
    "a parameter missing": lambda saved: saved["param_groups"][0]["params"].pop(),
    "names in another order": lambda saved: saved["param_groups"][0]["param_names"].reverse(),
    "too few names": lambda saved: saved["param_groups"][0]["param_names"].pop(),
    "a group more": lambda saved: saved["param_groups"].append(saved["param_groups"][0]),
    "a state for nobody": _state(99, {}),
    **{f"a state that is {entry!r}": _state(0, entry) for entry in (None, "x", [1], 3)},
    "an entry of the user": lambda saved: saved["state"][0].__setitem__("seen", 3),
    "states swapped": lambda saved: saved["state"].update({0: saved["state"][1], 1: saved["state"][0]}),
    "numbers as text": lambda saved: saved.update(state={str(key): state for key, state in saved["state"].items()}),
    "no state": lambda saved: saved.pop("state"),
    "no groups": lambda saved: saved.pop("param_groups"),
    "nothing changed": lambda saved: None,
}
POISONS = (torch.nan, torch.inf, -torch.inf, -1e30)  # that something writes to the state's memory
NETWORKS = ("default", "small")
KEYS = {"default": ("control", "moments", "lstm"), "small": ("control", "moments", "lstm", "lstm_scale")}


def state_attacks() -> Iterator[tuple[str, Callable[[str], str]]]:
    """Each attack's name, and what it does with a kernel: it returns what became of it, or raises AssertionError."""
    for network in NETWORKS:
        for key, kind in itertools.product(KEYS[network], TENSORS):
            for way in (_in_a_checkpoint, _in_hand):
                yield f"{network}, {key}: {kind}, {way.__name__}", lambda kernel, a=(way, network, key, kind): a[0](kernel, *a[1:])
        for key, poison, last in itertools.product(KEYS[network], POISONS, (False, True)):
            if (network, key) != ("small", "lstm"):  # int8 has no such numbers
                yield f"{network}, {key}: {poison} in place, {last}", lambda kernel, a=(network, key, poison, last): _in_place(kernel, *a)
        for name in CHECKPOINTS:
            yield f"{network}, checkpoint: {name}", lambda kernel, a=(network, name): _load(kernel, a[0], CHECKPOINTS[a[1]])


weights = functools.cache(load_network)


def begun(kernel: str, network: str) -> tuple[nn.Module, LearnedOptimizer]:
    model = make_model()
    optimizer = LearnedOptimizer(model.named_parameters(), weights(network), kernel=kernel)
    train(model, optimizer, range(2))
    return model, optimizer


def _load(kernel: str, network: str, edit: Callable[[dict[str, Any]], Any]) -> tuple[str, list[Tensor]]:
    saved = copy.deepcopy(begun(kernel, network)[1].state_dict())
    edit(saved)
    model, optimizer = begun(kernel, network)
    return outcome(model, optimizer, lambda: optimizer.load_state_dict(saved))


def _in_a_checkpoint(kernel: str, network: str, key: str, kind: str) -> tuple[str, list[Tensor]]:
    def edit(saved: dict[str, Any]) -> None:
        saved["state"][0][key] = TENSORS[kind](saved["state"][0][key].clone())

    return _load(kernel, network, edit)


def _in_hand(kernel: str, network: str, key: str, kind: str) -> tuple[str, list[Tensor]]:
    model, optimizer = begun(kernel, network)
    state = optimizer.state[model.first.weight]
    kept, state[key] = state[key], TENSORS[kind](state[key].clone())
    before = values(model)
    message = refusal(optimizer.step)
    if message is None:
        return finished(model)
    assert "first.weight" in message, message
    assert_same(values(model), before)
    state[key] = kept
    optimizer.step()
    return REFUSED, []


def _in_place(kernel: str, network: str, key: str, poison: float, last: bool) -> tuple[str, list[Tensor]]:
    """The parameter must stay where it is, and be counted, while the others move."""
    model, optimizer = begun(kernel, network)
    optimizer.state[model.first.weight][key].view(-1)[-1 if last else 0] = poison
    for skipped in (1, 2):
        before = values(model)
        optimizer.step()
        assert {name for name, value in values(model).items() if value.equal(before[name])} == {"first.weight", "empty"}
        assert optimizer.skipped == skipped
    return finished(model)


def refusal(call: Callable[[], object]) -> str | None:
    """The message of the error that a call ends with; None where it ends well."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def outcome(model: nn.Module, optimizer: LearnedOptimizer, attack: Callable[[], object]) -> tuple[str, list[Tensor]]:
    """What became of an attack that may be refused, after which training goes on."""
    before = copy.deepcopy((values(model), optimizer.state_dict()))
    message = refusal(attack)
    if message is not None:
        assert any(word in message for word in ("state", "group", "lr", "weight_decay", "must be")), f"names nothing: {message}"
        assert_same((values(model), optimizer.state_dict()), before)
    train(model, optimizer, range(5, 6))
    return finished(model) if message is None else (REFUSED, [])


def finished(model: nn.Module) -> tuple[str, list[Tensor]]:
    found = [param.detach().clone() for param in model.parameters()]
    assert all(param.isfinite().all() for param in found), "parameters are not finite"
    return FINE, found


# Gradients and parameters

SHAPES = [(), (1,), (7,), (3, 4), (4, 3, 2, 2)]
# A parameter of a shape, made of numbers, and its gradient.
PARAMETERS: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda value: value.double(),
    "bfloat16": lambda value: value.bfloat16(),
    "float16": lambda value: value.half(),
    "float8": lambda value: value.to(torch.float8_e5m2),
    "complex": lambda value: value.to(torch.complex64),
    "transposed": lambda value: value.mT.contiguous().mT if value.dim() > 1 else value,
    "channels last": lambda value: value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value,
    "with gaps": lambda value: value.repeat_interleave(2, -1)[..., ::2] if value.dim() else value,
    "part of a larger one": lambda value: torch.cat([torch.ones(1), value.flatten()])[1:].view(value.shape),
    "expanded": lambda value: torch.ones(()).expand(value.shape),
    "overlapping": lambda value: torch.ones(value.numel() + 9).as_strided(value.shape, (1,) * value.dim()),
    "negated": lambda value: torch._neg_view(value),
    "zeros that have no memory": lambda value: torch._efficientzerotensor(value.shape),
    "freed": freed,
    "on meta": lambda value: value.to("meta"),
    "sparse": lambda value: value.to_sparse(),
    "mkldnn": lambda value: value.to_mkldnn() if value.dim() else value,
    "nested": lambda value: torch.nested.nested_tensor([value]) if value.dim() else value,
    "subclass": lambda value: value.as_subclass(Labelled),
    "huge": lambda value: value * 1e38,
    "denormal": lambda value: value * 1e-40,
    "with a NaN": lambda value: torch.cat([torch.full((1,), torch.nan), value.flatten()[1:]]).view(value.shape),
}
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda grad: grad,
    "parameter": nn.Parameter,
    "subclass": lambda grad: grad.as_subclass(Labelled),
    "negated": lambda grad: torch._neg_view(-grad),
    "imaginary part of a conjugate": lambda grad: torch.complex(torch.zeros_like(grad), -grad).conj().imag,
    "zeros that have no memory": lambda grad: torch._efficientzerotensor(grad.shape),
    "expanded": lambda grad: grad.flatten()[0].expand(grad.shape),
    "overlapping": lambda grad: torch.arange(grad.numel() + 9.0).as_strided(grad.shape, (1,) * grad.dim()),
    "transposed": lambda grad: grad.mT.contiguous().mT if grad.dim() > 1 else grad,
    "channels last": lambda grad: grad.contiguous(memory_format=torch.channels_last) if grad.dim() == 4 else grad,
    "with gaps": lambda grad: grad.repeat_interleave(2, -1)[..., ::2] if grad.dim() else grad,
    "part of a larger one": lambda grad: torch.cat([torch.ones(1), grad.flatten()])[1:].view(grad.shape),
    "part of a graph": lambda grad: grad.clone().requires_grad_() * 1,
    "of inference mode": inference,
    "sparse": lambda grad: grad.to_sparse(),
    "freed": freed,
    "zero": lambda grad: grad * 0,
    "denormal": lambda grad: grad * 1e-40,
    "huge": lambda grad: grad * 1e15,
    **{str(poison): lambda grad, poison=poison: torch.full_like(grad, poison) for poison in (torch.nan, torch.inf, -torch.inf, 1e20, 3e38)},
}


def gradient_attacks() -> Iterator[tuple[str, Callable[[str], tuple[str, list[Tensor]]]]]:
    for kind in PARAMETERS:
        yield f"parameter: {kind}", lambda kernel, kind=kind: of_shapes(kernel, PARAMETERS[kind], GRADIENTS["plain"])
    for kind in GRADIENTS:
        yield f"gradient: {kind}", lambda kernel, kind=kind: of_shapes(kernel, PARAMETERS["subclass"], GRADIENTS[kind])


def of_shapes(kernel: str, of_values: Callable[[Tensor], Tensor], of_grads: Callable[[Tensor], Tensor]) -> tuple[str, list[Tensor]]:
    """Three steps of two parameters of each shape, of which the first is plain."""
    refused, found = 0, []
    for shape in SHAPES:
        plain, built = nn.Parameter(torch.ones(shape)), of_values(torch.ones(shape))
        stands = [plain.detach().clone()]

        def steps(shape=shape, plain=plain, built=built, stands=stands) -> None:
            param = nn.Parameter(built)
            optimizer = LearnedOptimizer([("plain", plain), ("odd", param)], weights("default"), kernel=kernel)
            for seed in range(3):
                plain.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                param.grad = of_grads(plain.grad).to(param) if param.is_meta or param.dtype != torch.float32 else of_grads(plain.grad)
                optimizer.step()
                stands.append(plain.detach().clone())
            found.extend([plain.detach(), param.detach().as_subclass(Tensor).nan_to_num().float()])

        message = refusal(steps)
        if message is not None:
            assert "odd" in message, message
            assert plain.equal(stands[-1]), "the other parameter moved"
            refused += 1
        else:
            assert plain.isfinite().all()
            assert plain.ne(1).all(), "the other parameter stands still"
            assert found[-1].isfinite().all()
    return (REFUSED if refused else FINE), found


# Outcomes

Attack = Callable[[str], tuple[str, list[Tensor]]]


def tried(attack: Attack) -> str:
    """What both kernels make of an attack, which must be the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (first, ours), (second, reference) = attack("compiled"), attack("reference")
    assert first == second, f"{first} by the compiled kernel, {second} by the reference"
    assert len(ours) == len(reference)
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)
    return first


def apart(function: Callable[[], str]) -> str:
    """What a function returns in a process of its own, or what it died of."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            found = function()
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        os.write(writer, found[:2000].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = pipe.read()
    status = os.waitpid(child, 0)[1]
    return found if status == 0 else f"died of signal {os.waitstatus_to_exitcode(status)}"


def count(attacks: Iterator[tuple[str, Attack]]) -> dict[str, Any]:
    for kernel in ("compiled", "reference"):
        begun(kernel, "default")  # what torch imports at a first step need not be imported by each process
    found = {name: apart(lambda attack=attack: tried(attack)) for name, attack in attacks}
    other = {name: became for name, became in found.items() if became not in (REFUSED, FINE)}
    counted = Counter(found.values())
    return {"tried": len(found), "refused": counted[REFUSED], "fine": counted[FINE], "other": other}


# Kills


def meta_training(folder: Path) -> bytes:
    result = meta_train({"tiny": tiny_task}, tiny_config(meta_steps=12), network=acting_network(), folder=folder)
    return pickle.dumps((result.meta_losses, [weight.tolist() for weight in result.network.parameters()]))


def trainer(folder: Path) -> bytes:
    from trainer_helpers import arguments, helped

    run = helped(arguments(folder, save_strategy="steps", save_steps=2, max_steps=16))
    saved = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if path.stat().st_size]  # which Trainer writes last
    last = max(saved, key=lambda path: int(path.name.split("-")[1]), default=None)
    run.train(resume_from_checkpoint=None if last is None else str(last))
    return pickle.dumps({name: value.tolist() for name, value in run.model.named_parameters()})


def saving(folder: Path) -> bytes:
    """A loop that saves model and optimizer in one move after each step, and the optimizer's weights as a set."""
    folder.mkdir(exist_ok=True)
    model = make_model()
    optimizer, network, first = LearnedOptimizer(model.named_parameters(), "small", total_steps=60), acting_network(), 0
    if (folder / "last.pt").exists():
        saved = torch.load(folder / "last.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        if (folder / "set").exists() and any((folder / "set").glob("*.safetensors")):
            load_network(folder / "set")
    for step in range(first, 60):
        train(model, optimizer, range(step, step + 1))
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, folder / "next.pt")
        os.replace(folder / "next.pt", folder / "last.pt")
        with torch.no_grad():
            network.coordinate.out.fill_(step)
        network.save_pretrained(folder / "set")
    return pickle.dumps({name: value.tolist() for name, value in values(model).items()})


KILLS: dict[str, Callable[[Path], bytes]] = {"meta-training": meta_training, "Trainer": trainer, "saving": saving}


def run_apart(work: Callable[[Path], bytes], folder: Path, seconds: float | None = None) -> bytes | None:
    """What work returns in a process of its own; None where that was killed after so many seconds."""
    result = folder.with_suffix(".result")
    if (child := os.fork()) == 0:
        code = 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result.write_bytes(work(folder))
            code = 0
        except BaseException as error:
            print(f"{folder}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGKILL:
        return None
    assert code == 0, f"exit code {code}"
    return result.read_bytes()


def kill(work: Callable[[Path], bytes], folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kills runs at random moments, each several times before it may end, and compares what they come to with a run that nobody killed.

    A kill that came after the end counts for nothing.
    """
    chance, found = random.Random(seed), {"kills": 0, "runs": 0, "the same bits": 0}
    folder.mkdir(parents=True)
    began = time.perf_counter()
    whole = run_apart(work, folder / "whole")
    length = time.perf_counter() - began
    while found["kills"] < kills:
        found["runs"] += 1
        place = folder / str(found["runs"])
        ended = None
        for _ in range(min(chance.choice([1, 2, 3, 5]), kills - found["kills"])):
            ended = run_apart(work, place, chance.uniform(0, length))
            if ended is not None:
                break
            found["kills"] += 1
        found["the same bits"] += (ended or run_apart(work, place)) == whole
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2500, help="damaged files of each kind (%(default)s)")
    parser.add_argument("--kills", type=int, default=34, help="of each kind of run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="(%(default)s)")
    parser.add_argument("--afresh", action="store_true", help="forget what was counted before")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"files": arguments.files, "kills": arguments.kills, "seed": arguments.seed}
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() and not arguments.afresh else {}
    if results.get("settings") != settings:
        results = {"settings": settings}
    folder = Path(tempfile.mkdtemp(prefix="attacks-"))

    def fuzzed(name: str) -> dict[str, Any]:
        found, slowest = fuzz(files[name], arguments.files, arguments.seed)
        return {"tried": arguments.files, "refused": found["refused"], "read": found["read"], "slowest, s": round(slowest, 3)}

    files = targets(folder)
    parts: dict[str, Callable[[], Any]] = {f"file {name}": lambda name=name: fuzzed(name) for name in files}
    import trainer_helpers  # noqa: F401  once, and not by each process

    parts |= {"states": lambda: count(state_attacks()), "gradients and parameters": lambda: count(gradient_attacks())}
    for name, work in KILLS.items():
        parts[f"kills {name}"] = lambda name=name, work=work: kill(work, folder / "kills" / name, arguments.kills, arguments.seed)
    for name, part in parts.items():
        if name not in results:
            results[name] = part()
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: {results[name]}", flush=True)
    other = sum(len(one.get("other", ())) + one.get("runs", 0) - one.get("the same bits", 0) for one in results.values())
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())
