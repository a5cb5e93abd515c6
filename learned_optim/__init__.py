"""A learned optimizer for PyTorch: a pretrained LSTM in place of AdamW, with no learning rate to choose."""

from typing import TYPE_CHECKING, Any

from .config import NetworkConfig
from .network import OptimizerNetwork, load_network
from .optimizer import LearnedOptimizer

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .comparison import compare

__all__ = ["LearnedOptimizer", "NetworkConfig", "OptimizerNetwork", "__version__", "compare", "load_network"]


def __getattr__(name: str) -> Any:
    if name == "compare":  # loaded when it is asked for, since it brings the meta-training engine along
        from .comparison import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
