"""What the table "From flax.nnx" claims of training, transforms and looking."""

import re

import jax
import jax.numpy as jnp
import optax
from tests.moving.flax_rows import X, flat_shapes, our_items, our_linear, their_linear
from tests.moving.rows import Row, numbers, rows

import nnx


class Optimizers(Row):
    line = "`nnx.Optimizer(model, tx, wrt=nnx.Param)`"

    @staticmethod
    def theirs():
        from flax import nnx

        model, tx = their_linear(), optax.adam(0.1)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for _ in range(2):
            optimizer.update(model, nnx.grad(lambda model: (model(X) ** 2).mean())(model))
        return model.kernel[...], model.bias[...], optimizer.step[...].astype(jnp.int32)

    @staticmethod
    def ours():
        model, tx = our_linear(), optax.adam(0.1)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for _ in range(2):
            optimizer.update(model, nnx.grad(lambda model: (model(X) ** 2).mean())(model))
        return model.kernel, model.bias, optimizer.step


class Transforms(Row):
    line = "`nnx.jit`, `nnx.grad`, `nnx.vmap`, `nnx.scan`, `nnx.cond` ..."

    @staticmethod
    def theirs():
        from flax import nnx

        model = their_linear()
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
        model = our_linear()
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

        model = their_linear()

        @nnx.jit
        def f(model, x):
            model.bias[...] += 1
            return model(x)

        x = X
        return [nnx.cached_partial(f, model)(x) for _ in range(2)]

    @staticmethod
    def ours():
        model = our_linear()

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
        return flat_shapes(nnx.to_flat_state(nnx.state(model)))

    @staticmethod
    def ours():
        class Net(nnx.Linear):
            def __init__(self, ctx):
                super().__init__(2, 3, ctx=ctx)

        model = nnx.eval_shape(lambda: Net(ctx=nnx.context(0)))
        return flat_shapes(our_items(model.get_state()))


class Checkpointed(Row):
    line = "`nnx.remat(f)`"

    @staticmethod
    def theirs():
        from flax import nnx

        def f(model, x):
            return (model(x) ** 2).sum()

        return nnx.grad(nnx.remat(f))(their_linear(), X)["kernel"].get_value()

    @staticmethod
    def ours():
        def f(model, x):
            return (model(x) ** 2).sum()

        return nnx.grad(nnx.remat(f))(our_linear(), X)["kernel"].value


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

        model, x = their_linear(), X
        text = re.sub("\x1b\\[[0-9;]*m", "", nnx.tabulate(model, x))
        return [part in text for part in ("kernel", "float32[2,3]", "float32[5,3]", "Total Parameters: 9")]

    @staticmethod
    def ours():
        model, x = our_linear(), X
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
