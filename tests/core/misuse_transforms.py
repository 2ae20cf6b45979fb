"""Wrong programs that ask a transform for what it cannot do."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from tests.core.misuse_table import Layer, Model, program

import nnx

# Derivatives


@program(nnx.VariableError, (r"`layer\.steps`|`layer/steps`", "int32", "wrt"))
def differentiates_by_integers(model):
    nnx.grad(lambda m: m.layer.w * m.layer.steps, wrt=...)(model)


@program(TypeError, "scalar")
def differentiates_what_is_no_scalar(model):
    nnx.grad(lambda m: m.layer.w * jnp.ones(3))(model)


@program(TypeError, r"with has_aux=True the function returns \(output, aux\)")
def forgets_the_auxiliary_output(model):
    nnx.grad(lambda m: m.layer.w, has_aux=True)(model)


@program(ValueError, "argnums names argument 3")
def differentiates_an_argument_that_is_not_there(model):
    nnx.grad(lambda m: m.layer.w, argnums=3)(model)


@program(nnx.StructureError, (r"names `layer/v`|names `v`", "does not have"))
def gives_a_tangent_for_what_is_not_there(model):
    nnx.jvp(lambda m: m.layer.w, (model,), (nnx.State({"v": nnx.Param(jnp.float32(1))}),))


@program(nnx.StructureError, (r"the tangent of `layer/w` is float32\[3\]", r"float32\[\]"))
def gives_a_tangent_of_another_shape(model):
    direction = model.filter(nnx.Param).map(lambda path, w: jnp.ones(3))
    nnx.jvp(lambda m: m.layer.w, (model,), (direction,))


@program(nnx.AttributeKindError, "not a pytree")
def gives_a_module_as_its_own_tangent(model):
    nnx.jvp(lambda m: m.layer.w, (model,), (model,))


@program(TypeError, r"has no gradient yet, call `.*defvjp\(fwd, bwd\)`")
def forgets_defvjp(model):
    nnx.custom_vjp(lambda m: m.layer.w)(model)


# Axes


@program(nnx.VariableError, (r"`layer/mean` \(BatchStat\)", "variable_reduce="))
def updates_shared_statistics_under_vmap(model):
    def call(m, x):
        m.layer.mean = x
        return m(x)

    nnx.vmap(call, in_axes=(None, 0))(model, jnp.ones(3))


@program(nnx.StructureError, (r"`layer/mean` of the Model", "in_axes says which arguments have the axis"))
def maps_a_single_model(model):
    nnx.vmap(lambda m, x: m(x))(model, jnp.ones(3))


@program(nnx.StructureError, "different sizes: 3 .* and 4")
def maps_axes_of_different_sizes(model):
    nnx.vmap(lambda m, x, y: x + y, in_axes=(None, 0, 0))(model, jnp.ones(3), jnp.ones(4))


@program(nnx.VariableError, (r"`layer/mean` of the Model|`mean` of the Layer", "a shared Variable has one axis"))
def maps_one_module_in_two_ways(model):
    nnx.vmap(lambda a, b, x: x, in_axes=(None, 0, 0))(model, model.layer, jnp.ones(3))


@program(nnx.StructureError, "so give the size")
def maps_over_nothing(model):
    nnx.vmap(lambda m: m.layer.w, in_axes=None)(model)


@program(ValueError, "'mean', 'sum', 'first' or a function")
def reduces_by_an_unknown_name(model):
    nnx.vmap(lambda m, x: x, in_axes=(None, 0), variable_reduce={nnx.BatchStat: "average"})(model, jnp.ones(3))


@program(TypeError, "maps filters to an axis or None")
def gives_an_axis_by_name(model):
    nnx.vmap(lambda m, x: x, variable_axes={nnx.Param: "layers"})(model, jnp.ones(3))


@program(ValueError, "in_axes of nnx.vmap has 3 entries, and the function was called with 2")
def gives_too_many_axes(model):
    nnx.vmap(lambda m, x: x, in_axes=(None, 0, 0))(model, jnp.ones(3))


# Loops


@program(nnx.VariableError, (r"the shared `layer/mean` \(BatchStat\)", "variable_carry="))
def updates_broadcast_statistics_in_scan(model):
    def step(m, x, t):
        m.layer.mean = m.layer.mean + t
        return x, None

    nnx.scan(step, variable_broadcast=nnx.BatchStat)(model, jnp.float32(0), jnp.ones(3))


@program(nnx.VariableError, (r"the shared `layer/steps` \(Counts\) is read and then written", "variable_carry="))
def counts_in_a_shared_variable_of_a_scan(model):
    def step(m, x, t):
        m.layer.steps += 1
        return x, None

    nnx.scan(step, variable_broadcast="counts")(model, jnp.float32(0), jnp.ones(3))


@program(nnx.StructureError, (r"static `.*rate` 1 -> 2", "what it leaves must be what it finds"))
def counts_in_a_static_of_a_scan(model):
    def step(m, x, t):
        m.layer.rate = getattr(m.layer, "rate", 0) + 1
        return x, None

    nnx.scan(step)(model, jnp.float32(0), jnp.ones(3))


@program(nnx.StructureError, (r"`layer` is what was `layer` -> what was `other`", "what it leaves must be"))
def swaps_modules_in_each_run(model):
    class Pair(nnx.Module):
        def __init__(self):
            self.layer, self.other = Layer(), Layer()

    def body(i, m):
        m.layer, m.other = m.other, m.layer
        return m

    nnx.fori_loop(0, 3, body, Pair())


@program(nnx.VariableError, (r"is broadcast in nnx\.scan", "is carry as", "one axis"))
def gives_one_module_twice(model):
    nnx.scan(lambda a, b, x: (b, None), in_axes=(None, nnx.Carry, 0))(model, model, jnp.ones(3))


@program(nnx.StructureError, ("returns another structure than it was given", "return every part of the carry"))
def forgets_to_return_the_carry(model):
    nnx.fori_loop(0, 3, lambda i, m: setattr(m.layer, "w", m.layer.w + i), model)


@program(ValueError, "in_axes of nnx.scan is .*one of them is nnx.Carry")
def marks_two_carries(model):
    nnx.scan(lambda m, x, y: (m, x), in_axes=(nnx.Carry, nnx.Carry, 0))(model, jnp.float32(0), jnp.ones(3))


@program(nnx.StructureError, ("different sizes: 3 .* and 4", "in_axes says"))
def scans_axes_of_different_sizes(model):
    layers = nnx.vmap(Layer)(jnp.ones(3))
    nnx.scan(lambda m, x, t: (m(x), None), variable_axes={...: 0})(layers, jnp.float32(0), jnp.ones(4))


@program(nnx.StructureError, r"returns \(carry, y\).*out_axes=None")
def returns_the_carry_alone(model):
    nnx.scan(lambda m, x, t: x)(model, jnp.float32(0), jnp.ones(3))


@program(nnx.StructureError, (r"float32\[\]", r"int32\[\]", "cast the result"))
def changes_the_dtype_of_the_carry(model):
    nnx.scan(lambda m, x, t: (x.astype(jnp.int32), None))(model, jnp.float32(0), jnp.ones(3))


@program(nnx.VariableError, (r"`layer/w` of the Model", r"float32\[\]", r"float32\[2\]"))
def changes_the_shape_of_a_variable_in_a_loop(model):
    def body(m):
        m.layer.w = jnp.ones(2)
        return m

    nnx.while_loop(lambda m: False, body, model)


@program(nnx.StructureError, (r"`layer/sub` is a new Layer each time", "make attributes before the loop"))
def makes_a_module_in_each_run(model):
    def body(m):
        m.layer.sub = Layer()
        return m

    nnx.while_loop(lambda m: False, body, model)


@program(nnx.VariableError, (r"the condition of nnx.while_loop changes `layer/steps`", "Make the change in the body"))
def counts_in_the_condition(model):
    def more(m):
        m.layer.steps += 1
        return m.layer.steps < 3

    nnx.while_loop(more, lambda m: m, model)


@program(nnx.StructureError, ("in the place of the Model", "return the Model itself"))
def returns_another_module_from_the_body(model):
    other = Model()

    def body(val):
        return val[1], val[0]

    nnx.while_loop(lambda val: False, body, (model, other))


@program(nnx.StructureError, "returns another structure than it was given")
def returns_a_part_of_the_carry(model):
    nnx.fori_loop(0, 3, lambda i, val: val[0], (model, jnp.float32(0)))


@program(TypeError, "the bounds of nnx.fori_loop are integers")
def loops_to_a_float(model):
    nnx.fori_loop(0, 3.0, lambda i, m: m, model)


@program(ValueError, "at least 1, got 0")
def stacks_nothing(model):
    nnx.Stack(Layer, 0)


@program(TypeError, "takes a Module class")
def stacks_an_instance(model):
    nnx.Stack(model, 3)


# Branches


@program(nnx.StructureError, (r"`.*new`", "give the attribute a first value before"))
def makes_an_attribute_in_one_branch(model):
    def new(m):
        m.layer.new = nnx.BatchStat(jnp.float32(0))

    nnx.cond(True, new, lambda m: None, model)


@program(nnx.StructureError, (r"`.*rate`", "in different structures"))
def changes_a_static_in_one_branch(model):
    def change(m):
        m.layer.rate = 0.5

    nnx.cond(True, change, lambda m: None, model)


@program(nnx.StructureError, (r"`layer` is what was `other` -> what was `layer`", "after `.*swap`"))
def swaps_modules_in_one_branch(model):
    class Pair(nnx.Module):
        def __init__(self):
            self.layer, self.other = Layer(), Layer()

    def swap(m):
        m.layer, m.other = m.other, m.layer

    nnx.cond(True, swap, lambda m: None, Pair())


@program(nnx.StructureError, (r"`.*steps` disappeared|`.*steps` appeared", "in each branch"))
def deletes_an_attribute_in_one_branch(model):
    nnx.switch(1, [lambda m: None, lambda m: delattr(m.layer, "steps")], model)


@program(TypeError, "nnx.cond takes a boolean first.*got a Model")
def forgets_the_predicate(model):
    nnx.cond(model, lambda m: m.layer.w, lambda m: m.layer.w, model)


@program(nnx.StructureError, r"return different structures|return different things")
def returns_different_things(model):
    nnx.cond(True, lambda m: (m.layer.w, m.layer.w), lambda m: m.layer.w, model)


@program(nnx.StructureError, r"float32\[3\].*float32\[\]|float32\[\].*float32\[3\]")
def returns_different_shapes(model):
    nnx.cond(True, lambda m: jnp.ones(3), lambda m: m.layer.w, model)


@program(ValueError, "at least one branch")
def switches_between_nothing(model):
    nnx.switch(0, [], model)


# Values


@program((RuntimeError, ValueError), "donated|deleted")
def reads_an_array_that_was_donated(model):
    model = Model()  # the other one's arrays are held by the test, so that they cannot be donated
    w = model.layer.w
    step = nnx.jit(lambda m: setattr(m.layer, "w", m.layer.w + 1), donate_argnums=0)
    step(model)
    _ = w + 1


@program(nnx.VariableError, (r"the array of `layer/w` of the Model is gone", "donate_argnums", "jnp.copy"))
def reads_a_module_whose_array_was_donated(model):
    one, other = Model(), Model()
    one.layer.w = jnp.ones(100)
    other.layer.w = one.layer.w
    nnx.jit(lambda m: setattr(m.layer, "w", m.layer.w + 1), donate_argnums=0)(one)
    nnx.jit(lambda m: m.layer.w)(other)


@program(nnx.VariableError, (r"the array of `layer/w` of the Model is gone", "donate_argnums"))
def differentiates_what_was_donated_elsewhere(model):
    model = Model()
    model.layer.w = jnp.ones(100)
    jax.jit(lambda w: w + 1, donate_argnums=0)(model.layer.w)
    nnx.grad(lambda m: m.layer.w.sum())(model)


@program(nnx.VariableError, (r"`layer/mean` of the Model holds ShapeDtypeStruct", "update_state"))
def calls_an_abstract_model(model):
    nnx.jit(lambda m, x: m(x))(nnx.eval_shape(Model), 2.0)


@program(nnx.VariableError, (r"holds ShapeDtypeStruct", "update_state"))
def maps_an_abstract_model(model):
    nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(nnx.eval_shape(Model), jnp.ones(3))


@program(nnx.VariableError, (r"`layer/w` of the Model holds a str", "arrays or numbers"))
def keeps_a_string_in_a_variable(model):
    model.layer.w = "three"
    nnx.jit(lambda m: 0)(model)


@program(nnx.VariableError, (r"`layer/w` was given a str", "plain attributes"))
def writes_a_string_in_jit(model):
    nnx.jit(lambda m: setattr(m.layer, "w", "three"))(model)


@program(nnx.RetraceError, (r"would be traced 2 times, and max_traces=1", r"x|argument"))
def traces_more_than_allowed(model):
    step = nnx.jit(lambda m, x: m(x).sum(), max_traces=1)
    step(model, jnp.ones(2))
    step(model, jnp.ones(3))


@program(nnx.VariableError, "came out of a State")
def writes_to_a_layer_of_a_stack(model):
    stack = nnx.Stack(functools.partial(Layer, 2.0), 3)()
    stack[0].w = jnp.float32(2)


@program(nnx.VariableError, (r"`layer/mean` \(BatchStat\)", "`data`", "pmean"))
def writes_shard_statistics_to_a_shared_variable(model):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(m, x):
        m.layer.mean = x.mean()
        return x

    nnx.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(model, jnp.ones(4))


def _shards(model, in_specs, x, **options):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    nnx.shard_map(lambda m, x: m(x), mesh=mesh, in_specs=in_specs, out_specs=P("data"), **options)(model, x)


@program(nnx.StructureError, (r"`layer/mean` of the Model has the shape \[\]", "variable_specs"))
def splits_a_scalar_variable_over_a_mesh(model):
    _shards(model, (P("data"), P("data")), jnp.ones(4))


@program(ValueError, "in_specs of nnx.shard_map has an entry for each of the 2 positional arguments")
def gives_too_few_specs(model):
    _shards(model, (P(),), jnp.ones(4))


@program(ValueError, "split_rngs of nnx.shard_map names the mesh axis 'modle', and the mesh has 'data'")
def splits_streams_along_an_unknown_axis(model):
    _shards(model, (P(), P("data")), jnp.ones(4), split_rngs="modle")
