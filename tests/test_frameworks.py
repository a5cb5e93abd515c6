"""The optimizer in other people's training loops: accelerate alone, Lightning, sentence-transformers and timm, the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learned_optim import LearnedOptimizer, NetworkConfig, OptimizerNetwork
from learned_optim.weights import fingerprint


def network(seed: int) -> OptimizerNetwork:
    torch.manual_seed(seed)
    return OptimizerNetwork(NetworkConfig(hidden_units=2))


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def need(module: str) -> Any:
    return pytest.importorskip(module, reason=f"needs {module}: make test-integrations")


# accelerate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accelerate_resumes_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    Accelerator = need("accelerate").Accelerator
    batches = [torch.randn(8, 4, dtype=dtype) for _ in range(6)]

    def train(accelerator: Any, model: nn.Module, optimizer: Any, batches: list[Tensor]) -> None:
        for batch in batches:
            accelerator.backward(loss(model, batch))
            optimizer.step()
            optimizer.zero_grad()

    def prepared() -> tuple[Any, nn.Module, Any]:
        accelerator = Accelerator(cpu=True)
        model = net(dtype)
        return accelerator, *accelerator.prepare(model, LearnedOptimizer(model.parameters()))

    whole = prepared()
    train(*whole, batches)
    stopped = prepared()
    train(*stopped, batches[:3])
    stopped[0].save_state(str(tmp_path))
    resumed = prepared()
    resumed[0].load_state(str(tmp_path))
    train(*resumed, batches[3:])
    for a, b in zip(resumed[1].parameters(), whole[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accelerate_keeps_the_state_of_an_optimizer_that_has_one(dtype: torch.dtype) -> None:
    """`prepare` sends the state through `load_state_dict`, which in torch casts it to the parameters' dtype."""
    Accelerator = need("accelerate").Accelerator
    model = net(dtype)
    optimizer = LearnedOptimizer(model.parameters())
    loss(model, torch.randn(8, 4, dtype=dtype)).backward()
    optimizer.step()
    before = {param: {key: value.clone() for key, value in state.items()} for param, state in optimizer.state.items()}
    _, wrapped = Accelerator(cpu=True).prepare(model, optimizer)
    assert type(wrapped) is not LearnedOptimizer
    for param, state in before.items():
        for key, value in state.items():
            assert torch.equal(wrapped.optimizer.state[param][key], value)
            assert wrapped.optimizer.state[param][key].dtype == value.dtype


def test_accelerate_refuses_other_weights_with_both_hashes(tmp_path: Path) -> None:
    Accelerator = need("accelerate").Accelerator
    accelerators = []
    for seed in (1, 2):
        accelerator, model = Accelerator(cpu=True), net()
        accelerator.prepare(model, LearnedOptimizer(model.parameters(), network(seed)))
        accelerators.append(accelerator)
    accelerators[0].save_state(str(tmp_path))
    with pytest.raises(ValueError, match=f"{fingerprint(network(1))}.*{fingerprint(network(2))}"):
        accelerators[1].load_state(str(tmp_path))


# Lightning


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")  # a hint on speed
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # Lightning's use of torch
def test_lightning_knows_the_horizon_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    lightning = need("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return loss(self.net, batch[0])

        def configure_optimizers(self) -> LearnedOptimizer:
            return LearnedOptimizer(self.parameters(), total_steps=int(self.trainer.estimated_stepping_batches))

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 4)), batch_size=4)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    def fit(checkpoint: Path | None = None) -> tuple[nn.Module, LearnedOptimizer]:
        module = Module()
        saver = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = lightning.Trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[saver], default_root_dir=tmp_path, **quiet)
        trainer.fit(module, data, ckpt_path=checkpoint)
        return module, trainer.optimizers[0]

    whole, optimizer = fit()
    assert optimizer.param_groups[0]["total_steps"] == 8, "two epochs of eight batches, two of which make a step"
    assert {state["control"][0].item() for state in optimizer.state.values()} == {8}
    resumed, _ = fit(tmp_path / "epoch=0.ckpt")
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


# sentence-transformers


def test_sentence_transformers_trains_with_the_helper(tmp_path: Path) -> None:
    need("sentence_transformers")
    need("datasets")
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    from learned_optim.integrations.transformers import LearnedOptimizerTrainer

    class Learned(LearnedOptimizerTrainer, SentenceTransformerTrainer):
        pass

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "A": 3, "B": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=8)], device="cpu")
    data = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["A", "B"]})
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=40, logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, report_to=[]
    )
    trainer = Learned(model=model, args=args, train_dataset=data, loss=MultipleNegativesRankingLoss(model))
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] / 2
    assert trainer.optimizer.optimizer.param_groups[0]["total_steps"] == 40


# timm


def test_timms_registry_makes_the_optimizer() -> None:
    pytest.importorskip("timm", reason="needs timm: make test-integrations", exc_type=Exception)
    from timm.optim import OptimInfo, create_optimizer_v2
    from timm.optim._optim_factory import default_registry

    default_registry.register(OptimInfo("learnedtest", LearnedOptimizer, has_eps=False, has_momentum=False))
    model = net()
    optimizer = create_optimizer_v2(model, opt="learnedtest", lr=1.0, weight_decay=0.05)
    assert isinstance(optimizer, LearnedOptimizer)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.05]
    loss(model, torch.randn(8, 4)).backward()
    optimizer.step()
