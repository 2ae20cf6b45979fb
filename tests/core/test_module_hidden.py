"""Nothing is silently static: Modules, Variables and arrays are found wherever they hide."""

import copy
import functools
import pickle
import types

import jax.numpy as jnp
import numpy as np
import pytest

import nnx


class Leaf(nnx.Module):
    def __init__(self, value=1.0):
        self.w = nnx.Param(jnp.asarray(value, jnp.float32))

    def __call__(self, x):
        return x * self.w


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: (x,), lambda x: {"a": x}, lambda x: [[{"k": (x,)}]]])
@pytest.mark.parametrize("value", [jnp.ones(2), np.ones(2), nnx.Param(1.0)], ids=["jax", "numpy", "Param"])
def test_data_in_a_container_is_refused(wrap, value):
    module = nnx.Module()
    kind = {"ArrayImpl": "JAX array", "ndarray": "NumPy array", "Param": "Param"}[type(value).__name__]
    with pytest.raises(nnx.AttributeKindError, match=rf"that holds a {kind} to `Module.things`.*Use nnx\.") as caught:
        module.things = wrap(value)
    assert ("nnx.Node" in str(caught.value)) == (kind != "Param")
    assert not hasattr(module, "things")


def test_modules_mixed_with_arrays_in_a_container_are_refused():
    module = nnx.Module()
    with pytest.raises(nnx.AttributeKindError, match=r"cannot assign a list that holds a JAX array to `Module.things`"):
        module.things = [Leaf(), jnp.ones(2)]


def _assign_and_partition(root, owner, value):
    """Either may be the one that finds it."""
    owner.thing = value
    root.partition()


@pytest.mark.parametrize("wrap", [lambda x: {x}, lambda x: frozenset({x}), lambda x: {1: x}, lambda x: [{1: x}]])
def test_modules_in_containers_without_a_path_are_refused(wrap):
    module = nnx.Module()
    with pytest.raises(nnx.NnxError, match="Leaf"):
        _assign_and_partition(module, module, wrap(Leaf()))


def test_a_module_appended_to_a_static_list_is_found():
    module = nnx.Module()
    module.blocks = []
    module.blocks.append(Leaf())
    with pytest.raises(
        nnx.StaticError, match=r"static attribute `blocks` holds a Leaf .*\(at `blocks\[0\]`\).*nnx\.Sequence"
    ):
        module.partition()


def test_a_module_appended_after_a_partition_is_found():
    module = nnx.Module()
    module.child = nnx.Module()
    module.child.blocks = [1]
    module.partition()
    module.child.blocks.append(Leaf())
    with pytest.raises(nnx.StaticError, match=r"`child/blocks` holds a Leaf .*`child/blocks\[1\]`"):
        module.partition()
    with pytest.raises(nnx.StaticError, match=r"`child/blocks` holds a Leaf"):
        nnx.jit(lambda m: None)(module)


def test_an_array_put_into_a_static_dict_is_found():
    module = nnx.Module()
    module.config = {"rate": 0.1}
    module.partition()
    module.config["table"] = jnp.ones(3)
    with pytest.raises(nnx.StaticError, match=r"`config` holds a JAX array float32\[3\] \(at `config\['table'\]`\)"):
        module.partition()


class Config:
    def __init__(self, **fields):
        self.__dict__.update(fields)


def _closure(value):
    return lambda: value


def _default(value):
    def function(x=value):
        return x

    return function


def _keyword_default(value):
    def function(*, x=value):
        return x

    return function


HIDING_PLACES = {
    "object field": lambda value: Config(inner=value),
    "nested object field": lambda value: Config(inner=Config(items=[value])),
    "partial argument": lambda value: functools.partial(max, value),
    "partial keyword": lambda value: functools.partial(max, key=value),
    "partial of a partial": lambda value: functools.partial(functools.partial(max, value), 1),
    "closure": _closure,
    "closure over a list": lambda value: _closure([value]),
    "nested closure": lambda value: _closure(_closure(value)),
    "default": _default,
    "keyword default": _keyword_default,
    "list of closures": lambda value: [_closure(value)],
    "tuple in dict": lambda value: {"a": (Config(x=value),)},
    "mapping proxy": lambda value: types.MappingProxyType({"x": value}),
    "set": lambda value: {value},
}


