"""What the table "From flax.nnx" claims of models and their parts."""

from typing import Any

import jax
import jax.numpy as jnp
from tests.moving.rows import Row, numbers, rows

import nnx

X = numbers(5, 2)
KERNEL, BIAS = numbers(2, 3), numbers(3)


def flat_shapes(state: Any) -> dict[str, tuple[int, ...]]:
    return {"/".join(map(str, path)): v.shape for path, v in state}


def our_items(state: nnx.State) -> list[tuple[Any, Any]]:
    return [(path, getattr(leaf, "value", leaf)) for path, leaf in state.items()]


def our_linear() -> nnx.Linear:
    linear = nnx.Linear(2, 3, ctx=nnx.context(0))
    linear.kernel, linear.bias = KERNEL, BIAS
    return linear


def their_linear() -> Any:
    from flax import nnx

    linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    linear.kernel[...], linear.bias[...] = jnp.asarray(KERNEL), jnp.asarray(BIAS)
    return linear


class SeedOfAConstructor(Row):
    line = "`rngs=nnx.Rngs(0)` in a constructor"

    @staticmethod
    def theirs():
        from flax import nnx

        first, second = (nnx.Linear(2, 3, rngs=nnx.Rngs(0)) for _ in range(2))
        other = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
        kernels = [layer.kernel[...] for layer in (first, second, other)]
        return first(X).shape, bool((kernels[0] == kernels[1]).all()), bool((kernels[0] == kernels[2]).any())

    @staticmethod
    def ours():
        first, second = (nnx.Linear(2, 3, ctx=nnx.context(0)) for _ in range(2))
        other = nnx.Linear(2, 3, ctx=nnx.context(1))
        kernels = [layer.kernel for layer in (first, second, other)]
        return first(X).shape, bool((kernels[0] == kernels[1]).all()), bool((kernels[0] == kernels[2]).any())


class Streams(Row):
    line = "`nnx.Rngs(0, dropout=1)`"

    @staticmethod
    def theirs():
        from flax import nnx

        rngs, other = nnx.Rngs(0, dropout=1), nnx.Rngs(2, dropout=1)
        return bool(rngs.dropout() == other.dropout()), bool(rngs.params() == other.params())

    @staticmethod
    def ours():
        ctx, other = nnx.context(0, dropout=1), nnx.context(2, dropout=1)
        names = ("dropout", "params")
        return tuple(bool(ctx.make_rng(name) == other.make_rng(name)) for name in names)


class Keys(Row):
    line = "`rngs.dropout()`"

    @staticmethod
    def theirs():
        from flax import nnx

        rngs = nnx.Rngs(0, dropout=1)
        first, second = rngs.dropout(), rngs.dropout()
        return first.shape, bool(jnp.issubdtype(first.dtype, jax.dtypes.prng_key)), bool(first == second)

    @staticmethod
    def ours():
        ctx = nnx.context(0, dropout=1)
        first, second = ctx.make_rng("dropout"), ctx.make_rng("dropout")
        return first.shape, bool(jnp.issubdtype(first.dtype, jax.dtypes.prng_key)), bool(first == second)


class Reading(Row):
    line = "`self.kernel[...]`, `self.kernel.get_value()`"

    @staticmethod
    def theirs():
        from flax import nnx

        class Net(nnx.Module):
            def __init__(self):
                self.kernel = nnx.Param(jnp.asarray(KERNEL))

            def __call__(self, x):
                return x @ self.kernel[...], x @ self.kernel.get_value()

        return Net()(X)

    @staticmethod
    def ours():
        class Net(nnx.Module):
            def __init__(self):
                self.kernel = nnx.Param(KERNEL)

            def __call__(self, x):
                return x @ self.kernel, x @ self.kernel

        return Net()(X)


class Writing(Row):
    line = "`self.count[...] += 1`"

    @staticmethod
    def theirs():
        from flax import nnx

        class Net(nnx.Module):
            def __init__(self):
                self.count = nnx.Variable(jnp.array(0))

            @nnx.jit
            def __call__(self):
                self.count[...] += 1

        net = Net()
        net(), net()
        return net.count[...]

    @staticmethod
    def ours():
        class Net(nnx.Module):
            def __init__(self):
                self.count = nnx.Variable(jnp.array(0))

            @nnx.jit
            def __call__(self):
                self.count += 1

        net = Net()
        net(), net()
        return net.count


class Lists(Row):
    line = "`self.layers = nnx.List([...])`"

    @staticmethod
    def theirs():
        from flax import nnx

        class Net(nnx.Module):
            def __init__(self):
                self.layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in range(2)])

        return flat_shapes(nnx.to_flat_state(nnx.state(Net())))

    @staticmethod
    def ours():
        class Net(nnx.Module):
            def __init__(self):
                self.layers = [nnx.Linear(2, 2, ctx=nnx.context(i)) for i in range(2)]

        return flat_shapes(our_items(Net().get_state()))


class Chains(Row):
    line = "`nnx.Sequential(a, nnx.relu, b)`"

    @staticmethod
    def theirs():
        from flax import nnx

        a, b = their_linear(), nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        b.kernel[...] = jnp.asarray(numbers(3, 2))
        return nnx.Sequential(a, nnx.relu, b)(X)

    @staticmethod
    def ours():
        a, b = our_linear(), nnx.Linear(3, 2, ctx=nnx.context(0))
        b.kernel = numbers(3, 2)
        return nnx.Sequence([a, nnx.relu, b])(X)


