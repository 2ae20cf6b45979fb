"""tabulate and count_parameters: what a model is made of and what a call of it would cost."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.core.models import Everything

import nnx

X = jax.ShapeDtypeStruct((2, 5, 4), jnp.float32)


class Linear(nnx.Module):
    def __init__(self, din, dout, *, ctx):
        self.kernel = nnx.Param(jax.random.normal(ctx.make_rng("params"), (din, dout)))

    def __call__(self, x):
        return x @ self.kernel


class Residual(nnx.Module):
    """One of many signatures: a keyword that Python branches on, a Context, state that the call writes."""

    def __init__(self, inner, *, ctx):
        self.inner = inner
        self.calls = nnx.var("counts", jnp.int32(0))
        self.scale = nnx.Param(jnp.ones(4))

    def __call__(self, x, *, train, ctx=None):
        self.calls += 1
        if train:
            x = x + jax.random.normal(ctx.make_rng("noise"), x.shape)
        return self.inner(x) * self.scale[None, None]


class Net(nnx.Module):
    def __init__(self, *, ctx):
        shared = Linear(4, 4, ctx=ctx)
        self.first = Residual(shared, ctx=ctx)
        self.second = Residual(shared, ctx=ctx)
        self.head = Linear(4, 3, ctx=ctx)

    def __call__(self, x, *, train, ctx=None):
        x = self.second(self.first(x, train=train, ctx=ctx), train=train, ctx=ctx)
        return {"logits": self.head(x), "hidden": x}

    def features(self, x):
        return self.first(x, train=False)


@pytest.fixture
def net():
    return Net(ctx=nnx.context(0))


def rows(summary):
    return {"/".join(row.path): row for row in summary.rows}


def test_a_model_and_a_call(net):
    summary = nnx.tabulate(net, X, train=True, ctx=nnx.context(noise=1))
    found = rows(summary)
    assert found[""].value == {
        "logits": jax.ShapeDtypeStruct((2, 5, 3), jnp.float32),
        "hidden": jax.ShapeDtypeStruct((2, 5, 4), jnp.float32),
    }
    assert found["head"].value.shape == (2, 5, 3)
    assert found["head/kernel"].value == jax.ShapeDtypeStruct((4, 3), jnp.float32)
    assert (found["head"].parameters, found["head"].bytes, found["head"].flops) == (12, 48, 2 * 10 * 4 * 3)
    assert found["first"].type is Residual
    assert found["first/calls"].bytes == 4
    assert (summary.parameters, summary.bytes) == (16 + 12 + 8, 4 * 36 + 8)
    assert summary.collections["Param"] == (36, 144)
    assert summary.collections["Counts"] == (2, 8)
    assert found[""].flops == summary.flops
    assert summary.flops > sum(found[name].flops for name in ("first", "second", "head")) - 1


def test_what_is_shared_counts_once(net):
    found = rows(nnx.tabulate(net, X, train=False))
    assert (found["first/inner"].calls, found["first/inner"].flops) == (2, 2 * (2 * 10 * 4 * 4))
    assert found["second/inner"].shared_with == ("first", "inner")
    assert found["second/inner"].parameters == 0
    assert "second/inner/kernel" not in found
    # A call counts where it happens, whoever holds the Module.
    assert found["second"].flops == found["first"].flops == 320 + 40
    net.head.tied = net.first.get_variable("scale")
    assert rows(nnx.tabulate(net))["head/tied"].shared_with == ("first", "scale")
    assert nnx.tabulate(net).parameters == nnx.count_parameters(net) == 36


def test_nothing_is_run_and_nothing_changes(net):
    before = jax.tree.leaves(net.get_state())
    definition = net.get_module_def()
    ctx = nnx.context(noise=1)
    nnx.tabulate(net, X, train=True, ctx=ctx)
    assert net.get_module_def() is definition
    assert all(new is old for new, old in zip(jax.tree.leaves(net.get_state()), before, strict=True))
    assert int(ctx.rngs["noise"].count) == 0
    assert Residual.__call__.__qualname__ == "Residual.__call__"
    assert Linear.__dict__["__call__"].__code__.co_filename == __file__


def test_again_and_in_threads(net):
    texts = [str(nnx.tabulate(net, X, train=False)) for _ in range(2)]
    threads = [threading.Thread(target=lambda: texts.append(str(nnx.tabulate(net, X, train=False)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 4
    assert len(set(texts)) == 1


def test_without_a_call():
    summary = nnx.tabulate(Everything())
    assert summary.flops is None
    assert summary.parameters == 2 + 7
    found = rows(summary)
    assert found["np_buffer"].type is jax.Array
    assert found["np_buffer"].value.dtype == np.float64
    assert found["node"].bytes == 8
    assert found["blocks"].parameters == 2
    assert "FLOPs" not in str(summary)


def test_a_method(net):
    found = rows(nnx.tabulate(net.features, X))
    assert found["first"].calls == 1
    assert (found["second"].calls, found["second"].flops) == (0, None)


def test_a_huge_model():
    width = 8192

    def make():
        return nnx.Sequence([Linear(width, width, ctx=nnx.context(0)) for _ in range(13)])

    block = nnx.eval_shape(make)
    model = nnx.Sequence([block.clone() for _ in range(80)])
    assert nnx.count_parameters(model) == 80 * 13 * width**2
    summary = nnx.tabulate(model)
    assert summary.parameters == nnx.count_parameters(model) > 69e9
    lines = str(summary).splitlines()
    assert len(lines) < 210
    assert lines[-1].endswith("left out: `.text()` has all")
    assert len(summary.text().splitlines()) == len(summary.rows) + 4
    out = nnx.tabulate(block, jax.ShapeDtypeStruct((1, width), jnp.bfloat16))
    assert out.flops == 13 * 2 * width**2


def test_transforms_inside_keep_the_paths():
    class Deep(nnx.Module):
        def __init__(self, *, ctx):
            self.stack = nnx.Stack(Linear, 3)(4, 4, ctx=ctx)
            self.inner = Linear(4, 4, ctx=ctx)
            self.compiled = Linear(4, 4, ctx=ctx)

        def __call__(self, x):
            x = nnx.remat(lambda module, x: module(x))(self.inner, self.stack(x))
            return jitted(self.compiled, x)

    model = Deep(ctx=nnx.context(0))
    for _ in range(2):  # what a transform has traced before is traced again, and seen
        found = rows(nnx.tabulate(model, X))
        one = 2 * 10 * 4 * 4
        assert found["stack"].flops == 3 * one
        assert (found["stack/layers"].flops, found["stack/layers"].parameters) == (3 * one, 48)
        assert found["inner"].flops == one
        assert found["compiled"].flops == one
        assert found["compiled"].value == X


@nnx.jit
def jitted(module, x):
    return module(x)


def test_it_counts_for_no_max_traces():
    once = nnx.jit(lambda module, x: module(x), max_traces=1)

    class Outer(nnx.Module):
        def __init__(self):
            self.inner = Linear(4, 4, ctx=nnx.context(0))

        def __call__(self, x):
            return once(self.inner, x)

    model = Outer()
    for _ in range(2):
        assert rows(nnx.tabulate(model, X))["inner"].calls == 1
        assert model(jnp.ones(X.shape)).shape == X.shape


def test_a_body_that_jax_traces_twice_is_called_once():
    class Loop(nnx.Module):
        def __init__(self):
            self.cell = Linear(4, 4, ctx=nnx.context(0))

        def __call__(self, x):
            return nnx.fori_loop(0, 3, lambda _, val: (val[0], val[0](val[1])), (self.cell, x))[1]

    cell = rows(nnx.tabulate(Loop(), X))["cell"]
    assert (cell.calls, cell.flops) == (1, 3 * 2 * 10 * 4 * 4)


def test_a_module_that_calls_itself():
    class Halving(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.float32(1))
            self.itself = self

        def __call__(self, x):
            x = x * self.scale
            return x if x.shape[0] == 1 else self.itself(x[: x.shape[0] // 2])

    summary = nnx.tabulate(Halving(), jnp.ones(4))
    found = rows(summary)
    assert found["itself"].shared_with == ()
    assert (found[""].calls, found[""].flops) == (3, 4 + 2 + 1)
    assert "shared with the model" in str(summary)


def test_an_error_names_the_module(net):
    with pytest.raises(TypeError) as caught:
        nnx.tabulate(net, jnp.ones((2, 5)), train=False)
    (note,) = [note for note in caught.value.__notes__ if "nnx.tabulate" in note]
    assert note == "nnx.tabulate: in the call of `first/inner`, a Linear, with (float32[2,5])"
    assert Linear.__call__.__name__ == "__call__"
    assert nnx.tabulate(net, X, train=False).flops is not None
    with pytest.raises(TypeError, match="train") as caught:
        nnx.tabulate(net, X)
    assert any("the model itself" in note for note in caught.value.__notes__)


def test_what_is_no_module():
    with pytest.raises(nnx.StructureError, match="takes a Module or a bound method of one, got type"):
        nnx.tabulate(Linear, X)
    with pytest.raises(nnx.StructureError, match="takes a Module or a State, got dict"):
        nnx.count_parameters({})


def test_it_fits_the_terminal(net, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    lines = str(nnx.tabulate(net, X, train=False)).splitlines()
    assert max(map(len, lines)) <= 60
    assert any("…" in line for line in lines)
    wide = nnx.tabulate(net, X, train=False).text(width=400)
    assert "{logits: float32[2,5,3], hidden: float32[2,5,4]}" in wide or "hidden: float32[2,5,4]" in wide
    assert "…" not in wide
    short = nnx.tabulate(net, X, train=False).text(depth=1, variables=False, width=100).splitlines()
    assert [line.split()[0] for line in short[3:6]] == ["first", "head", "second"]
    assert len(short) == 2 + 4 + 2 + 1


def test_count_parameters(net):
    assert nnx.count_parameters(net.filter(nnx.Param)) == 36
    assert nnx.count_parameters(net, "counts") == 2
    assert nnx.count_parameters(net, nnx.PathGlob("head/**")) == 12
