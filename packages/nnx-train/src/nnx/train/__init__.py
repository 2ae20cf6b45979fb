"""Training: the state of a run as a pytree or as a Module, and checkpoints that restore it exactly."""

from nnx.train._checkpoint import Checkpointer, Restored
from nnx.train._errors import CheckpointError, CheckpointNotFoundError
from nnx.train._optimizer import Optimizer, OptState
from nnx.train._train_state import TrainState

__all__ = [
    "CheckpointError",
    "CheckpointNotFoundError",
    "Checkpointer",
    "OptState",
    "Optimizer",
    "Restored",
    "TrainState",
]
