"""Ahead-of-time compilation: the stages of JAX, with Modules."""

import jax
import jax.numpy as jnp
import pytest
from tests.core.jit_models import Leaf, Model

import nnx


def test_lower_and_compile():
    @nnx.jit
    def step(model, x):
        return model(x), model

    model = Model()
    model.count = jnp.int32(0)
    lowered = step.lower(model, 1.0)
    assert model.count == 0
    assert "func" in lowered.as_text()
    compiled = lowered.compile()
    for i in range(1, 3):
        y, got = compiled(model, 1.0)
        assert got is model
        assert float(y) == 6.0
        assert model.count == i
    assert compiled.cost_analysis() is not None


def test_lower_by_keyword_and_with_statics():
    @nnx.jit(static_argnames="n")
    def step(*, model, n):
        return model.w * n

    compiled = step.lower(model=Leaf(2.0), n=3).compile()
    assert float(compiled(model=Leaf(5.0))) == 15.0


def test_lower_of_a_method_whose_instance_is_static():
    class Trainer:
        rate = 3.0

        @nnx.jit(static_argnums=0)
        def step(self, model, x, *, scale=1.0):
            model.w += 1
            return model.w * x * scale * self.rate

        @classmethod
        @nnx.jit(static_argnums=0)
        def of_class(cls, model):
            return model.w * cls.rate

    trainer, leaf = Trainer(), Leaf(1.0)
    assert float(trainer.step(leaf, 2.0, scale=0.5)) == 6.0
    compiled = trainer.step.lower(leaf, 2.0).compile()
    assert float(compiled(leaf, 2.0)) == 18.0
    assert float(trainer.step.trace(leaf, 2.0).lower().compile()(leaf, 2.0)) == 24.0
    assert leaf.w == 4.0
    assert float(Trainer.of_class(leaf)) == float(trainer.of_class(leaf)) == 12.0


def test_lower_of_methods_and_modules():
    leaf = Leaf(2.0)
    assert float(leaf.compiled.lower(1.0).compile()(1.0)) == 3.0
    assert float(nnx.jit(leaf).lower(2.0).compile()(2.0)) == 6.0


def test_a_compiled_function_refuses_other_structures():
    compiled = nnx.jit(lambda m: m.w).lower(Leaf()).compile()
    with pytest.raises(TypeError, match="does not match the one that this function was compiled for"):
        compiled(Leaf(rate=0.25))


def test_trace():
    traced_ = nnx.jit(lambda m, x: m(x)).trace(Model(), 1.0)
    assert "mul" in str(traced_.jaxpr)


def test_lowering_an_abstract_module():
    model = jax.eval_shape(lambda: Model().partition()).merge()
    lowered = nnx.jit(lambda m, x: m(x)).lower(model, 1.0)
    assert lowered.compile() is not None


def test_a_compiled_function_says_what_does_not_match():
    compiled = nnx.jit(lambda m: m.w).lower(Leaf()).compile()
    with pytest.raises(TypeError, match=r"Module 1 of the arguments does not match.*\n.*static `rate` 0.5 -> 0.25"):
        compiled(Leaf(rate=0.25))


def test_a_compiled_function_for_one_module_twice():
    compiled = nnx.jit(lambda a, b: a.w + b.w).lower(leaf := Leaf(2.0), leaf).compile()
    assert float(compiled(leaf, leaf)) == 4.0
    with pytest.raises(TypeError, match="Module 2 of the arguments does not match"):
        compiled(leaf, Leaf())
