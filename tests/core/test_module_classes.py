"""Module: what class attributes, properties, descriptors and base classes have to say about an attribute."""

import copy
import functools
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tests.core.models import Count, Leaf

import nnx

# Class attributes, properties, descriptors


def test_a_class_attribute_does_not_hide_a_variable():
    class Layer(nnx.Module):
        bias = None

        def __init__(self, use_bias):
            if use_bias:
                self.bias = nnx.Param(jnp.ones(2))

    without, with_bias = Layer(False), Layer(True)
    assert without.bias is None
    np.testing.assert_array_equal(with_bias.bias, jnp.ones(2))
    assert Layer.bias is None
    with_bias.bias = jnp.zeros(2)
    assert with_bias.get_variable("bias").value.sum() == 0
    del with_bias.bias
    assert with_bias.bias is None


def test_a_class_attribute_of_a_base_does_not_hide_a_variable():
    class Base(nnx.Module):
        scale = 1.0

    class Derived(Base):
        def __init__(self):
            self.scale = nnx.Param(2.0)

    class Plain(Base):
        pass

    assert Derived().scale == 2.0
    assert Derived().partition().merge().scale == 2.0
    assert Plain().scale == 1.0
    plain = Plain()
    plain.scale = 3.0
    assert plain.scale == 3.0
    assert Derived().scale == 2.0


def test_a_static_in_the_place_of_a_shadowed_class_attribute():
    class Layer(nnx.Module):
        bias = None

    first, second = Layer(), Layer()
    first.bias = nnx.Param(1.0)
    second.bias = "none at all"
    assert second.bias == "none at all"
    assert second.partition().merge().bias == "none at all"
    assert copy.deepcopy(second).bias == "none at all"
    del second.bias
    assert second.bias is None


def test_a_variable_under_a_methods_name_leaves_the_method_to_others():
    class Layer(nnx.Module):
        def scale(self):
            return "method"

    first, second = Layer(), Layer()
    first.scale = nnx.Param(1.0)
    assert first.scale == 1.0
    assert second.scale() == "method"
    assert Layer.scale(second) == "method"


def test_dataclass_default_does_not_hide_a_variable():
    @nnx.dataclass
    class Layer(nnx.Module):
        rate: float = 0.5
        w: object = None

        def __post_init__(self):
            self.w = nnx.Param(jnp.ones(2))

    module = Layer()
    assert module.rate == 0.5
    np.testing.assert_array_equal(module.w, jnp.ones(2))
    assert module.filter(nnx.Param).paths == (("w",),)


def test_property_getter_and_setter():
    class Layer(nnx.Module):
        def __init__(self):
            self.raw = nnx.Param(jnp.float32(2.0))

        @property
        def doubled(self):
            return self.raw * 2

        @doubled.setter
        def doubled(self, value):
            self.raw = value / 2

    module = Layer()
    assert module.doubled == 4.0
    module.doubled = jnp.float32(10.0)
    assert module.raw == 5.0
    assert module.get_state().paths == (("raw",),)


def test_a_property_without_a_setter_refuses():
    class Layer(nnx.Module):
        @property
        def fixed(self):
            return 1

    with pytest.raises(AttributeError, match="fixed"):
        Layer().fixed = nnx.Param(1)


def test_a_property_deleter_is_called():
    class Layer(nnx.Module):
        def __init__(self):
            self.held = 1

        @property
        def view(self):
            return self.held

        @view.deleter
        def view(self):
            del self.held

    module = Layer()
    del module.view
    assert not hasattr(module, "held")


def test_an_attribute_error_inside_a_property_is_its_own():
    class Layer(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(1.0)

        @property
        def shape(self):
            return self.kernal.shape

    hint = r"; did you mean `kernel`\?" if sys.version_info >= (3, 12) else ""
    with pytest.raises(AttributeError, match=r"'Layer' object has no attribute 'kernal'" + hint) as caught:
        Layer().shape
    assert caught.value.name == "kernal"
    assert not hasattr(Layer(), "shape")


def test_an_attribute_error_of_another_object_inside_a_property():
    class Layer(nnx.Module):
        @property
        def broken(self):
            return (1).nothing

    with pytest.raises(AttributeError, match="'int' object has no attribute 'nothing'"):
        Layer().broken


def test_an_unknown_attribute_names_what_there_is():
    hint = r" \(it has: w\)" if sys.version_info >= (3, 12) else ""
    with pytest.raises(AttributeError, match=r"'Leaf' object has no attribute 'zzz'" + hint):
        Leaf().zzz
    assert getattr(Leaf(), "zzz", "default") == "default"


def test_deleting_an_unknown_attribute():
    with pytest.raises(AttributeError, match="'Leaf' object has no attribute 'v'"):
        del Leaf().v


def test_cached_property_works_and_is_no_state():
    class Layer(nnx.Module):
        def __init__(self):
            self.n = 3
            self.calls = Count(0)

        @functools.cached_property
        def table(self):
            self.calls += 1
            return jnp.arange(self.n)

    module = Layer()
    first = module.get_module_def()
    assert module.table is module.table
    assert module.calls == 1
    assert module.get_module_def() == first
    assert module.get_state().paths == (("calls",),)
    for other in (
        module.partition().merge(),
        module.clone(),
        copy.copy(module),
        copy.deepcopy(module),
        nnx.jit(lambda m: m.clone())(module),
    ):
        assert "table" not in vars(other)
        np.testing.assert_array_equal(other.table, jnp.arange(3))
        assert other.calls == 2


def test_a_cached_property_inside_of_jit_leaks_nothing():
    class Layer(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.float32(2.0))

        @functools.cached_property
        def squared(self):
            return self.w**2

    module = Layer()
    step = nnx.jit(lambda m, x: m.squared * x)
    assert step(module, 3.0) == 12.0
    assert "squared" not in vars(module)
    assert module.squared == 4.0


def test_inheritance_and_mixins():
    class Mixin:
        def greet(self):
            return f"{type(self).__name__} {self.w}"

    class Child(Mixin, Leaf):
        def __init__(self):
            super().__init__(2.0)
            self.extra = nnx.Param(1.0)

    assert Child().greet() == "Child 2.0"
    assert Child().get_state().paths == (("extra",), ("w",))


def test_a_users_getattr_is_asked_last():
    class Delegates(nnx.Module):
        def __init__(self):
            self.inner = Leaf(4.0)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    assert Delegates().w == 4.0
