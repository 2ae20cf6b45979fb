"""What the table "From flax.nnx" claims."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tests.moving.rows import Row, numbers, rows

import nnx

X = numbers(5, 2)
KERNEL, BIAS = numbers(2, 3), numbers(3)


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    return {"/".join(map(str, path)): v.shape for path, v in state}


def _items(state: nnx.State) -> list[tuple[Any, Any]]:
    return [(path, getattr(leaf, "value", leaf)) for path, leaf in state.items()]


def _linear() -> nnx.Linear:
    linear = nnx.Linear(2, 3, ctx=nnx.context(0))
    linear.kernel, linear.bias = KERNEL, BIAS
    return linear


def _their_linear() -> Any:
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

        return _shapes(nnx.to_flat_state(nnx.state(Net())))

    @staticmethod
    def ours():
        class Net(nnx.Module):
            def __init__(self):
                self.layers = [nnx.Linear(2, 2, ctx=nnx.context(i)) for i in range(2)]

        return _shapes(_items(Net().get_state()))


class Chains(Row):
    line = "`nnx.Sequential(a, nnx.relu, b)`"

    @staticmethod
    def theirs():
        from flax import nnx

        a, b = _their_linear(), nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        b.kernel[...] = jnp.asarray(numbers(3, 2))
        return nnx.Sequential(a, nnx.relu, b)(X)

    @staticmethod
    def ours():
        a, b = _linear(), nnx.Linear(3, 2, ctx=nnx.context(0))
        b.kernel = numbers(3, 2)
        return nnx.Sequence([a, nnx.relu, b])(X)


class Split(Row):
    line = "`graphdef, state = nnx.split(model)`"

    @staticmethod
    def theirs():
        from flax import nnx

        model = _their_linear()
        graphdef, state = nnx.split(model)
        return _shapes(nnx.to_flat_state(state)), hash(graphdef) == hash(nnx.split(_their_linear())[0])

    @staticmethod
    def ours():
        model = _linear()
        state, moduledef = model.partition()
        return _shapes(_items(state)), hash(moduledef) == hash(_linear().partition()[1])


class SplitByFilter(Row):
    line = "`graphdef, params, rest = nnx.split(model, nnx.Param, ...)`"

    @staticmethod
    def theirs():
        from flax import nnx

        model = nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        assert nnx.merge(graphdef, params, rest)(X[:, :1] * jnp.ones(3)).shape == (5, 3)
        return [_shapes(nnx.to_flat_state(state)) for state in (params, rest)]

    @staticmethod
    def ours():
        model = nnx.BatchNorm(3, use_running_average=True, ctx=nnx.context(0))
        (params, rest), moduledef = model.partition(nnx.Param, ...)
        assert moduledef.merge(params, rest)(X[:, :1] * jnp.ones(3)).shape == (5, 3)
        return [_shapes(_items(state)) for state in (params, rest)]


class Merge(Row):
    line = "`nnx.merge(graphdef, state)`"

    @staticmethod
    def theirs():
        from flax import nnx

        graphdef, state = nnx.split(_their_linear())
        return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, X)

    @staticmethod
    def ours():
        state, moduledef = _linear().partition()
        return jax.jit(lambda state, x: moduledef.merge(state)(x))(state, X)


class Update(Row):
    line = "`nnx.update(model, state)`"

    @staticmethod
    def theirs():
        from flax import nnx

        model = _their_linear()
        state = jax.tree.map(lambda x: 2 * x, nnx.state(model))
        nnx.update(model, state)
        return model(X)

    @staticmethod
    def ours():
        model = _linear()
        state = jax.tree.map(lambda x: 2 * x, model.get_state())
        model.update_state(state)
        return model(X)


class Filter(Row):
    line = "`nnx.state(model, nnx.Param)`"

    @staticmethod
    def theirs():
        from flax import nnx

        model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        return _shapes(nnx.to_flat_state(nnx.state(model, nnx.Param)))

    @staticmethod
    def ours():
        model = nnx.BatchNorm(3, ctx=nnx.context(0))
        return _shapes(_items(model.filter(nnx.Param)))


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

        model = _their_linear()
        model.seen = nnx.Intermediate(jnp.asarray(X))
        popped = nnx.pop(model, nnx.Intermediate)
        return popped["seen"].get_value(), hasattr(model, "seen")

    @staticmethod
    def ours():
        model = _linear()
        model.seen = nnx.Intermediate(jnp.asarray(X))
        popped = model.pop_state(nnx.Intermediate)
        return popped["seen"].value, hasattr(model, "seen")


class Clone(Row):
    line = "`nnx.clone(model)`"

    @staticmethod
    def theirs():
        from flax import nnx

        model = _their_linear()
        other = nnx.clone(model)
        model.kernel[...] = jnp.zeros((2, 3))
        return other(X), model(X)

    @staticmethod
    def ours():
        model = _linear()
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


class Optimizers(Row):
    line = "`nnx.Optimizer(model, tx, wrt=nnx.Param)`"

    @staticmethod
    def theirs():
        from flax import nnx

        model, tx = _their_linear(), optax.adam(0.1)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for _ in range(2):
            optimizer.update(model, nnx.grad(lambda model: (model(X) ** 2).mean())(model))
        return model.kernel[...], model.bias[...], optimizer.step[...].astype(jnp.int32)

    @staticmethod
    def ours():
        model, tx = _linear(), optax.adam(0.1)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for _ in range(2):
            optimizer.update(model, nnx.grad(lambda model: (model(X) ** 2).mean())(model))
        return model.kernel, model.bias, optimizer.step


class Transforms(Row):
    line = "`nnx.jit`, `nnx.grad`, `nnx.vmap`, `nnx.scan`, `nnx.cond` ..."

    @staticmethod
    def theirs():
        from flax import nnx

        model = _their_linear()
        grads = nnx.grad(lambda model: (model(X) ** 2).sum())(model)
        model.square = nnx.Param(jnp.asarray(numbers(2, 2)))
        return {
            "jit": nnx.jit(lambda model, x: model(x))(model, X),
            "grad": grads["kernel"].get_value(),
            "vmap": nnx.vmap(lambda model, x: model(x), in_axes=(None, 0))(model, X),
            "scan": nnx.scan(
                lambda carry, model, x: (carry @ model.square[...] + x, carry.sum()),
                in_axes=(nnx.Carry, None, 0),
                out_axes=(nnx.Carry, 0),
            )(jnp.zeros(2), model, X),
            "cond": nnx.cond(True, lambda model: model(X), lambda model: 0 * model(X), model),
        }

    @staticmethod
    def ours():
        model = _linear()
        grads = nnx.grad(lambda model: (model(X) ** 2).sum())(model)
        model.square = nnx.Param(jnp.asarray(numbers(2, 2)))
        return {
            "jit": nnx.jit(lambda model, x: model(x))(model, X),
            "grad": grads["kernel"].value,
            "vmap": nnx.vmap(lambda model, x: model(x), in_axes=(None, 0))(model, X),
            "scan": nnx.scan(
                lambda carry, model, x: (carry @ model.square + x, carry.sum()),
                in_axes=(nnx.Carry, None, 0),
                out_axes=(nnx.Carry, 0),
            )(jnp.zeros(2), model, X),
            "cond": nnx.cond(True, lambda model: model(X), lambda model: 0 * model(X), model),
        }


class Axes(Row):
    line = "`nnx.StateAxes({nnx.Param: 0, ...: None})`"

    @staticmethod
    def theirs():
        from flax import nnx

        class Scale(nnx.Module):
            def __init__(self):
                self.factor = nnx.Param(jnp.asarray(numbers(3)))
                self.offset = nnx.BatchStat(jnp.asarray(numbers(2)))

        axes = nnx.StateAxes({nnx.Param: 0, ...: None})
        return nnx.vmap(lambda module, x: x * module.factor[...] + module.offset[...], in_axes=(axes, None))(
            Scale(), X[0]
        )

    @staticmethod
    def ours():
        class Scale(nnx.Module):
            def __init__(self):
                self.factor = nnx.Param(jnp.asarray(numbers(3)))
                self.offset = nnx.BatchStat(jnp.asarray(numbers(2)))

        return nnx.vmap(
            lambda module, x: x * module.factor + module.offset,
            in_axes=(0, None),
            variable_axes={nnx.Param: 0, ...: None},
        )(Scale(), X[0])


class CachedPartial(Row):
    line = "`nnx.cached_partial(f, model)(x)`"

    @staticmethod
    def theirs():
        from flax import nnx

        model = _their_linear()

        @nnx.jit
        def f(model, x):
            model.bias[...] += 1
            return model(x)

        x = X
        return [nnx.cached_partial(f, model)(x) for _ in range(2)]

    @staticmethod
    def ours():
        model = _linear()

        @nnx.jit
        def f(model, x):
            model.bias += 1
            return model(x)

        x = X
        return [f(model, x) for _ in range(2)]


class Abstract(Row):
    line = "`nnx.eval_shape(lambda: Net(rngs=nnx.Rngs(0)))`"

    @staticmethod
    def theirs():
        from flax import nnx

        class Net(nnx.Linear):
            def __init__(self, rngs):
                super().__init__(2, 3, rngs=rngs)

        model = nnx.eval_shape(lambda: Net(rngs=nnx.Rngs(0)))
        return _shapes(nnx.to_flat_state(nnx.state(model)))

    @staticmethod
    def ours():
        class Net(nnx.Linear):
            def __init__(self, ctx):
                super().__init__(2, 3, ctx=ctx)

        model = nnx.eval_shape(lambda: Net(ctx=nnx.context(0)))
        return _shapes(_items(model.get_state()))


class Checkpointed(Row):
    line = "`nnx.remat(f)`"

    @staticmethod
    def theirs():
        from flax import nnx

        def f(model, x):
            return (model(x) ** 2).sum()

        return nnx.grad(nnx.remat(f))(_their_linear(), X)["kernel"].get_value()

    @staticmethod
    def ours():
        def f(model, x):
            return (model(x) ** 2).sum()

        return nnx.grad(nnx.remat(f))(_linear(), X)["kernel"].value


class Names(Row):
    line = '`nnx.with_partitioning(init, ("in", "out"))`'

    @staticmethod
    def theirs():
        from flax import nnx

        init = nnx.initializers.ones
        kernel_init = nnx.with_partitioning(init, ("in", "out"))
        with jax.set_mesh(jax.make_mesh((1, 1), ("in", "out"), axis_types=(jax.sharding.AxisType.Auto,) * 2)):
            linear = nnx.Linear(2, 3, kernel_init=kernel_init, rngs=nnx.Rngs(0))
        return nnx.get_partition_spec(nnx.state(linear))["kernel"].get_value() == jax.P("in", "out")

    @staticmethod
    def ours():
        init = nnx.initializers.ones
        kernel_init = nnx.with_logical_partitioning(init, ("in", "out"))
        linear = nnx.Linear(2, 3, kernel_init=kernel_init, ctx=nnx.context(0))
        return nnx.get_partition_spec(linear.get_state())["kernel"].value == jax.P("in", "out")


class Tabulate(Row):
    line = "`nnx.tabulate(model, x)`"

    @staticmethod
    def theirs():
        from flax import nnx

        model, x = _their_linear(), X
        text = re.sub("\x1b\\[[0-9;]*m", "", nnx.tabulate(model, x))
        return [part in text for part in ("kernel", "float32[2,3]", "float32[5,3]", "Total Parameters: 9")]

    @staticmethod
    def ours():
        model, x = _linear(), X
        summary = nnx.tabulate(model, x)
        found = [part in str(summary) for part in ("kernel", "float32[2,3]", "float32[5,3]")]
        return [*found, summary.parameters == 9]


class Dataclasses(Row):
    line = "`@nnx.dataclass`"

    @staticmethod
    def theirs():
        from flax import nnx

        @nnx.dataclass
        class Scale(nnx.Module):
            factor: float = 2.0

        return Scale().factor, Scale(3.0).factor, repr(Scale(factor=1.0).factor)

    @staticmethod
    def ours():
        @nnx.dataclass
        class Scale(nnx.Module):
            factor: float = 2.0

        return Scale().factor, Scale(3.0).factor, repr(Scale(factor=1.0).factor)


ROWS = rows(globals())
