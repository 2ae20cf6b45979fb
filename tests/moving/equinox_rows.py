"""What the table "From equinox" claims."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tests.moving.rows import Row, numbers, rows

import nnx

X = numbers(5, 4)
KERNEL = numbers(4, 2)


def _theirs():
    import equinox as eqx

    linear = eqx.nn.Linear(4, 2, key=jax.random.key(0))
    return eqx.tree_at(lambda m: (m.weight, m.bias), linear, (jnp.asarray(KERNEL.T), jnp.ones(2)))


def _ours() -> nnx.Linear:
    linear = nnx.Linear(4, 2, ctx=nnx.context(0))
    linear.kernel, linear.bias = KERNEL, jnp.ones(2)
    return linear


class Classes(Row):
    line = "`class Net(eqx.Module): w: jax.Array`"

    @staticmethod
    def theirs():
        import equinox as eqx

        class Net(eqx.Module):
            w: jax.Array

            def __call__(self, x):
                return x @ self.w

        return Net(jnp.asarray(KERNEL))(X)

    @staticmethod
    def ours():
        class Net(nnx.Module):
            def __init__(self):
                self.w = nnx.Param(KERNEL)

            def __call__(self, x):
                return x @ self.w

        return Net()(X)


class Layers(Row):
    line = "`eqx.nn.Linear(4, 2, key=key)`"

    @staticmethod
    def theirs():
        import equinox as eqx

        key = jax.random.key(0)
        layer = eqx.nn.Linear(4, 2, key=key)
        return layer.weight.T.shape, layer.bias.shape, layer(X[0]).shape

    @staticmethod
    def ours():
        key = jax.random.key(0)
        layer = nnx.Linear(4, 2, ctx=nnx.context(key))
        return layer.kernel.shape, layer.bias.shape, layer(X[0]).shape


class Batches(Row):
    line = "`jax.vmap(model)(xs)` for a batch"

    @staticmethod
    def theirs():
        model, xs = _theirs(), X
        return jax.vmap(model)(xs)

    @staticmethod
    def ours():
        model, xs = _ours(), X
        return model(xs)


class Partition(Row):
    line = "`params, static = eqx.partition(model, eqx.is_array)`"

    @staticmethod
    def theirs():
        import equinox as eqx

        model = _theirs()
        params, static = eqx.partition(model, eqx.is_array)
        assert not any(map(eqx.is_array, jax.tree.leaves(static)))
        return sorted(x.size for x in jax.tree.leaves(params))

    @staticmethod
    def ours():
        model = _ours()
        state, moduledef = model.partition()
        assert not jax.tree.leaves(moduledef)
        return sorted(x.size for x in jax.tree.leaves(state))


class Combine(Row):
    line = "`eqx.combine(params, static)`"

    @staticmethod
    def theirs():
        import equinox as eqx

        params, static = eqx.partition(_theirs(), eqx.is_array)
        return jax.vmap(eqx.combine(params, static))(X)

    @staticmethod
    def ours():
        state, moduledef = _ours().partition()
        return moduledef.merge(state)(X)


class Transforms(Row):
    line = "`eqx.filter_jit`, `eqx.filter_grad`, `eqx.filter_vmap`"

    @staticmethod
    def theirs():
        import equinox as eqx

        model = _theirs()
        return {
            "jit": eqx.filter_jit(lambda model, x: model(x))(model, X[0]),
            "grad": eqx.filter_grad(lambda model: (model(X[0]) ** 2).sum())(model).weight.T,
            "vmap": eqx.filter_vmap(lambda model, x: model(x), in_axes=(None, 0))(model, X),
            "ensemble": eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 2, key=key))(
                jax.random.split(jax.random.key(0), 3)
            ).bias.shape,
        }

    @staticmethod
    def ours():
        model = _ours()
        return {
            "jit": nnx.jit(lambda model, x: model(x))(model, X[0]),
            "grad": nnx.grad(lambda model: (model(X[0]) ** 2).sum())(model)["kernel"].value,
            "vmap": nnx.vmap(lambda model, x: model(x), in_axes=(None, 0))(model, X),
            "ensemble": nnx.vmap(lambda key: nnx.Linear(4, 2, ctx=nnx.context(key)))(
                jax.random.split(jax.random.key(0), 3)
            ).bias.shape,
        }


class Surgery(Row):
    line = "`eqx.tree_at(lambda m: m.bias, model, new)`"

    @staticmethod
    def theirs():
        import equinox as eqx

        model, new = _theirs(), jnp.asarray(numbers(2))
        model = eqx.tree_at(lambda m: m.bias, model, new)
        return model(X[0])

    @staticmethod
    def ours():
        model, new = _ours(), jnp.asarray(numbers(2))
        model.bias = new
        return model(X[0])


class States(Row):
    line = "`eqx.nn.State` and `eqx.nn.StateIndex`"

    @staticmethod
    def theirs():
        import equinox as eqx

        class Counter(eqx.Module):
            index: eqx.nn.StateIndex

            def __init__(self):
                self.index = eqx.nn.StateIndex(jnp.array(0))

            def __call__(self, x, state: eqx.nn.State):
                count = state.get(self.index) + 1
                return x * count, state.set(self.index, count)

        model, state = eqx.nn.make_with_state(Counter)()
        step = eqx.filter_jit(lambda model, x, state: model(x, state))
        x, state = step(model, X, state)
        x, state = step(model, x, state)
        return x, state.get(model.index)

    @staticmethod
    def ours():
        class Count(nnx.Variable):
            pass

        class Counter(nnx.Module):
            def __init__(self):
                self.count = Count(jnp.array(0))

            def __call__(self, x):
                self.count += 1
                return x * self.count

        model = Counter()
        step = nnx.jit(lambda model, x: model(x))
        return step(model, step(model, X)), model.count


class Sharing(Row):
    line = "`eqx.nn.Shared`"

    @staticmethod
    def theirs():
        import equinox as eqx

        class Tied(eqx.Module):
            shared: eqx.nn.Shared

            def __init__(self):
                pair = (_theirs(), _theirs())
                self.shared = eqx.nn.Shared(pair, where=lambda pair: pair[1].weight, get=lambda pair: pair[0].weight)

            def __call__(self, x):
                first, second = self.shared()
                return first(x) * second(x)

        grads = eqx.filter_grad(lambda model: model(X[0]).sum())(Tied())
        return max((np.asarray(x.T) for x in jax.tree.leaves(grads)), key=np.size)

    @staticmethod
    def ours():
        class Tied(nnx.Module):
            def __init__(self):
                self.first, self.second = _ours(), _ours()
                self.second.kernel = self.first.get_variable("kernel")

            def __call__(self, x):
                return self.first(x) * self.second(x)

        grads = nnx.grad(lambda model: model(X[0]).sum())(Tied())
        assert len(grads) == 3
        return grads["first", "kernel"].value


class Static(Row):
    line = "`eqx.field(static=True)`"

    @staticmethod
    def theirs():
        import equinox as eqx

        class Net(eqx.Module):
            rate: float = eqx.field(static=True)

        return jax.tree.leaves(Net(0.5)), Net(0.5).rate, jax.tree.structure(Net(0.5)) == jax.tree.structure(Net(0.1))

    @staticmethod
    def ours():
        @nnx.dataclass
        class Net(nnx.Module):
            rate: float

        state, moduledef = Net(0.5).partition()
        return jax.tree.leaves(state), Net(0.5).rate, moduledef == Net(0.1).partition()[1]


class Abstract(Row):
    line = "`eqx.filter_eval_shape`"

    @staticmethod
    def theirs():
        import equinox as eqx

        model = eqx.filter_eval_shape(lambda: eqx.nn.Linear(4, 2, key=jax.random.key(0)))
        return type(model.weight).__name__, model.weight.shape[::-1]

    @staticmethod
    def ours():
        model = nnx.eval_shape(lambda: nnx.Linear(4, 2, ctx=nnx.context(0)))
        return type(model.kernel).__name__, model.kernel.shape


class Saving(Row):
    line = "`eqx.tree_serialise_leaves`, `eqx.tree_deserialise_leaves`"

    @staticmethod
    def theirs():
        import equinox as eqx

        with tempfile.TemporaryDirectory() as folder:
            eqx.tree_serialise_leaves(Path(folder) / "model.eqx", _theirs())
            like = eqx.nn.Linear(4, 2, key=jax.random.key(1))
            return eqx.tree_deserialise_leaves(Path(folder) / "model.eqx", like)(X[0])

    @staticmethod
    def ours():
        with tempfile.TemporaryDirectory() as folder:
            nnx.save_safetensors(Path(folder) / "model.safetensors", _ours())
            like = nnx.Linear(4, 2, ctx=nnx.context(1))
            nnx.load_safetensors(Path(folder) / "model.safetensors", like=like)
            return like(X[0])


class Inference(Row):
    line = "`eqx.nn.inference_mode(model)`"

    @staticmethod
    def theirs():
        import equinox as eqx

        model = eqx.nn.Dropout(0.5)
        some = bool((model(jnp.asarray(X), key=jax.random.key(0)) == 0).any())
        return some, eqx.nn.inference_mode(model)(jnp.asarray(X))

    @staticmethod
    def ours():
        model = nnx.Dropout(0.5)
        training = nnx.context(dropout=0, flags={"deterministic": False})
        some = bool((model(jnp.asarray(X), ctx=training) == 0).any())
        return some, model(jnp.asarray(X), ctx=nnx.context(flags={"deterministic": True}))


class Updates(Row):
    line = "`updates, opt_state = tx.update(grads, opt_state, params)`, `eqx.apply_updates(model, updates)`"

    @staticmethod
    def theirs():
        import equinox as eqx

        model, tx = _theirs(), optax.adam(0.1)
        opt_state = tx.init(eqx.filter(model, eqx.is_array))
        for _ in range(2):
            grads = eqx.filter_grad(lambda model: (jax.vmap(model)(X) ** 2).mean())(model)
            params = eqx.filter(model, eqx.is_array)
            updates, opt_state = tx.update(grads, opt_state, params)
            model = eqx.apply_updates(model, updates)
        return model.weight.T, model.bias

    @staticmethod
    def ours():
        model = _ours()
        optimizer = nnx.Optimizer(model, optax.adam(0.1))
        for _ in range(2):
            grads = nnx.grad(lambda model: (model(X) ** 2).mean())(model)
            optimizer.update(model, grads)
        return model.kernel, model.bias


class Traces(Row):
    line = "`eqx.debug.assert_max_traces(max_traces=1)`"

    @staticmethod
    def theirs():
        import equinox as eqx

        @eqx.filter_jit
        @eqx.debug.assert_max_traces(max_traces=1)
        def f(x):
            return 2 * x

        first = f(X)
        with pytest.raises(RuntimeError, match="trac"):
            f(X[0])
        return first

    @staticmethod
    def ours():
        @nnx.jit(max_traces=1)
        def f(x):
            return 2 * x

        first = f(X)
        with pytest.raises(RuntimeError, match="trac"):
            f(X[0])
        return first


class Checks(Row):
    line = '`eqx.error_if(x, x < 0, "negative")`'

    @staticmethod
    def theirs():
        import equinox as eqx

        f = eqx.filter_jit(lambda x: eqx.error_if(x, x < 0, "negative"))
        with pytest.raises(eqx.EquinoxRuntimeError, match="negative"):
            f(jnp.float32(-1))
        return f(jnp.float32(1))

    @staticmethod
    def ours():
        from jax.experimental import checkify

        def checked(x):
            checkify.check(x >= 0, "negative")
            return x

        f = nnx.jit(nnx.checkify(checked))
        error, _ = f(jnp.float32(-1))
        with pytest.raises(checkify.JaxRuntimeError, match="negative"):
            error.throw()
        return f(jnp.float32(1))[1]


ROWS = rows(globals())
