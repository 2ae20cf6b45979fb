"""The layer of a case in torch, on the values of ours: leaves in our layout, turned into torch's inside the graph.

So each kernel is transposed in one place, and its gradient comes back in our layout by itself.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from tests.parity.cases import NUMBERS, Case, Path, Result, compare, direction
from tests.parity.sides import evaluate_ours
from torch.func import functional_call

Tensors = Mapping[Path, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class TorchCase(Case):
    """A case whose other side is in torch.

    Attributes:
        torch: a function of parameters, statistics and inputs, all in our layout, to outputs in our layout and the new
            statistics; statistics of None are not compared.
        named: what it is compared with, as the page says it.
    """

    torch: Callable[..., tuple[Any, Any]] | None = None
    named: str = ""


def to_torch(x: Any) -> torch.Tensor:
    """An array as a tensor."""
    kind = str(x.dtype)
    # torch knows no bfloat16 of NumPy's.
    return torch.tensor(np.asarray(x, np.float64) if kind == "bfloat16" else np.array(x), dtype=getattr(torch, kind))


def to_array(x: torch.Tensor) -> np.ndarray:
    """A tensor as an array."""
    kind = str(x.dtype).removeprefix("torch.")
    if kind == "bfloat16":
        return np.asarray(x.detach().double().numpy(), jnp.bfloat16)
    return x.detach().numpy()


def check_torch(case: TorchCase) -> dict[str, float]:
    """Compares a layer or function of nnx with one of torch: outputs, gradients and, where it is kept alike, state."""
    assert case.torch is not None
    with jax.enable_x64(NUMBERS[case.numbers].wide):
        ours, params, stats, inputs = evaluate_ours(case)
    leaves = {path: to_torch(x).requires_grad_() for path, x in params.items()}
    given = [to_torch(x) for x in inputs]
    floating = [x.requires_grad_() for x in given if x.is_floating_point()]
    outputs, state = case.torch(leaves, {path: to_torch(x) for path, x in stats.items()}, given)
    along = [y for y in jax.tree.leaves(outputs) if y.requires_grad]
    wanted = [*leaves.values(), *floating]
    found = (
        torch.autograd.grad(
            along,
            wanted,
            [torch.tensor(direction(y), dtype=y.dtype) for y in along],
            allow_unused=True,
            materialize_grads=True,
        )
        if along
        else []
    )
    theirs = Result(
        outputs=jax.tree.map(to_array, outputs),
        by_parameters=dict(zip(leaves, map(to_array, found), strict=False)),
        by_inputs=tuple(map(to_array, found[len(leaves) :])),
        state={} if state is None else {path: to_array(x) for path, x in state.items()},
    )
    if state is None:
        ours = dataclasses.replace(ours, state={})
    return compare(ours, theirs, case.tolerance)


def features_first(x: torch.Tensor) -> torch.Tensor:
    """[batch, *space, features] as [batch, features, *space]."""
    return x.movedim(-1, 1)


def features_last(x: torch.Tensor) -> torch.Tensor:
    """[batch, features, *space] as [batch, *space, features]."""
    return x.movedim(1, -1)


def of_module(
    module: torch.nn.Module,
    names: Mapping[str, Callable[[Tensors], torch.Tensor]],
    *,
    before: Callable[..., Any] = lambda x: x,
    after: Callable[..., Any] = lambda y: y,
) -> Callable[..., tuple[Any, Any]]:
    """The torch side of a module: its parameters by name, each made of ours, and what turns inputs and outputs."""

    def run(params: Tensors, stats: Tensors, inputs: Sequence[torch.Tensor]) -> tuple[Any, Any]:
        values = {name: make({**params, **stats}) for name, make in names.items()}
        return after(functional_call(module, values, tuple(before(x) for x in inputs))), {}

    return run


def of_function(function: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """The torch side of a function without parameters."""
    return lambda params, stats, inputs: (function(*inputs), {})


def at(*path: str) -> Callable[[Tensors], torch.Tensor]:
    """The parameter at a path, in torch's layout as in ours."""
    return lambda values: values[path]


def transposed(*path: str) -> Callable[[Tensors], torch.Tensor]:
    """A matrix: [in, out] here, [out, in] in torch."""
    return lambda values: values[path].T


def kernel(*path: str) -> Callable[[Tensors], torch.Tensor]:
    """The kernel of a convolution: [*space, in, out] here, [out, in, *space] in torch."""

    def turn(values: Tensors) -> torch.Tensor:
        x = values[path]
        return x.permute(-1, -2, *range(x.ndim - 2))

    return turn