class Split(Row):
    line = "`graphdef, state = nnx.split(model)`"

    @staticmethod
    def theirs():
        from flax import nnx

        model = their_linear()
        graphdef, state = nnx.split(model)
        return flat_shapes(nnx.to_flat_state(state)), hash(graphdef) == hash(nnx.split(their_linear())[0])

    @staticmethod
    def ours():
        model = our_linear()
        state, moduledef = model.partition()
        return flat_shapes(our_items(state)), hash(moduledef) == hash(our_linear().partition()[1])


class SplitByFilter(Row):
    line = "`graphdef, params, rest = nnx.split(model, nnx.Param, ...)`"

    @staticmethod
    def theirs():
        from flax import nnx

        model = nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        assert nnx.merge(graphdef, params, rest)(X[:, :1] * jnp.ones(3)).shape == (5, 3)
        return [flat_shapes(nnx.to_flat_state(state)) for state in (params, rest)]

    @staticmethod
    def ours():
        model = nnx.BatchNorm(3, use_running_average=True, ctx=nnx.context(0))
        (params, rest), moduledef = model.partition(nnx.Param, ...)
        assert moduledef.merge(params, rest)(X[:, :1] * jnp.ones(3)).shape == (5, 3)
        return [flat_shapes(our_items(state)) for state in (params, rest)]


class Merge(Row):
    line = "`nnx.merge(graphdef, state)`"

    @staticmethod
    def theirs():
        from flax import nnx

        graphdef, state = nnx.split(their_linear())
        return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, X)

    @staticmethod
    def ours():
        state, moduledef = our_linear().partition()
        return jax.jit(lambda state, x: moduledef.merge(state)(x))(state, X)


class Update(Row):
    line = "`nnx.update(model, state)`"

    @staticmethod
    def theirs():
        from flax import nnx

        model = their_linear()
        state = jax.tree.map(lambda x: 2 * x, nnx.state(model))
        nnx.update(model, state)
        return model(X)

    @staticmethod
    def ours():
        model = our_linear()
        state = jax.tree.map(lambda x: 2 * x, model.get_state())
        model.update_state(state)
        return model(X)


class Filter(Row):
    line = "`nnx.state(model, nnx.Param)`"

    @staticmethod
    def theirs():
        from flax import nnx

        model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        return flat_shapes(nnx.to_flat_state(nnx.state(model, nnx.Param)))

    @staticmethod
    def ours():
        model = nnx.BatchNorm(3, ctx=nnx.context(0))
        return flat_shapes(our_items(model.filter(nnx.Param)))


class Sow(Row):
    line = '`self.sow(nnx.Intermediate, "seen", y)`'

    @staticmethod
    def theirs():
        from flax import nnx

        class Net(nnx.Module):
            def __call__(self, y):
                self.sow(nnx.Intermediate, "seen", y)

        model = Net()
        model(X), model(2 * X)
        return model.seen.get_value()

    @staticmethod
    def ours():
        class Net(nnx.Module):
            def __call__(self, y):
                self.sow(nnx.Intermediate, "seen", y)

        model = Net()
        model(X), model(2 * X)
        return model.seen


class Pop(Row):
    line = "`nnx.pop(model, nnx.Intermediate)`"

    @staticmethod
    def theirs():
        from flax import nnx

        model = their_linear()
        model.seen = nnx.Intermediate(jnp.asarray(X))
        popped = nnx.pop(model, nnx.Intermediate)
        return popped["seen"].get_value(), hasattr(model, "seen")

    @staticmethod
    def ours():
        model = our_linear()
        model.seen = nnx.Intermediate(jnp.asarray(X))
        popped = model.pop_state(nnx.Intermediate)
        return popped["seen"].value, hasattr(model, "seen")


class Clone(Row):
    line = "`nnx.clone(model)`"

    @staticmethod
    def theirs():
        from flax import nnx

        model = their_linear()
        other = nnx.clone(model)
        model.kernel[...] = jnp.zeros((2, 3))
        return other(X), model(X)

    @staticmethod
    def ours():
        model = our_linear()
        other = model.clone()
        model.kernel = jnp.zeros((2, 3))
        return other(X), model(X)


class Modes(Row):
    line = "`model.train()`, `model.eval()`"

    @staticmethod
    def theirs():
        from flax import nnx

        class Net(nnx.Module):
            def __init__(self, rngs):
                self.norm = nnx.BatchNorm(2, rngs=rngs)
                self.dropout = nnx.Dropout(0.5, rngs=rngs)

            def __call__(self, x):
                return self.dropout(self.norm(x))

        model = Net(nnx.Rngs(0))
        model.train()
        some = bool((model(X) == 0).any())
        model.eval()
        return some, model.norm.mean[...], model(X)

    @staticmethod
    def ours():
        class Net(nnx.Module):
            def __init__(self, ctx):
                self.norm = nnx.BatchNorm(2, ctx=ctx)
                self.dropout = nnx.Dropout(0.5)

            def __call__(self, x, ctx):
                return self.dropout(self.norm(x, ctx=ctx), ctx=ctx)

        model = Net(nnx.context(0))
        training = nnx.context(dropout=0, flags={"deterministic": False, "use_running_average": False})
        some = bool((model(X, training) == 0).any())
        evaluation = nnx.context(flags={"deterministic": True, "use_running_average": True})
        return some, model.norm.mean, model(X, evaluation)


ROWS = rows(globals())
