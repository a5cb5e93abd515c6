"""Where optimizer networks come from and go to: bundled sets, local folders and the Hugging Face Hub.

A set of weights is a folder with `config.json` (a `NetworkConfig`) and `model.safetensors` (every tensor in fp32). Reading is strict:
nothing is filled in, cast or replaced, since weights that almost fit would train a model badly without any error. Nothing is unpickled, and
nothing is read whose size does not fit.

Which tensors a network has is not known here: the network inherits from `Pretrained`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import os
import reprlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from .config import NetworkConfig, from_file, parse_object, to_json

Network = TypeVar("Network", bound="Pretrained")

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MAX_HEADER = 2**17  # bytes of the list of tensors in front of the weights; real ones have two thousand
RECIPE = "meta_train*.json"  # one file, or one for each stage
SCRATCH = ".saving-"  # how the names of folders begin in which files wait to take their places
FORGOTTEN = 3600  # seconds from which on nobody waits for them any more
CARD, CURVES, META_TRAIN = "README.md", "curves.png", "meta_train.json"  # what a meta-training run adds

MODEL_CARD = """\
---
license: apache-2.0
library_name: learned-optim
tags: [learned-optimizer, meta-learning, optimizer, pytorch]
---

# {repo_id}

A learned optimizer for PyTorch: an LSTM that takes the place of AdamW, with no learning rate to choose.

    optimizer = learned_optim.LearnedOptimizer(model.parameters(), "{repo_id}")
