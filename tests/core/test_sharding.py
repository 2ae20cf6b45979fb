"""Logical axes: names on Variables, rules, specs, and the errors of what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from jax.sharding import PartitionSpec as P

import nnx

RULES = {"embed": "data", "mlp": "model", "layers": None}
MESH = AbstractMesh((4, 2), ("data", "model"))


class Block(nnx.Module):
    def __init__(self, *, ctx):
        key = ctx.make_rng("params")
        self.w = nnx.Param(jax.random.normal(key, (8, 8)), sharding=("embed", "mlp"))
        self.scale = nnx.Param(jnp.ones(8), sharding=("mlp",))
        self.calls = nnx.var("counts", jnp.int32(0))

    def __call__(self, x):
        return jnp.tanh(x @ self.w) * self.scale[None]


@pytest.fixture
def block():
    return Block(ctx=nnx.context(0))


def specs(tree):
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def test_specs_of_a_module_and_of_its_state(block):
    found = nnx.get_partition_spec(block, RULES)
    assert isinstance(found, nnx.State)
    assert found["w"].value == P("data", "model")
    assert found["scale"].value == P("model")
    assert found["calls"].value == P()
    state, _ = block.partition()
    assert specs(nnx.get_partition_spec(state, RULES)) == specs(found)
    assert nnx.get_partition_spec(state.filter("params"), RULES).paths == (("scale",), ("w",))


def test_without_rules_a_spec_holds_the_names_and_logical_to_mesh_maps_them(block):
    logical = nnx.get_partition_spec(block)
    assert logical["w"].value == P("embed", "mlp")
    mapped = nnx.logical_to_mesh(logical, RULES)
    assert specs(mapped) == specs(nnx.get_partition_spec(block, RULES))
    shardings = nnx.logical_to_mesh_sharding(logical, MESH, RULES)
    assert shardings["w"].value == jax.sharding.NamedSharding(MESH, P("data", "model"))


def test_rules_of_the_context_and_of_pairs(block):
    with nnx.logical_axis_rules(list(RULES.items())):
        assert nnx.get_partition_spec(block)["w"].value == P("data", "model")
        with nnx.logical_axis_rules({**RULES, "mlp": None}):
            assert nnx.get_partition_spec(block)["w"].value == P("data", None)
        assert nnx.get_partition_spec(block, {"embed": None, "mlp": ("data", "model")})["w"].value == P(
            None, ("data", "model")
        )
    assert nnx.get_partition_spec(block)["w"].value == P("embed", "mlp")


def test_a_function_compiled_under_other_rules_is_traced_again():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    traced = []

    @nnx.jit
    def f(x):
        traced.append(x)
        return nnx.with_logical_constraint(x, ("embed", "mlp"))

    x = jnp.ones((8, 8))
    with jax.set_mesh(mesh):
        f(x)
        for rules in (RULES, {**RULES, "mlp": None}, RULES):
            with nnx.logical_axis_rules(rules):
                f(x)
    assert len(traced) == 3


def test_names_follow_scan_vmap_and_eval_shape(block):
    stack = nnx.Stack(Block, 3)(ctx=nnx.context(0))
    assert nnx.get_partition_spec(stack, RULES)["layers/w"].value == P(None, "data", "model")
    assert nnx.get_partition_spec(stack[1], RULES)["w"].value == P("data", "model")

    def forward(stack, x):
        return stack(x)

    nnx.jit(forward)(stack, jnp.ones((2, 8)))
    assert stack.layers.get_variable("w").sharding == ("layers", "embed", "mlp")

    seen = []

    def look(block, x):
        seen.append(nnx.get_partition_spec(block)["w"].value)
        return block(x)

    nnx.vmap(look, in_axes=(0, None))(stack.layers, jnp.ones((2, 8)))
    assert seen == [P("embed", "mlp")]

    abstract = nnx.eval_shape(Block, ctx=nnx.context(0))
    assert specs(nnx.get_named_sharding(abstract, MESH, RULES)) == specs(nnx.get_named_sharding(block, MESH, RULES))


def test_names_follow_gradients_and_optimizer_states(block):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    optimizer = nnx.Optimizer(block, tx)
    found = nnx.get_partition_spec(optimizer, RULES)
    # The sum of squares of the moments' names: each as its parameter, the counts whole.
    assert found["opt_state/1/0/mu/w"].value == found["opt_state/1/0/nu/w"].value == P("data", "model")
    assert found["opt_state/1/0/mu/scale"].value == P("model")
    assert found["opt_state/1/0/count"].value == found["step"].value == P()

    grads = nnx.grad(lambda block, x: block(x).sum())(block, jnp.ones((2, 8)))
    assert nnx.get_partition_spec(grads, RULES)["w"].value == P("data", "model")

    state = nnx.TrainState.from_module(block, tx)
    found = nnx.get_partition_spec(state, RULES)
    assert found.opt_state[1][0].mu == {"scale": P("model"), "w": P("data", "model")}
    assert found.params["w"].value == P("data", "model")
    assert found.step == P()


def test_names_follow_averages_and_accumulated_gradients(block):
    average = nnx.get_partition_spec(nnx.EMA(block, 0.99), RULES)
    assert average["average/w"].value == P("data", "model")
    assert average["weight"].value == P()
    optimizer = nnx.Optimizer(block, optax.MultiSteps(optax.sgd(1e-3), 2))
    found = nnx.get_partition_spec(optimizer, RULES)
    assert found["opt_state/acc_grads/w"].value == P("data", "model")
    assert found["opt_state/mini_step"].value == P()


def test_an_optimizer_state_of_other_shapes_is_whole(block):
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=4)
    found = nnx.get_partition_spec(nnx.TrainState.from_module(block, tx), RULES)
    assert all(spec == P() for spec in specs(found.opt_state) if spec != P("model"))
    assert P("model") in specs(found.opt_state)  # the unfactored statistics of `scale`


def test_a_name_without_a_rule(block):
    message = (
        r"`w` has the logical axis `mlp` \(dimension 1 of size 8\), for which there is no rule: add \('mlp', <a mesh "
        r"axis>\), or \('mlp', None\) to leave it whole. There are rules for `embed`"
    )
    rules = {"embed": "data"}
    without = block.filter(nnx.PathGlob("w"))
    for find in (lambda: nnx.get_partition_spec(without, rules), lambda: nnx.get_named_sharding(without, MESH, rules)):
        with pytest.raises(nnx.ShardingError, match=message):
            find()
    with pytest.raises(ValueError, match="for which there is no rule"):
        nnx.logical_to_mesh(P("mlp"), rules)


def test_a_mesh_axis_used_twice(block):
    rules = {"embed": "data", "mlp": ("model", "data")}
    with pytest.raises(
        nnx.ShardingError,
        match=r"`w` with the logical axes \('embed', 'mlp'\) would be split twice over the mesh axis `data`: by "
        r"`embed` and by `mlp` \(shape \(8, 8\)\)",
    ):
        nnx.get_partition_spec(block, rules)


def test_a_size_that_does_not_divide():
    variable = nnx.Param(jnp.ones((6, 8)), sharding=("embed", "mlp"))
    with pytest.raises(
        nnx.ShardingError,
        match=r"dimension 0 \(`embed`\) of `encoder/w` has the size 6 \(shape \(6, 8\)\), which does not divide over "
        r"the mesh axis `data` of size 4: make the size a multiple of 4, or map `embed` to None",
    ):
        nnx.get_named_sharding(nnx.State({("encoder", "w"): variable}), MESH, RULES)


def test_an_axis_that_the_mesh_lacks_and_names_that_do_not_fit(block):
    with pytest.raises(nnx.ShardingError, match=r"the mesh axis `tensor`, which the mesh does not have \(its axes: `d"):
        nnx.get_named_sharding(block, MESH, {**RULES, "mlp": "tensor"})
    with pytest.raises(nnx.ShardingError, match=r"has the shape \(8,\) and the logical axes \('embed', 'mlp'\)"):
        nnx.get_partition_spec(nnx.Param(jnp.ones(8), sharding=("embed", "mlp")), RULES)


def test_malformed_rules():
    with pytest.raises(nnx.ShardingError, match=r"a rule is a pair"):
        nnx.get_partition_spec(jnp.ones(2), ["embed"])
    with pytest.raises(nnx.ShardingError, match=r"`embed` has two rules, 'data' and None"):
        nnx.get_partition_spec(jnp.ones(2), [("embed", "data"), ("embed", None)])
    with pytest.raises(nnx.ShardingError, match=r"the rule of `embed` gives a mesh axis"):
        nnx.get_partition_spec(jnp.ones(2), {"embed": 3})
    with pytest.raises(nnx.ShardingError, match="there are no rules"):
        nnx.logical_to_mesh(P("embed"))


def test_a_constraint_without_rules_is_nothing_and_without_a_mesh_an_error():
    x = jnp.ones((8, 8))
    assert nnx.with_logical_constraint(x, ("embed", "mlp")) is x
    with nnx.logical_axis_rules(RULES), pytest.raises(nnx.ShardingError, match="has rules and no mesh"):
        nnx.with_logical_constraint(x, ("embed", "mlp"))
    with pytest.raises(nnx.ShardingError, match=r"got an array of the shape \(8, 8\): name each dimension once"):
        nnx.with_logical_constraint(x, ("embed",), rules=RULES, mesh=MESH)


def test_an_initializer_with_names():
    init = nnx.with_logical_partitioning(jax.nn.initializers.normal(), ("a", "b"))
    layer = nnx.Linear(4, 8, kernel_init=init, ctx=nnx.context(0))
    assert layer.get_variable("kernel").sharding == ("a", "b")
    plain = nnx.Linear(4, 8, kernel_init=nnx.with_logical_partitioning(init, None), ctx=nnx.context(0))
    assert plain.get_variable("kernel").sharding is None
    same = nnx.Linear(4, 8, kernel_init=jax.nn.initializers.normal(), ctx=nnx.context(0))
    np.testing.assert_array_equal(layer.kernel, same.kernel)


def test_sharded_init_on_one_device_makes_what_the_constructor_makes(block):
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    made, context = nnx.sharded_init(lambda: (Block(ctx=nnx.context(0)), nnx.context(dropout=3)), mesh, RULES)
    np.testing.assert_array_equal(made.w, block.w)
    assert tuple(made.w.sharding.spec) == ("data", "model")
    assert made.get_variable("w").sharding == ("embed", "mlp")
    np.testing.assert_array_equal(
        jax.random.key_data(context.make_rng("dropout")),
        jax.random.key_data(nnx.context(dropout=3).make_rng("dropout")),
    )
    with pytest.raises(nnx.ShardingError, match="`scale` has the logical axis `mlp`"):
        nnx.sharded_init(lambda: Block(ctx=nnx.context(0)), mesh, {"embed": None})
