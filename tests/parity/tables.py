"""All tables of cases together, and which names of nnx.layers are in none."""

from tests.parity import equinox_layers, torch_conv, torch_layers, torch_sequences
from tests.parity.cases import Case
from tests.parity.flax_table import FLAX

__all__ = ["EQUINOX", "FLAX", "IN_NO_TABLE", "TORCH"]

TORCH: list[Case] = [*torch_layers.CASES, *torch_conv.CASES, *torch_sequences.CASES]
EQUINOX: list[Case] = equinox_layers.CASES

IN_NO_TABLE = {
    "CacheFullError": "an error",
    "DropPath": "no other library has it; `tests/layers` holds it to its equation",
    "Dropout": "random: how much is kept, and what it is scaled by, is compared with flax.nnx",
    "LoRALinearGeneral": "no other library has it; `tests/layers` holds it to its equation",
    "LoRAParam": "a type of Variable",
    "RNNCellBase": "a base class",
    "apply_lora": "no other library has it",
    "canonicalize_dtype": "what it decides is in the dtypes of all outputs, which are compared with those of flax.nnx",
    "init_cache": "decoding token by token is compared with flax.nnx",
    "initializers": "those of `jax.nn.initializers`, as in flax.nnx",
    "lora_merge": "no other library has it",
    "promote_dtype": "what it decides is in the dtypes of all outputs, which are compared with those of flax.nnx",
    "reorder_cache": "no other library has it",
    "reset_cache": "no other library has it",
    "sinusoidal_positions": "no other library has it; `tests/layers` holds it to its equation",
}
"""Why a name of nnx.layers has no row."""