"""


class Pretrained(nn.Module):
    """A module that its configuration and its tensors describe in full, so that they can be kept in files.

    Not huggingface_hub's PyTorchModelHubMixin: it loads wrong names and a missing config without an error, takes config and weights from
    two requests, and would be imported with the package.

    Args:
        config: all that the constructor needs.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(cls: type[Network], source: str | os.PathLike[str], revision: str | None = None) -> Network:
        """Loads a network, on the CPU and in fp32.

        Args:
            source: the name of a bundled set, else a local folder, else an id on the Hugging Face Hub ("user/name"): the first that exists.
                The first two need no network access. A path object always means a folder.
            revision: branch, tag or commit of the Hub repository; None means its main branch. Config and weights come from one commit.
                While the Hub cannot be reached, that is the commit which the cache saw last.

        Raises:
            ValueError: the files are damaged, of a newer format, of other shapes or not finite; or `revision` is given for another source
                than the Hub.
            OSError: there is no such source (FileNotFoundError), access must be asked for (PermissionError), or the Hub failed.
        """
        return _read(cls, _folder_of(source, revision))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` (in fp32) to a folder that `from_pretrained` reads, the same bytes for the same
        network. Makes the folder if need be.

        Both files are complete before either takes its place, so a full disk or an interrupted write leaves an earlier set as it was. What
        a killed process left unfinished in the folder goes with the first save an hour later.

        Raises:
            ValueError: a weight is NaN or infinite.
            OSError: the folder cannot be written to; the message names it.
        """
        files = _files(self)
        Path(folder).mkdir(parents=True, exist_ok=True)
        for unfinished in Path(folder).glob(f"{SCRATCH}*"):
            with contextlib.suppress(OSError):  # of another process, which is done with it
                if time.time() - unfinished.stat().st_mtime > FORGOTTEN:
                    shutil.rmtree(unfinished)
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
                for name, content in files.items():
                    Path(scratch, name).write_bytes(content)
                for name in files:
                    os.replace(Path(scratch, name), Path(folder, name))
        except OSError as error:
            raise OSError(f"the weights could not be written to {os.fspath(folder)}: {error}") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        folder: str | os.PathLike[str] | None = None,
        private: bool | None = None,
        commit_message: str = "Upload optimizer network",
        token: str | None = None,
    ) -> str:
        """Uploads `config.json`, `model.safetensors` and, where the repository has none, a model card to the Hugging Face Hub.

        Args:
            repo_id: "user/name"; made if it does not exist.
            folder: of the meta-training run that this network comes from: its model card, curves and configuration go along.
            private: who may read a repository that is made here; None leaves it to the account's setting.
            token: access token; None takes the one of `hf auth login` or HF_TOKEN.

        Returns:
            the commit, to load exactly these weights by: `from_pretrained(repo_id, revision=commit)`.

        Raises:
            ValueError: a weight is NaN or infinite, or the folder holds other weights.
            OSError: the Hub refused; the message is huggingface_hub's.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        files = _files(self)
        if folder is not None and fingerprint(type(self).from_pretrained(Path(folder))) != fingerprint(self):
            raise ValueError(f"the weights in {folder} are not this network's, so its model card would describe others")
        api = HfApi(token=token, library_name="learned-optim")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                f"{repo_id} exists and is public, so nothing was uploaded: make it private in its settings on the Hub, choose another "
                "name, or leave private out"
            )
        if folder is not None:
            present = [path for path in sorted(Path(folder).glob("*")) if path.name in (CARD, CURVES) or path.match(RECIPE)]
            files |= {path.name: path.read_bytes() for path in present}
        if CARD not in files and not api.file_exists(repo_id, CARD):  # a model card that somebody wrote is worth more than this one
            files[CARD] = MODEL_CARD.format(repo_id=repo_id).encode()
        # One commit (upload_folder may make several), so that no revision has the config of one network and the weights of another.
        additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
        return api.create_commit(repo_id, additions, commit_message=commit_message).oid


def _folder_of(source: str | os.PathLike[str], revision: str | None) -> Path:
    name = os.fspath(source)
    if isinstance(source, str) and source in bundled_names():
        folder, kind = _bundled() / source, "bundled set"
    elif os.path.isdir(source):
        folder, kind = Path(source), "local folder"
    elif isinstance(source, str) and source.count("/") == 1 and not os.path.exists(source):
        return _download(source, revision)
    else:
        raise _no_such_source(name)
    if revision is not None:
        raise ValueError(f"revision applies only to the Hub, and {name!r} is a {kind}; leave revision={revision!r} out")
    return folder


def bundled_names() -> list[str]:
    """Names of the sets of weights that ship with the package."""
    return sorted(path.parent.name for path in _bundled().glob(f"*/{CONFIG}"))


def bundled_recipe(name: str) -> list[Path]:
    """The configurations that a bundled set was meta-trained with, in their order; none of what is no bundled set."""
    return recipe(name) if name in bundled_names() else []


def recipe(source: str) -> list[Path]:
    """The configurations that lie with a bundled set or in a local folder, in their order; none elsewhere."""
    return sorted((_bundled() / source if source in bundled_names() else Path(source)).glob(RECIPE))


def source_of(folder: str | os.PathLike[str]) -> str:
    """What `from_pretrained` knows a local folder by: its name, with "./" in front of one that a bundled set has too."""
    name = os.fspath(folder)
    return f"./{name}" if name in bundled_names() else name


def _bundled() -> Path:
    return Path(str(importlib.resources.files("learned_optim.pretrained")))


def _no_such_source(name: str) -> FileNotFoundError:
    if os.path.isfile(name):
        return FileNotFoundError(f"{name!r} is a file; pass the folder that holds {CONFIG} and {WEIGHTS}")
    return FileNotFoundError(f'{name!r} is no bundled set (there are {bundled_names()}), no local folder and no Hub id ("user/name")')


def _read(cls: type[Network], folder: Path) -> Network:
    config_file, weights_file = folder / CONFIG, folder / WEIGHTS
    for file in (config_file, weights_file):
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no {file.name}; save_pretrained writes {CONFIG} and {WEIGHTS} to a folder")
    config = from_file(NetworkConfig, config_file)
    # On the meta device a large network allocates nothing, and torch's random numbers are left alone.
    with torch.device("meta"):
        network = cls(config)
    tensors = _tensors_of(weights_file, network.state_dict())
    _check_finite(tensors, str(weights_file))
    network.load_state_dict(tensors, assign=True)
    return network


def _tensors_of(file: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file: eight bytes with the length of the header, the header as JSON, and the data. Those are read only
    where header and size are what the expected tensors would have."""
    size_expected = sum(tensor.numel() for tensor in expected.values()) * torch.float32.itemsize
    try:
        with file.open("rb") as stream:
            size, length = os.fstat(stream.fileno()).st_size, int.from_bytes(stream.read(8), "little")
            if not 0 < length <= min(size - 8, MAX_HEADER):
                raise ValueError(f"its header would have {length} of {size} bytes")
            header = parse_object(stream.read(length), "its header")
            problems = _misfits(header, expected)
            if not problems:
                if size != 8 + length + size_expected:
                    raise ValueError(f"it has {size} bytes, not {8 + length + size_expected}")
                stream.seek(0)
                return load(stream.read(size))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is damaged, or no safetensors file ({error}); fetch or save it again") from error
    raise ValueError(f"{file} does not fit the network that its {CONFIG} describes: {'; '.join(problems)}")


def _misfits(header: dict[str, Any], expected: dict[str, Tensor]) -> list[str]:
    header = {name: entry for name, entry in header.items() if name != "__metadata__"}
    problems = []
    if missing := sorted(expected.keys() - header.keys()):
        problems.append(f"missing {missing}")
    if unexpected := sorted(header.keys() - expected.keys()):
        problems.append(f"unexpected {reprlib.repr(unexpected)}")
    for name in sorted(expected.keys() & header.keys()):
        shape, dtype = (header[name].get(key) if isinstance(header[name], dict) else None for key in ("shape", "dtype"))
        if shape != list(expected[name].shape):
            problems.append(f"{name} has shape {reprlib.repr(shape)}, not {list(expected[name].shape)}")
        elif dtype != "F32":
            problems.append(f"{name} has dtype {reprlib.repr(dtype)}, not 'F32'")
    return problems


def _check_finite(tensors: dict[str, Tensor], where: str) -> None:
    if bad := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
        raise ValueError(f"{where} has NaN or infinite weights in {bad}: meta-training diverged; use an earlier set")


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    commit = revision
    for name in (CONFIG, WEIGHTS):
        try:
            path = Path(hf_hub_download(repo_id, name, revision=commit, library_name="learned-optim"))
        except HFValidationError:
            raise _no_such_source(repo_id) from None
        except OSError as error:
            raise _hub_error(error, repo_id, f"{name} of Hub repository {repo_id!r} at {revision or 'main'!r}") from error
        # The cache keeps snapshots/COMMIT/NAME. The weights come from the config's commit, even if the branch has moved since.
        commit = path.parent.name
    return path.parent


def _hub_error(error: OSError, repo_id: str, what: str) -> OSError:
    from huggingface_hub import errors

    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(f"{what} is gated: ask for access on the repository's page, then {log_in}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(f"{_no_such_source(repo_id)} that you may read. Check the spelling; if it is private, {log_in}")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{what} does not exist: the repository has no such branch, tag or commit")
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = error.__cause__ or error
        return FileNotFoundError(f"{what} is not cached, and the Hub was not reached: {reason}. Go online, or use {bundled_names()}")
    if isinstance(error, errors.EntryNotFoundError):
        return FileNotFoundError(f"{what} does not exist; push_to_hub uploads {CONFIG} and {WEIGHTS}")
    return OSError(f"{what} could not be fetched: {error}")


def fingerprint(network: Pretrained) -> str:
    """A short hash of the config and of every tensor's name, shape and fp32 bytes: equal for equal networks, on any device."""
    digest = hashlib.sha256(to_json(network.config).encode())
    for name, tensor in _tensors(network).items():
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().astype("<f4", copy=False).tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def _files(network: Pretrained) -> dict[str, bytes]:
    tensors = _tensors(network)
    _check_finite(tensors, "the network")
    return {CONFIG: to_json(network.config).encode(), WEIGHTS: save(tensors, metadata={"format": "pt"})}


def _tensors(network: Pretrained) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in sorted(network.state_dict().items())}
