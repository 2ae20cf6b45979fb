"""The layer of a case in nnx and in flax.nnx, each as a pure function of parameters, statistics and inputs."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx as flax_nnx
from tests.parity.cases import NUMBERS, Case, Path, Result, compare, differentiate, draw_values

import nnx
from nnx import layers

Shapes = dict[Path, jax.ShapeDtypeStruct]

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""A program that runs once on small arrays is not worth a compiler's care."""


def _new(made: Any, randomness: Mapping[str, Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """The layer, handed the source of its randomness where it cannot do without."""
    parameters = inspect.signature(made.__init__ if isinstance(made, type) else made).parameters
    any_keyword = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    needed = {
        key: x
        for key, x in randomness.items()
        if (parameters[key].default is inspect.Parameter.empty if key in parameters else any_keyword)
    }
    return made(*args, **options, **needed)


class Ours:
    """A layer of nnx."""

    def __init__(self, case: Case) -> None:
        self.case = case

        def make() -> Any:
            ctx = nnx.context(0)
            return case.build(lambda name, *args, **options: _new(getattr(layers, name), {"ctx": ctx}, args, options))

        state, self.definition = (make() if case.concrete else nnx.eval_shape(make)).partition()
        self.state = state
        self.params: Shapes = {path: v.value for path, v in state.filter(nnx.Param).items()}
        self.stats: Shapes = {path: v.value for path, v in state.filter(nnx.BatchStat).items()}

    def evaluate(self, params: Mapping[Path, Any], stats: Mapping[Path, Any], inputs: tuple[Any, ...]) -> Result:
        def call(params: Mapping[Path, Any], inputs: tuple[Any, ...]) -> Any:
            values = {**dict(zip(self.state.paths, self.state.raw_values, strict=True)), **params, **stats}
            model = self.definition.merge(self.state.replace_values([values[path] for path in self.state.paths]))
            outputs = self.case.outputs(model, inputs)
            after = model.get_state()
            return outputs, {path: after[path].value for path in stats}

        return differentiate(call, dict(params), inputs)


def _flax_attention(*args: Any, rotary: Any = None, **options: Any) -> Any:
    """Attention of flax, which has rotary positions as another function and wants to be told not to decode."""
    if rotary is not None:
        options["attention_fn"] = functools.partial(flax_nnx.dot_product_attention_with_rope, rope=rotary)
    return flax_nnx.MultiHeadAttention(*args, decode=False, **options)


def _flax_rotary(rotary_dim: int, *, base: float = 10_000.0) -> Any:
    return flax_nnx.RoPE(theta=base)


FLAX_MADE = {"MultiHeadAttention": _flax_attention, "RotaryEmbedding": _flax_rotary}
"""What flax.nnx has under another name or with other arguments."""


class Flax:
    """A layer of flax.nnx: the name and the arguments are the same, and so are the paths of the parameters."""

    def __init__(self, case: Case) -> None:
        self.case = case

        def make() -> Any:
            rngs = flax_nnx.Rngs(0)

            def new(name: str, *args: Any, **options: Any) -> Any:
                return _new(FLAX_MADE.get(name) or getattr(flax_nnx, name), {"rngs": rngs}, args, options)

            return case.build(new)

        self.definition, state = flax_nnx.split(make() if case.concrete else flax_nnx.eval_shape(make))
        self.state = list(flax_nnx.to_flat_state(state))
        self.params: Shapes = {_flat(path): v.get_value() for path, v in self.state if isinstance(v, flax_nnx.Param)}
        self.stats: Shapes = {_flat(path): v.get_value() for path, v in self.state if isinstance(v, flax_nnx.BatchStat)}

    def evaluate(self, params: Mapping[Path, Any], stats: Mapping[Path, Any], inputs: tuple[Any, ...]) -> Result:
        def call(params: Mapping[Path, Any], inputs: tuple[Any, ...]) -> Any:
            values = {**params, **stats}
            filled = [(path, _flax_filled(v, values, _flat(path))) for path, v in self.state]
            model = flax_nnx.merge(self.definition, flax_nnx.from_flat_state(filled))
            outputs = self.case.outputs(model, inputs)
            after = {_flat(path): v for path, v in flax_nnx.to_flat_state(flax_nnx.state(model))}
            return outputs, {path: after[path].get_value() for path in stats}

        return differentiate(call, dict(params), inputs)


def _flat(path: tuple[Any, ...]) -> Path:
    """A path of flax.nnx, where a part may be a path itself."""
    return tuple(name for part in path for name in (_flat(part) if isinstance(part, tuple) else (str(part),)))


def _flax_filled(leaf: Any, values: Mapping[Path, Any], path: Path) -> Any:
    """A Variable with its value; the arrays that the case gave are there already."""
    if not isinstance(leaf, flax_nnx.Variable):
        return leaf
    if isinstance(leaf, flax_nnx.RngKey):
        return leaf.replace(jax.random.key(0))
    if isinstance(leaf, flax_nnx.RngCount):
        return leaf.replace(jax.numpy.uint32(0))
    return leaf.replace(values[path])


def _evaluate_function(case: Case, function: Callable[..., Any], inputs: tuple[Any, ...]) -> Result:
    return differentiate(lambda _, inputs: (case.outputs(function, inputs), {}), {}, inputs)


def evaluate_ours(case: Case) -> tuple[Result, dict[Path, Any], dict[Path, Any], tuple[Any, ...]]:
    """What the layer or function of nnx gives, and what it was given: parameters, statistics, inputs."""
    rng = case.draws()
    if is_function(case.layer):
        inputs = case.arrays(rng)
        run = functools.partial(_evaluate_function, case, getattr(layers, case.layer))
        return jax.jit(run, compiler_options=QUICK)(inputs), {}, {}, inputs
    side = Ours(case)
    params, stats, inputs = draw_values(rng, side.params), draw_values(rng, side.stats), case.arrays(rng)
    return jax.jit(side.evaluate, compiler_options=QUICK)(params, stats, inputs), params, stats, inputs


def is_function(name: str) -> bool:
    """Whether this name of nnx.layers is a function and no Module."""
    return not isinstance(getattr(layers, name), type)


def check_flax(case: Case) -> dict[str, float]:
    """Compares a layer, or a function, with that of flax.nnx: paths and shapes, outputs, gradients, state."""
    with jax.enable_x64(NUMBERS[case.numbers].wide):
        rng = case.draws()
        if is_function(case.layer):
            first = functools.partial(_evaluate_function, case, getattr(layers, case.layer))
            second = functools.partial(_evaluate_function, case, getattr(flax_nnx, case.layer))
            given: tuple[Any, ...] = (case.arrays(rng),)
        else:
            ours, theirs = Ours(case), Flax(case)
            for a, b in ((ours.params, theirs.params), (ours.stats, theirs.stats)):
                shapes = [{path: (x.shape, str(x.dtype)) for path, x in side.items()} for side in (a, b)]
                assert shapes[0] == shapes[1], f"ours {shapes[0]}, theirs {shapes[1]}"
            first, second = ours.evaluate, theirs.evaluate
            given = (draw_values(rng, ours.params), draw_values(rng, ours.stats), case.arrays(rng))

        # One program for both sides, as compiling is what takes the time.
        def both(*given: Any) -> tuple[Result, Result]:
            with_ours = first(*given)
            # What flax broadcasts between ranks is its own affair.
            with jax.numpy_rank_promotion("allow"):
                return with_ours, second(*given)

        return compare(*jax.jit(both, compiler_options=QUICK)(*given), case.tolerance)
