"""A learned optimizer for PyTorch: a pretrained LSTM in place of AdamW, with no learning rate to choose."""

from .config import NetworkConfig
from .network import OptimizerNetwork
from .optimizer import LearnedOptimizer
from .weights import load_network

__version__ = "0.1.0"

__all__ = ["LearnedOptimizer", "NetworkConfig", "OptimizerNetwork", "__version__", "load_network"]
