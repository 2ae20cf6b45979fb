"""A case: one layer with one set of options and inputs, made in two libraries, and all that both give compared."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Path = tuple[str, ...]

TOLERANCES = {"float64": 1e-11, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""The largest difference by the coarsest dtype of a case, where the largest value of an array counts as 1 at least."""


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The dtypes of a case: of its inputs, and of the parameters and the computation as options of the layer."""

    inputs: str
    options: Mapping[str, str]
    coarsest: str

    @property
    def wide(self) -> bool:
        """Whether JAX must be told to allow 64 bits."""
        return self.inputs == "float64"


NUMBERS = {
    "float64": Numbers("float64", {"param_dtype": "float64"}, "float64"),
    "float32": Numbers("float32", {}, "float32"),
    "float16": Numbers("float16", {"param_dtype": "float16"}, "float16"),
    "bfloat16": Numbers("bfloat16", {"param_dtype": "bfloat16"}, "bfloat16"),
    "float32 in bfloat16": Numbers("float32", {"dtype": "bfloat16"}, "bfloat16"),
    "bfloat16 in float32": Numbers("bfloat16", {"param_dtype": "bfloat16", "dtype": "float32"}, "bfloat16"),
    "bfloat16 by float32": Numbers("bfloat16", {}, "bfloat16"),
}
"""By name: "a in b" are inputs of dtype a computed in b; "a by b" are inputs of dtype a with parameters of b."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        layer: the name in `nnx.layers`, a row of the page.
        args: positional arguments of the constructor.
        options: keyword arguments of the constructor.
        inputs: what the layer is called with: a shape, which is filled with standard normals, or an array as it is.
        call: keyword arguments of the call.
        numbers: a key of NUMBERS.
        run: how the layer is called, if not simply: a function of it and the inputs, and of `call`.
        make: how the layer is made, if not by its name: a function of a maker of layers and the dtypes' options.
        read: what of the outputs is compared.
        note: what sets the case apart in its name, where arguments don't.
        concrete: whether the layer is really made, not only its shapes: where an option is an array.
    """

    layer: str
    args: tuple[Any, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inputs: tuple[Any, ...] = ()
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    numbers: str = "float32"
    run: Callable[..., Any] = lambda layer, *inputs, **call: layer(*inputs, **call)
    make: Callable[..., Any] | None = None
    read: Callable[[Any], Any] = lambda outputs: outputs
    note: str = ""
    concrete: bool = False

    def __str__(self) -> str:
        parts = [_text(self.args), *(f"{key}={_text(value)}" for key, value in {**self.options, **self.call}.items())]
        parts += ["x".join(_text(x) for x in self.inputs), self.numbers, self.note]
        return "-".join([self.layer, *filter(None, parts)]).replace(" ", "_")

    def outputs(self, layer: Any, inputs: tuple[Any, ...]) -> Any:
        """What the layer, or function, gives for the inputs."""
        return self.read(self.run(layer, *inputs, **self.call))

    @property
    def tolerance(self) -> float:
        """The largest difference allowed."""
        return TOLERANCES[NUMBERS[self.numbers].coarsest]

    def build(self, new: Callable[..., Any]) -> Any:
        """The layer, by a function that makes layers by their names."""
        dtypes = NUMBERS[self.numbers].options
        if self.make is not None:
            return self.make(new, **dtypes, **self.options)
        return new(self.layer, *self.args, **dtypes, **self.options)

    def draws(self) -> np.random.Generator:
        """The randomness of the case, by its name."""
        return np.random.default_rng(zlib.crc32(str(self).encode()))

    def arrays(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """The inputs."""
        dtype = NUMBERS[self.numbers].inputs
        return tuple(
            jnp.asarray(rng.normal(size=x), dtype) if isinstance(x, tuple) else jnp.asarray(x) for x in self.inputs
        )


def _text(value: Any) -> str:
    """An argument as it stands in the name of a case."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype.name}{_text(value.shape)}"
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(map(_text, value)) + ")" if value else ""
    return getattr(value, "__name__", str(value))


def draw_values(rng: np.random.Generator, shapes: Mapping[Path, jax.ShapeDtypeStruct]) -> dict[Path, jax.Array]:
    """Values for parameters and statistics: none of them 0 or 1, as new ones are, and variances positive."""
    drawn = {}
    for path in sorted(shapes):
        like = shapes[path]
        low, high = (0.5, 1.5) if path[-1] in ("var", "sigma") else (-0.7, 0.7)
        drawn[path] = jnp.asarray(rng.uniform(low, high, size=like.shape), like.dtype)
    return drawn


def direction(like: Any) -> np.ndarray:
    """What a gradient is taken along: numbers between -1 and 1 without a pattern, of a shape."""
    size = int(np.prod(like.shape))
    return np.cos(np.arange(size) * 1.7 + 0.3).reshape(like.shape)


@dataclasses.dataclass(frozen=True)
class Result:
    """What one library gives: outputs, their gradients along `direction` by parameters and inputs, and the new state.

    Gradients by inputs are those by the floating point ones.
    """

    outputs: Any
    by_parameters: dict[Path, Any]
    by_inputs: tuple[Any, ...]
    state: dict[Path, Any]


jax.tree_util.register_dataclass(Result)


def differentiate(
    call: Callable[..., tuple[Any, dict[Path, Any]]], params: dict[Path, Any], inputs: tuple[Any, ...]
) -> Result:
    """The Result of `call(params, inputs) -> (outputs, state)`, for a library in JAX."""
    floating = [i for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def of(params: dict[Path, Any], picked: tuple[Any, ...]) -> Any:
        given = dict(zip(floating, picked, strict=True))
        return call(params, tuple(given.get(i, x) for i, x in enumerate(inputs)))

    outputs, pull, state = jax.vjp(of, params, tuple(inputs[i] for i in floating), has_aux=True)
    along = jax.tree.map(
        lambda y: (
            jnp.asarray(direction(y), y.dtype)
            if jnp.issubdtype(y.dtype, jnp.inexact)
            else np.zeros(y.shape, jax.dtypes.float0)
        ),
        outputs,
    )
    by_parameters, by_inputs = pull(along)
    return Result(outputs, by_parameters, by_inputs, state)


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference of two arrays, in units of the largest value of the second, or of 1 if that is more."""
    a, b = (np.asarray(x).astype(np.float64) for x in (ours, theirs))
    assert a.shape == b.shape, f"shape {a.shape}, and {b.shape} there"
    if not a.size:
        return 0.0
    assert np.isfinite(b).all(), "the other library gives NaN or infinity"
    return float(np.max(np.abs(a - b)) / max(1.0, np.max(np.abs(b))))


def compare(ours: Result, theirs: Result, tolerance: float, *, dtypes: bool = True) -> dict[str, float]:
    """The differences by what they are of, in each part of two Results; an AssertionError for one too large."""
    pairs = {}
    for part in dataclasses.fields(Result):
        a, b = getattr(ours, part.name), getattr(theirs, part.name)
        assert jax.tree.structure(a) == jax.tree.structure(b), (part.name, jax.tree.structure(a), jax.tree.structure(b))
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
            pairs[part.name + jax.tree_util.keystr(path)] = (x, y)
    if dtypes:
        kinds = {name: (str(x.dtype), str(y.dtype)) for name, (x, y) in pairs.items() if x.dtype != y.dtype}
        assert not kinds, f"dtypes, ours and theirs: {kinds}"
    found = {name: difference(x, y) for name, (x, y) in pairs.items()}
    wrong = {name: size for name, size in found.items() if not size <= tolerance}
    assert not wrong, f"differences above {tolerance}: {wrong}"
    return found
