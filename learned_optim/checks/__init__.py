"""What a `LearnedOptimizer` looks at before anything moves: hyperparameters, parameters, gradients, and state that others had in hand.

Kernels take addresses, so a tensor of another size, dtype or device would have them read and write where nothing of theirs is.
"""

from . import groups as groups
from . import parameters as parameters
from . import state as state