@pytest.mark.parametrize("hide", HIDING_PLACES.values(), ids=HIDING_PLACES)
@pytest.mark.parametrize(
    "make", [Leaf, lambda: nnx.Param(1.0), lambda: nnx.context(0)], ids=["Module", "Variable", "Context"]
)
def test_hidden_modules_and_variables_are_found(hide, make):
    module = nnx.Module()
    module.child = nnx.Module()
    kind = type(make()).__name__
    with pytest.raises(nnx.NnxError, match=kind) as caught:
        _assign_and_partition(module, module.child, hide(make()))
    assert "thing" in str(caught.value)


@pytest.mark.parametrize("hide", HIDING_PLACES.values(), ids=HIDING_PLACES)
def test_a_module_hidden_together_with_its_owner_is_found(hide):
    """Also when the hidden Module is an attribute as well: the static would still be a constant copy of it."""
    module = nnx.Module()
    module.child = Leaf()
    with pytest.raises(nnx.NnxError, match="Leaf"):
        _assign_and_partition(module, module, hide(module.child))


@pytest.mark.parametrize("hide", [HIDING_PLACES["object field"], HIDING_PLACES["partial argument"]])
def test_jax_arrays_in_objects_are_found(hide):
    module = nnx.Module()
    module.thing = hide(jnp.ones(2))
    with pytest.raises(nnx.StaticError, match=r"static attribute `thing` holds a JAX array float32\[2\]"):
        module.partition()


def test_a_bound_method_of_a_module_in_the_graph_is_bound_again():
    class Layer(nnx.Module):
        def __init__(self):
            self.child = Leaf(3.0)
            self.forward = self.child.__call__
            self.own = self.plus

        def plus(self, x):
            return x + self.child.w

    module = Layer()
    merged = module.partition().merge()
    assert merged.forward.__self__ is merged.child
    assert merged.own.__self__ is merged
    for other in (merged, module.clone(), copy.deepcopy(module), pickle.loads(pickle.dumps(nnx.Sequence([Leaf()])))):
        if isinstance(other, Layer):
            other.child.w = jnp.float32(5.0)
            assert other.forward(2.0) == 10.0
            assert other.own(2.0) == 7.0
    assert module.forward(2.0) == 6.0
    module.child.w = jnp.float32(7.0)
    assert nnx.jit(lambda m, x: m.forward(x))(module, 2.0) == 14.0


def test_a_bound_method_of_a_foreign_module_is_refused():
    module = nnx.Module()
    module.forward = Leaf().__call__
    with pytest.raises(
        nnx.StaticError,
        match=r"static attribute `forward` is a bound method of a Leaf that is not part of the same Module",
    ):
        module.partition()


@pytest.mark.parametrize(
    "hide",
    [lambda f: [f], lambda f: functools.partial(f, 1), lambda f: Config(f=f), lambda f: lambda: f],
    ids=["list", "partial", "object", "closure"],
)
def test_a_hidden_bound_method_is_refused(hide):
    module = nnx.Module()
    module.child = Leaf()
    module.thing = hide(module.child.__call__)
    with pytest.raises(nnx.StaticError, match="static attribute `thing` holds a Leaf"):
        module.partition()


def test_modules_in_a_variables_value_are_refused():
    module = nnx.Module()
    with pytest.raises(nnx.AttributeKindError, match=r"the value of `Module.w` holds a Leaf"):
        module.w = nnx.Param([Leaf()])
    module.w = nnx.Param(1.0)
    with pytest.raises(nnx.AttributeKindError, match=r"the value of `Module.w` holds a Leaf"):
        module.w = nnx.Param({"a": Leaf()})


def test_a_container_of_modules_over_a_variable_is_refused():
    module = Leaf()
    with pytest.raises(nnx.AttributeKindError, match=r"Leaf.w"):
        module.w = [Leaf()]
