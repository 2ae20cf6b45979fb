"""Wrong programs that take a Module, a Context or an array from one trace into another, or into raw JAX."""

import functools
import types

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from tests.core.misuse_table import CROSSES, Layer, program

import nnx

# Modules and Contexts from outside


@program(nnx.TraceContextError, (r"Layer\.w|model\.layer|`.*w`", *CROSSES))
def writes_a_captured_module_in_jit(model):
    nnx.jit(lambda x: setattr(model.layer, "w", x))(jnp.float32(1))


@program(nnx.TraceContextError, CROSSES)
def writes_a_captured_module_in_grad(model):
    def loss(x):
        model.layer.mean = x
        return x

    nnx.grad(loss)(jnp.float32(1))


@program(nnx.TraceContextError, CROSSES)
def writes_a_captured_module_in_vmap(model):
    nnx.vmap(lambda x: setattr(model.layer, "mean", x))(jnp.ones(3))


@program(nnx.TraceContextError, CROSSES)
def writes_a_captured_module_in_scan(model):
    def step(carry, x):
        model.layer.mean = carry + x
        return carry, None

    nnx.scan(step)(jnp.float32(0), jnp.ones(3))


@program(nnx.TraceContextError, CROSSES)
def writes_a_captured_module_in_cond(model):
    nnx.cond(True, lambda x: setattr(model.layer, "mean", x), lambda x: None, jnp.float32(1))


@program(nnx.TraceContextError, CROSSES)
def writes_a_captured_module_in_while(model):
    def body(x):
        model.layer.mean = x
        return x + 1

    nnx.while_loop(lambda x: x < 3, body, jnp.float32(0))


@program(nnx.TraceContextError, CROSSES)
def writes_a_captured_module_in_remat(model):
    nnx.grad(nnx.remat(lambda x: setattr(model.layer, "mean", x) or x))(jnp.float32(1))


@program(nnx.TraceContextError, CROSSES)
def writes_a_captured_module_in_raw_scan(model):
    def step(carry, x):
        model.layer.mean = carry + x
        return carry, None

    jax.lax.scan(step, jnp.float32(0), jnp.ones(3))


@program(nnx.TraceContextError, (r"make_rng\('dropout'\)", "belongs to another JAX trace"))
def draws_from_a_captured_context(model):
    ctx = nnx.context(dropout=0)
    nnx.jit(lambda x: x + jax.random.uniform(ctx.make_rng("dropout")))(1.0)


@program(nnx.TraceContextError, "another JAX trace")
def draws_from_a_captured_context_in_scan(model):
    ctx = nnx.context(dropout=0)

    def step(carry, x):
        return carry + jax.random.uniform(ctx.make_rng("dropout")), None

    nnx.scan(step)(jnp.float32(0), jnp.ones(3))


@program(nnx.TraceContextError, "another JAX trace")
def keeps_a_module_of_a_trace(model):
    kept = []

    @nnx.jit
    def step(model):
        kept.append(Layer(2.0))
        return model.layer.w

    step(model)
    nnx.jit(lambda model: setattr(model, "stolen", kept[0]))(model)


@program(nnx.TraceContextError, "another JAX trace")
def returns_a_captured_module(model):
    other = Layer()
    nnx.jit(lambda model: other)(model)


@program(nnx.TraceContextError, "another JAX trace")
def assigns_a_captured_module(model):
    other = Layer()
    nnx.jit(lambda model: setattr(model, "layer", other))(model)


@program(nnx.TraceContextError, CROSSES)
def writes_a_captured_module_in_an_inner_jit(model):
    @nnx.jit
    def outer(model, x):
        return nnx.jit(lambda x: setattr(model.layer, "mean", x) or x)(x)

    outer(model, jnp.float32(1))


def _sharded(f):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return nnx.shard_map(f, mesh=mesh, in_specs=(P("data"),), out_specs=P("data"))(jnp.ones(4))


def _forward(f):
    custom = nnx.custom_vjp(lambda x: x)
    custom.defvjp(lambda x: (x, f(x)), lambda x, g: (g,))
    return nnx.jit(nnx.grad(custom))(jnp.float32(1))


_ONE = jnp.float32(1)
for _name, _call in {
    "fori_loop": lambda f: nnx.fori_loop(0, 2, lambda i, x: f(x), _ONE),
    "the_condition_of_while": lambda f: nnx.while_loop(lambda x: f(x) > 5, lambda x: x + 1, _ONE),
    "switch": lambda f: nnx.switch(0, [f, f], _ONE),
    "vjp": lambda f: nnx.vjp(f, _ONE),
    "jvp": lambda f: nnx.jvp(f, (_ONE,), (_ONE,)),
    "jacfwd": lambda f: nnx.jacfwd(f)(_ONE),
    "jacrev": lambda f: nnx.jacrev(f)(_ONE),
    "hessian": lambda f: nnx.hessian(f)(_ONE),
    "custom_vjp": _forward,
    "shard_map": _sharded,
    "checkify": lambda f: nnx.checkify(f)(_ONE),
    "eval_shape": lambda f: nnx.eval_shape(f, _ONE),
    "make_jaxpr": lambda f: nnx.make_jaxpr(f)(_ONE),
    "raw_grad": lambda f: jax.grad(f)(_ONE),
    "raw_vmap": lambda f: jax.vmap(f)(jnp.ones(3)),
    "raw_checkpoint": lambda f: jax.grad(jax.checkpoint(f))(_ONE),
}.items():

    def _writes(model, call=_call):
        call(lambda x: setattr(model.layer, "mean", x) or x)

    _writes.__name__ = f"writes_a_captured_module_in_{_name}"
    program(nnx.TraceContextError, ("`Layer.mean`|layer.mean", *CROSSES))(_writes)


