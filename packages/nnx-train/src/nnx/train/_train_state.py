"""TrainState: all that a training step reads and returns, as one immutable pytree for raw JAX transforms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import jax

from nnx.core import Module, ModuleDef, Param, State, StructureError
from nnx.train._updates import (
    check_gradients,
    from_arrays,
    init_optimizer,
    known_names,
    path_list,
    step_array,
    to_arrays,
    to_tx,
    update,
)

__all__ = ["TrainState"]

if TYPE_CHECKING:
    import typing_extensions

    # With a default, so that strict checkers take the bare class; Python itself has defaults since 3.13.
    M = typing_extensions.TypeVar("M", default=Any)
else:
    M = TypeVar("M")
N = TypeVar("N", bound=Module)


class TrainState(Generic[M]):
    """Parameters, optimizer state, step and any further States of a model in training, as one immutable pytree.

    The arrays are the leaves; `moduledef` and `tx` are static. So a training step is an ordinary function of a
    TrainState for `jax.jit`, donation included: `jax.jit(step, donate_argnums=0)`.

    optax receives the parameters as a dict of plain arrays by path (`{"encoder/kernel": Array, ...}`), and so do the
    functions and labels of `optax.masked`, `optax.partition` and their kin.

    An optax transformation is a pair of functions, which compare by identity: two TrainStates with `tx` from two calls
    of `optax.adam(1e-3)` compile a step twice. Make `tx` once and hand it around.

    Args:
        moduledef: the static half of the model, from `model.partition(...)`.
        params: what is trained.
        tx: an optax gradient transformation.
        step: the number of steps taken; an integer becomes an int32 array.
        **states: further pytrees by name, most often States such as `batch_stats`; they are attributes as well.

    Raises:
        TypeError: an argument is of the wrong kind, or a name is taken by TrainState itself.

    Example:
        >>> import jax, jax.numpy as jnp, nnx, optax
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.factor = nnx.Param(jnp.array(1.0))
        ...     def __call__(self, x):
        ...         return self.factor * x
        >>> params, moduledef = Scale().partition(nnx.Param)
        >>> state = nnx.TrainState(moduledef, params=params, tx=optax.sgd(0.5))
        >>> @jax.jit
        ... def train_step(state, x, y):
        ...     def loss(params):
        ...         prediction, _ = state.apply(params)(x)
        ...         return (prediction - y) ** 2
        ...     return state.apply_gradients(jax.grad(loss)(state.params))
        >>> state = train_step(state, 1.0, 3.0)
        >>> print(state.step, state.merge().factor)
        1 3.0
    """

    __slots__ = ("__weakref__", "_states", "_static", "opt_state", "params", "step")

    params: State
    opt_state: Any
    step: Any
    _states: Mapping[str, Any]
    _static: tuple[ModuleDef[M], Any, tuple[str, ...]]

    _own: ClassVar[frozenset[str]]

    def __init__(
        self, moduledef: ModuleDef[M], *, params: State, tx: Any, step: int | jax.Array = 0, **states: Any
    ) -> None:
        if not isinstance(moduledef, ModuleDef):
            raise TypeError(
                f"TrainState takes a ModuleDef first, got {type(moduledef).__name__}: write "
                "`params, moduledef = model.partition(nnx.Param)`, or `TrainState.from_module(model, tx)`"
            )
        if not isinstance(params, State):
            raise TypeError(f"TrainState: params must be a State, got {type(params).__name__}")
        tx = to_tx(tx)
        for name, value in states.items():
            if name in self._own or name.startswith("_"):
                raise TypeError(f"TrainState: the name `{name}` is taken; give the state another")
            _check_pytree(name, value)
        self._fill((moduledef, tx, tuple(sorted(states))), params, init_optimizer(tx, params), step_array(step), states)

    def _fill(
        self, static: tuple[ModuleDef[M], Any, tuple[str, ...]], params: State, opt_state: Any, step: Any, states: Any
    ) -> None:
        put = object.__setattr__
        put(self, "_static", static)
        put(self, "params", params)
        put(self, "opt_state", opt_state)
        put(self, "step", step)
        put(self, "_states", states)

    @classmethod
    def _make(cls, static: tuple[ModuleDef[M], Any, tuple[str, ...]], children: Any) -> TrainState[M]:
        # No checks: JAX also puts placeholders where arrays belong.
        params, opt_state, step, *states = children
        new = object.__new__(cls)
        _put_static(new, static)
        _put_params(new, params)
        _put_opt_state(new, opt_state)
        _put_step(new, step)
        _put_states(new, dict(zip(static[2], states, strict=True)) if states else {})
        return new

    @classmethod
    def from_module(
        cls, model: N, tx: Any, wrt: Any = Param, *, step: int | jax.Array = 0, **states: Any
    ) -> TrainState[N]:
        """Make a TrainState of a Module.

        The state and the Module hold the same arrays. A step that donates the state consumes them: go on with
        `state.merge()`, not with `model`.

        Args:
            model: the Module.
            tx: an optax gradient transformation.
            wrt: the filter of what is trained. The rest is kept by collection, as `state.batch_stats` and so on;
                parameters left out of `wrt` are `state.frozen`, and take neither gradient nor optimizer memory.
            step: the number of steps taken so far.
            **states: further pytrees by name, such as `metrics=metrics.partition()`.

        Raises:
            TypeError: `model` is no Module, or a name is taken.
            StructureError: `wrt` selects nothing.
        """
        if not isinstance(model, Module):
            raise TypeError(f"TrainState.from_module takes a Module, got {type(model).__name__}")
        moduledef: Any
        state, moduledef = model.partition()
        params = state.filter(wrt)
        if not params:
            paths = map("/".join, state.paths)
            raise StructureError(
                f"wrt={wrt!r} selects nothing of this {type(model).__name__}: {known_names('', paths)}"
            )
        groups: dict[str, list[tuple[str, ...]]] = {}
        rest = state - params
        for path, kind, _ in rest.schema.entries:
            collection: str = getattr(kind, "collection", "") or "buffers"
            name = "frozen" if collection == "params" else collection
            groups.setdefault(f"{name}_state" if name in cls._own else name, []).append(path)
        if taken := sorted(groups.keys() & states.keys()):
            raise TypeError(f"TrainState.from_module: {path_list(taken)} is what the model's own State is called")
        states |= {name: State({path: rest[path] for path in paths}) for name, paths in groups.items()}
        made: Any = cls(moduledef, params=params, tx=tx, step=step, **states)
        return made

    @property
    def moduledef(self) -> ModuleDef[M]:
        """The static half of the model."""
        return self._static[0]

    @property
    def tx(self) -> Any:
        """The optax gradient transformation."""
        return self._static[1]

    def _entries(self) -> dict[str, Any]:
        """What `apply` and `merge` know by name."""
        return {"params": self.params, **{name: self._states[name] for name in self._static[2]}}

    def _select(self, method: str, states: tuple[Any, ...]) -> Iterator[State]:
        entries = self._entries()
        if not states:
            yield from (entry for entry in entries.values() if isinstance(entry, State))
        for state in states:
            entry = state
            if isinstance(state, str):
                if state not in entries:
                    raise StructureError(
                        f"TrainState.{method}: no state named `{state}`; {known_names(state, entries)}"
                    )
                entry = entries[state]
            if not isinstance(entry, State):
                what = (
                    f"`{state}` is a {type(entry).__name__}"
                    if isinstance(state, str)
                    else f"got a {type(state).__name__}"
                )
                raise TypeError(f"TrainState.{method} takes States and names of States; {what}")
            yield entry

    def apply(self, *states: State | str) -> Any:
        """Call the model as a function: `out, (state, moduledef) = state.apply("params", "batch_stats")(x, ctx=ctx)`.

        Methods and submodules are reached through `.` and `[]`: `state.apply("params").encoder(x)`.

        Args:
            *states: States, or names of this TrainState's own (`"params"`, `"batch_stats"`); none means all.

        Returns:
            What `moduledef.apply` returns: a caller that gives `(out, (state, moduledef))`.

        Raises:
            StructureError: a name is not known.
            TypeError: an argument is neither a State nor a name of one.
        """
        return self.moduledef.apply(*self._select("apply", states))

    def merge(self, *states: State | str) -> M:
        """Make the Module of this state.

        Args:
            *states: as for `apply`; none means all.

        Raises:
            StructureError: a name is not known.
            TypeError: an argument is neither a State nor a name of one.
        """
        return self.moduledef.merge(*self._select("merge", states))

    def apply_gradients(
        self, grads: State, *, tx_args: Mapping[str, Any] | None = None, **states: Any
    ) -> TrainState[M]:
        """Return the state after one step of the optimizer.

        Args:
            grads: the gradients of the parameters, with the same paths.
            tx_args: what else `tx.update` takes, such as `value`, `grad` and `value_fn` for a line search; States
                among them are handed on as dicts of arrays, and `value_fn` is called with a State.
            **states: new values of the further States, such as `batch_stats=updates.filter(nnx.BatchStat)`.

        Raises:
            TypeError: `grads` is no State.
            StructureError: the gradients' paths or shapes are not those of the parameters; a name of a state is not
                known; a new State has other paths than the old one.
        """
        check_gradients(grads, self.params, "TrainState.apply_gradients")
        for name, value in states.items():
            self._check_name("apply_gradients", name, self._static[2])
            _check_pytree(name, value)
            _check_paths(name, self._states[name], value)
        params, opt_state = update(self.tx, self.params, grads, self.opt_state, tx_args or {})
        return self._make(
            self._static, (params, opt_state, self.step + 1, *({**self._states, **states}[n] for n in self._static[2]))
        )

    def params_by(self, function: Callable[[Any, dict[str, Any]], Any]) -> State:
        """The parameters that a function of optax makes of the optimizer's state and the parameters.

        Schedule-free optimizers have such a function: what they evaluate is not what they train. So
        `state.params_by(optax.contrib.schedule_free_eval_params)` are the parameters for `state.apply`.

        Args:
            function: takes the state of `tx` and the parameters as a dict of arrays by path, and returns such a dict.
        """
        return from_arrays(self.params, function(self.opt_state, to_arrays(self.params)))

    def replace(self, **changes: Any) -> TrainState[M]:
        """Return a TrainState with some of its entries replaced.

        Args:
            **changes: `params`, `opt_state`, `step`, `moduledef`, `tx` (together with its `opt_state`), or further
                States by name.

        Raises:
            StructureError: a name is not known, or the optimizer state would no longer fit the parameters or `tx`.
            TypeError: a value is of the wrong kind.
        """
        known = ("moduledef", "opt_state", "params", "step", "tx", *self._static[2])
        for name, value in changes.items():
            self._check_name("replace", name, known)
            if name not in ("moduledef", "tx"):
                _check_pytree(name, value)
        if "opt_state" not in changes:
            if "tx" in changes and to_tx(changes["tx"]) != self.tx:
                raise StructureError(
                    "TrainState.replace: another tx has another optimizer state; give `opt_state=` as well"
                )
            if "params" in changes:
                _check_paths(
                    "params", self.params, changes["params"], "; give `opt_state=` as well, or make a new TrainState"
                )
        if not isinstance(changes.get("params", self.params), State):
            raise TypeError(f"TrainState.replace: params must be a State, got {type(changes['params']).__name__}")
        if not isinstance(changes.get("moduledef", self.moduledef), ModuleDef):
            raise TypeError(
                f"TrainState.replace: moduledef must be a ModuleDef, got {type(changes['moduledef']).__name__}"
            )
        static = (changes.get("moduledef", self.moduledef), to_tx(changes.get("tx", self.tx)), self._static[2])
        return self._make(
            static,
            (
                changes.get("params", self.params),
                changes.get("opt_state", self.opt_state),
                step_array(changes.get("step", self.step)),
                *(changes.get(name, self._states[name]) for name in static[2]),
            ),
        )

    def _check_name(self, method: str, name: str, known: tuple[str, ...]) -> None:
        if name not in known:
            raise StructureError(
                f"TrainState.{method}: no state named `{name}`; {known_names(name, known)}. "
                f"States are named when the TrainState is made: TrainState(..., {name}=...)"
            )

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name in self._states:
            return self._states[name]
        # While unpickling and copying there are no slots yet, and Python asks for its hooks.
        known = [] if name.startswith("_") else [*self._entries(), "moduledef", "opt_state", "step", "tx"]
        hint = f"; {known_names(name, known)}" if known else ""
        raise AttributeError(f"TrainState has no attribute `{name}`{hint}", name=name)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a TrainState is immutable: write `state = state.replace({name}=...)`")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a TrainState is immutable")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._states})

    def __reduce__(self) -> Any:
        return (TrainState._make, (self._static, _flatten(self)[0]))

    def __repr__(self) -> str:
        entries = [f"{name}={_summary(entry)}" for name, entry in self._entries().items()]
        return f"TrainState(step={_summary(self.step)}, {', '.join(entries)}, opt_state={_summary(self.opt_state)})"


def _summary(entry: Any) -> str:
    leaves = jax.tree.leaves(entry)
    if len(leaves) == 1 and leaves[0] is entry:
        return str(entry)
    size = sum(getattr(leaf, "size", 1) for leaf in leaves)
    return f"{type(entry).__name__}[{len(leaves)} arrays, {size:,} values]"


def _check_pytree(name: str, value: Any) -> None:
    if isinstance(value, Module):
        raise TypeError(
            f"TrainState: `{name}` is a {type(value).__name__}, a Module; give its State: `model.filter(...)`"
        )


def _check_paths(name: str, old: Any, new: Any, way_out: str = "; to change the structure, use `replace`") -> None:
    """A State given for a State must have its paths: the whole of the updates in place of a part is a likely slip."""
    if not isinstance(old, State):
        return
    if not isinstance(new, State):
        raise StructureError(f"TrainState: `{name}` is a State and cannot become a {type(new).__name__}{way_out}")
    if new.schema is old.schema or new.paths == old.paths:
        return
    before, after = to_arrays(old), to_arrays(new)
    problems = []
    if missing := [path for path in before if path not in after]:
        problems.append(f"it lacks {path_list(missing)}")
    if unexpected := [path for path in after if path not in before]:
        problems.append(f"it has {path_list(unexpected)}, which the old one has not")
    raise StructureError(f"TrainState: the new `{name}` has other paths than the old: {'; '.join(problems)}{way_out}")


# The slots' own setters: JAX makes a TrainState anew at every step.
_put_static = TrainState.__dict__["_static"].__set__
_put_params = TrainState.__dict__["params"].__set__
_put_opt_state = TrainState.__dict__["opt_state"].__set__
_put_step = TrainState.__dict__["step"].__set__
_put_states = TrainState.__dict__["_states"].__set__


def _flatten(state: TrainState) -> tuple[tuple[Any, ...], tuple[ModuleDef, Any, tuple[str, ...]]]:
    static = state._static
    if not static[2]:
        return (state.params, state.opt_state, state.step), static
    states = state._states
    return (state.params, state.opt_state, state.step, *[states[name] for name in static[2]]), static


def _flatten_with_keys(state: TrainState) -> tuple[Any, Any]:
    children, static = _flatten(state)
    names = ("params", "opt_state", "step", *static[2])
    return tuple((jax.tree_util.GetAttrKey(name), child) for name, child in zip(names, children, strict=True)), static


jax.tree_util.register_pytree_with_keys(TrainState, _flatten_with_keys, TrainState._make, _flatten)

# A further State must not hide what a TrainState has itself.
TrainState._own = frozenset(name for name, _ in inspect.getmembers_static(TrainState) if not name.startswith("__")) | {
    "tx_args",
    "grads",
}
