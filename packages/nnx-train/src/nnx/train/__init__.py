"""Training: the state of a run as a pytree or as a Module, and checkpoints that restore it exactly."""

from nnx.train._checkpoint import Checkpointer, Restored
from nnx.train._classification import F1, Accuracy, BinaryPrecision, BinaryRecall, TopKAccuracy
from nnx.train._ema import EMA, EMAState
from nnx.train._errors import CheckpointError, CheckpointNotFoundError, CheckpointWarning, CorruptError
from nnx.train._interrupt import Interrupt
from nnx.train._loader import ArrayLoader
from nnx.train._loggers import CSVLogger, JSONLinesLogger, Logger, TensorBoardLogger, TerminalLogger
from nnx.train._loop import FitResult, NonFiniteError, fit
from nnx.train._loss_scale import LossScale, LossScaleState, all_finite
from nnx.train._manifest import Manifest
from nnx.train._match import RestoreReport
from nnx.train._metric import Metric, MetricState
from nnx.train._metrics import Average, MultiMetric, Statistics, Welford
from nnx.train._optimizer import Optimizer, OptState
from nnx.train._plan import Plan, Sizes, plan, recipe_mesh, sizes_of
from nnx.train._precision import Precision
from nnx.train._recipes import RECIPES, sharding_rules
from nnx.train._train_state import TrainState
from nnx.train.interop import (
    TorchReport,
    load_flax_state,
    load_safetensors,
    load_torch_state_dict,
    save_safetensors,
    to_flax_state,
)

__all__ = [
    "Accuracy",
    "ArrayLoader",
    "Average",
    "BinaryPrecision",
    "BinaryRecall",
    "CSVLogger",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CheckpointWarning",
    "Checkpointer",
    "CorruptError",
    "EMA",
    "EMAState",
    "F1",
    "FitResult",
    "Interrupt",
    "JSONLinesLogger",
    "Logger",
    "LossScale",
    "LossScaleState",
    "Manifest",
    "Metric",
    "MetricState",
    "MultiMetric",
    "NonFiniteError",
    "OptState",
    "Optimizer",
    "Plan",
    "Precision",
    "RECIPES",
    "RestoreReport",
    "Restored",
    "Sizes",
    "Statistics",
    "TensorBoardLogger",
    "TerminalLogger",
    "TopKAccuracy",
    "TorchReport",
    "TrainState",
    "Welford",
    "all_finite",
    "fit",
    "load_flax_state",
    "load_safetensors",
    "load_torch_state_dict",
    "plan",
    "recipe_mesh",
    "save_safetensors",
    "sharding_rules",
    "sizes_of",
    "to_flax_state",
]
