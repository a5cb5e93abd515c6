"""Meta-training: learns an optimizer network by back-propagating a meta-loss through training runs of small models.

    result = meta_train({"mine": my_family}, MetaTrainConfig(meta_steps=500))
    optimizer = LearnedOptimizer(model.parameters(), result.network)

`loop.py` holds the loop, `estimators.py` the meta-gradients, `unroll.py` the training steps that they run, `tasks.py` what can be trained
on, `families/` the tasks that come along. From the shell: `learned-optim meta-train --help`.
"""

from .config import MetaTrainConfig
from .evaluate import Evaluation
from .families import FAMILIES
from .loop import MetaTrainingDivergedError, MetaTrainResult, meta_train
from .tasks import Batch, Family, ModuleTask, Params, Task

__all__ = [
    "FAMILIES",
    "Batch",
    "Evaluation",
    "Family",
    "MetaTrainConfig",
    "MetaTrainResult",
    "MetaTrainingDivergedError",
    "ModuleTask",
    "Params",
    "Task",
    "meta_train",
]
