"""Files and parameters of other libraries, and the way there and back."""

from nnx.train.interop._flax import load_flax_state, to_flax_state
from nnx.train.interop._safetensors import load_safetensors, save_safetensors
from nnx.train.interop._torch import TorchReport, load_torch_state_dict

__all__ = [
    "TorchReport",
    "load_flax_state",
    "load_safetensors",
    "load_torch_state_dict",
    "save_safetensors",
    "to_flax_state",
]
