"""Pure: the pair (state or states, moduledef), with the functional API on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import jax

from nnx.core._errors import FilterError, StructureError
from nnx.core._filters import FilterLike
from nnx.core._graph import M, ModuleDef, without_cells
from nnx.core._layout import layout_of, state_of
from nnx.core._object import Object
from nnx.core._state import State

__all__ = ["Caller", "Pure", "PureModule", "caller", "states_of"]

if TYPE_CHECKING:
    import typing_extensions

    # With a default, so that strict checkers take the bare class; Python itself has defaults since 3.13.
    S = typing_extensions.TypeVar("S", default=Any)
else:
    S = TypeVar("S")


class Caller:
    """Stands for a Module, method or submodule reached by `.` and `[]`; calling it calls what it stands for."""

    __slots__ = ("_path", "_run")

    def __init__(self, run: Callable[..., Any], path: tuple[tuple[str, Any], ...] = ()) -> None:
        self._run = run
        self._path = path

    def __getattr__(self, name: str) -> Caller:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return Caller(self._run, (*self._path, ("attribute", name)))

    def __getitem__(self, key: Any) -> Caller:
        return Caller(self._run, (*self._path, ("item", key)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._access, args, kwargs)

    def _access(self, target: Any) -> Any:
        for how, key in self._path:
            target = getattr(target, key) if how == "attribute" else target[key]
        return target

    def __repr__(self) -> str:
        return "apply" + "".join(f".{key}" if how == "attribute" else f"[{key!r}]" for how, key in self._path)


def caller(run: Callable[[Callable[[Any], Any], Any, Any], Any]) -> Any:
    """Make a Caller; `run(access, args, kwargs)` gets a function that finds the callable on a Module."""
    return Caller(run)


def states_of(updates: Any) -> tuple[State, ...] | None:
    """The States in a State or a tuple of them; None if it is something else."""
    if isinstance(updates, State):
        return (updates,)
    if isinstance(updates, (tuple, list)) and all(isinstance(item, State) for item in updates):
        return tuple(updates)
    return None


class Pure(tuple[S, ModuleDef[M]], Generic[S, M]):
    """The pair `(state, moduledef)` or `(states, moduledef)` that `partition` returns: a Module as a pytree.

    Example:
        >>> import jax.numpy as jnp, nnx
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.w = nnx.Param(jnp.float32(2))
        ...     def __call__(self, x):
        ...         return x * self.w
        >>> pure = Scale().partition()
        >>> state, moduledef = pure
        >>> float(pure.call(3.0))
        6.0
    """

    __slots__ = ()

    @staticmethod
    def new(states: Any, moduledef: ModuleDef[Any]) -> Pure[Any, Any]:
        """Pair a State, or a tuple of States, with a ModuleDef."""
        return Pure((states, moduledef))

    @staticmethod
    def of(root: Object) -> Pure[Any, Any]:
        """Partition a Module without filters."""
        layout = layout_of(root)
        return Pure((state_of(layout), layout.moduledef))

    @property
    def states(self) -> S:
        """The State, or the tuple of States."""
        return self[0]

    @property
    def state(self) -> State:
        """All States as one."""
        states = self._states()
        return states[0].merge(*states[1:]) if states else State()

    @property
    def moduledef(self) -> ModuleDef[M]:
        """The static half."""
        return self[1]

    def _states(self) -> tuple[State, ...]:
        found = states_of(self[0])
        if found is None:
            raise StructureError(f"a Pure holds a State or a tuple of States, got {type(self[0]).__name__}")
        return found

    def merge(self) -> M:
        """Make the Module."""
        return self[1].merge(*self._states())

    @property
    def apply(self) -> Any:
        """Call the Module, a method or a submodule: `pure.apply(x)`, `pure.apply.method(x)` give `(out, Pure)`."""
        return self[1].apply(*self._states())

    @property
    def call(self) -> Any:
        """As `apply`, for calls whose changes to the state are not wanted: `pure.call(x)` gives the output alone."""

        def run(access: Callable[[Any], Any], args: Any, kwargs: Any) -> Any:
            return access(self.merge())(*args, **kwargs)

        return caller(run)

    def filter(self, *filters: FilterLike) -> Any:
        """See `State.filter`."""
        return self.state.filter(*filters)

    def partition(self, *filters: FilterLike) -> Pure[Any, M]:
        """See `Module.partition`."""
        return Pure((self.state.partition(*filters), self[1]))

    def pop_state(self, *filters: FilterLike) -> tuple[Any, Pure[State, M]]:
        """Take out the nodes that the filters match, from the State and from the definition.

        Returns:
            What was taken (a State for one filter, else a tuple of States), and the Pure without it.

        Raises:
            FilterError: no filter is given, or `...` is not the last.
        """
        if not filters:
            raise FilterError("pop_state takes at least one filter")
        state = self.state
        taken = state.filter(*filters)
        gone = taken if isinstance(taken, State) else State.merge(*taken)
        index = self[1].schema.index
        positions = {index[path] for path in gone.paths if path in index}
        return taken, Pure((state - gone, without_cells(self[1], positions)))

    def update_state(self, *updates: Any) -> Pure[State, M]:
        """Return a Pure with new values: an update wins over what was there, a later one over an earlier.

        Args:
            *updates: States, tuples of States, Pures, or Modules.
        """
        merged = self.state
        moduledef = self[1]
        for given in updates:
            update = Pure.of(given) if isinstance(given, Object) else given
            if isinstance(update, Pure):
                moduledef = update[1]
            states = update._states() if isinstance(update, Pure) else states_of(update)
            if states is None:
                raise StructureError(f"update_state takes States, Pures or Modules, got {type(update).__name__}")
            merged = merged.merge(*states)
        if moduledef is not self[1]:
            # The structure of the update replaces the old one, so entries that it no longer has must go.
            keep = moduledef.schema.index
            merged = merged.filter(lambda path, _: path in keep)
        return Pure((merged, moduledef))

    def __repr__(self) -> str:
        return f"Pure(\n{self[0]!r},\n{self[1]!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Pure.new, (self[0], self[1]))


PureModule = Pure

jax.tree_util.register_pytree_with_keys(
    Pure,
    lambda pure: (((jax.tree_util.SequenceKey(0), pure[0]), (jax.tree_util.SequenceKey(1), pure[1])), None),
    lambda _, children: Pure(tuple(children)),
    lambda pure: ((pure[0], pure[1]), None),
)