for _name, _call in {
    "vmap": lambda f: nnx.vmap(f)(jnp.ones(3)),
    "grad": lambda f: nnx.grad(f)(_ONE),
    "cond": lambda f: nnx.cond(True, f, lambda x: x, _ONE),
    "remat": lambda f: nnx.remat(f)(_ONE),
    "raw_jit": lambda f: jax.jit(f)(_ONE),
}.items():

    def _draws(model, call=_call):
        ctx = nnx.context(dropout=0)
        call(lambda x: x * jax.random.uniform(ctx.make_rng("dropout")))

    _draws.__name__ = f"draws_from_a_captured_context_in_{_name}"
    program(nnx.TraceContextError, (r"make_rng\('dropout'\)", "belongs to another JAX trace"))(_draws)


@program(nnx.TraceContextError, CROSSES)
def writes_to_a_module_that_left_its_trace(model):
    kept = []
    nnx.jit(kept.append)(model)
    kept[0].layer.w = jnp.float32(2)


@program(nnx.VariableError, ("came out of a State or a pytree", "Write to the Module's attribute"))
def hands_a_variable_to_jit_and_writes_it(model):
    nnx.jit(lambda variable: setattr(variable, "value", jnp.float32(2)))(model.layer.get_variable("w"))


# What would leak a tracer


def _keeps_a_closure(model, x):
    model.layer.function = lambda: x
    return x


def _keeps_a_partial(model, x):
    model.layer.function = functools.partial(jnp.add, x)
    return x


def _keeps_an_object(model, x):
    model.layer.config = types.SimpleNamespace(scale=x)
    return x


for _keeps, _where in (
    (_keeps_a_closure, "closes over `x`"),
    (_keeps_a_partial, r"layer[./]function.*args\[0\]"),
    (_keeps_an_object, r"layer[./]config.*\.scale"),
):
    for _name, _transform in {
        "jit": nnx.jit,
        "remat": nnx.remat,
        "grad": lambda f: nnx.grad(f, argnums=1),
    }.items():

        def _leaks(model, keeps=_keeps, transform=_transform):
            transform(keeps)(model, jnp.float32(1))

        _leaks.__name__ = f"{_keeps.__name__[1:]}_in_{_name}"
        program(nnx.StaticError, ("array float32", _where))(_leaks)


# Raw JAX


@program(nnx.AttributeKindError, (r"a Model is an nnx\.Module and not a pytree", r"module\.partition\(\)"))
def hands_a_module_to_raw_jit(model):
    jax.jit(lambda m: m.layer.w)(model)


@program(nnx.AttributeKindError, r"not a pytree")
def hands_a_module_to_raw_grad(model):
    jax.grad(lambda m: m.layer.w)(model)


@program(nnx.AttributeKindError, r"not a pytree")
def maps_a_tree_function_over_a_module(model):
    jax.tree.map(jnp.zeros_like, model)


@program(nnx.AttributeKindError, r"a Context is not a pytree.*ctx\.partition\(\)")
def hands_a_context_to_raw_jit(model):
    jax.jit(lambda ctx: ctx.make_rng("dropout"))(nnx.context(dropout=0))


@program(nnx.AttributeKindError, r"not a pytree")
def hands_a_module_to_raw_vmap(model):
    jax.vmap(lambda m: m.layer.w)(model)


@program(nnx.AttributeKindError, r"not a pytree")
def carries_a_module_through_a_raw_scan(model):
    jax.lax.scan(lambda m, x: (m, None), model, jnp.arange(3.0))


@program(nnx.AttributeKindError, r"not a pytree")
def hands_a_module_to_raw_cond(model):
    jax.lax.cond(True, lambda m: m.layer.w, lambda m: m.layer.w, model)


@program(nnx.AttributeKindError, r"not a pytree")
def returns_a_module_from_raw_jit(model):
    jax.jit(lambda x: model)(1.0)


@program(nnx.AttributeKindError, r"cannot be a static argument")
def makes_a_module_static(model):
    nnx.jit(lambda m: m.layer.w, static_argnums=0)(model)


@program(nnx.AttributeKindError, r"cannot be a static argument of nnx\.remat.*static_argnums")
def makes_a_module_static_in_remat(model):
    nnx.remat(lambda m, x: m(x), static_argnums=0)(model, 2.0)


@program(nnx.AttributeKindError, r"static argument of nnx\.custom_vjp.*Leave it out of nondiff_argnums")
def makes_a_module_not_differentiable(model):
    double = nnx.custom_vjp(lambda m, x: m(x), nondiff_argnums=0)
    double.defvjp(lambda m, x: (m(x), None), lambda m, _, g: (g,))
    double(model, 2.0)
