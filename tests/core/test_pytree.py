"""Pytree and TreeNode: immutable objects that are pytrees."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


class Point(nnx.Pytree):
    def __init__(self, x, name="p"):
        self.x = x
        self.name = name


class Layers(nnx.Pytree):
    def __init__(self, layers):
        self.layers = nnx.TreeNode(layers)
        self.static = nnx.Static(np.arange(2))


class Counter(nnx.Pytree, mutable=True):
    def __init__(self):
        self.n = jnp.zeros(())


def test_nodes_are_children_and_the_rest_is_static():
    leaves, tree = jax.tree.flatten(Point(jnp.ones(2)))
    assert len(leaves) == 1
    assert tree == jax.tree.structure(Point(jnp.zeros(3)))
    assert tree != jax.tree.structure(Point(jnp.ones(2), "q"))


def test_tree_map_keeps_type_and_statics():
    point = jax.tree.map(lambda x: x + 1, Point(jnp.zeros(2), "q"))
    assert type(point) is Point
    assert point.name == "q"
    np.testing.assert_array_equal(point.x, jnp.ones(2))


def test_key_paths_name_the_fields():
    ((path, _),) = jax.tree.leaves_with_path(Point(jnp.ones(2)))
    assert jax.tree_util.keystr(path) == ".x"


def test_jit_compiles_once_for_equal_statics():
    traces = []

    @jax.jit
    def f(point):
        traces.append(point.name)
        return point.x * 2

    f(Point(jnp.ones(2), "a"))
    f(Point(jnp.zeros(2), "a"))
    f(Point(jnp.ones(2), "b"))
    assert traces == ["a", "b"]


def test_statics_compare_by_type():
    assert jax.tree.structure(Point(jnp.ones(2), 1)) != jax.tree.structure(Point(jnp.ones(2), 1.0))
    assert jax.tree.structure(Point(jnp.ones(2), [1, {"a": 2}])) == jax.tree.structure(
        Point(jnp.ones(2), [1, {"a": 2}])
    )


def test_immutable():
    point = Point(jnp.ones(2))
    with pytest.raises(nnx.AttributeKindError, match=r"a Point is immutable: use `\.replace\(x=\.\.\.\)`"):
        point.x = jnp.zeros(2)
    with pytest.raises(nnx.AttributeKindError, match=r"cannot add the field 'y' to a Point, which is immutable"):
        point.y = 1
    with pytest.raises(nnx.AttributeKindError, match="a Point is immutable: its field 'x' cannot be deleted"):
        del point.x
    np.testing.assert_array_equal(point.x, jnp.ones(2))


def test_replace():
    point = Point(jnp.ones(2), "a")
    other = point.replace(x=jnp.zeros(2), name="b")
    assert (point.name, other.name) == ("a", "b")
    assert point.x[0] == 1
    assert other.x[0] == 0
    with pytest.raises(nnx.AttributeKindError, match=r"Point has no field 'z'; it has: name, x"):
        point.replace(z=1)


def test_mutable():
    counter = Counter()
    counter.n = counter.n + 1
    counter.extra = 5
    assert counter.n == 1
    assert jax.tree.map(lambda x: x, counter).extra == 5
    del counter.extra
    assert not hasattr(counter, "extra")


def test_mutable_is_inherited():
    class Child(Counter):
        pass

    child = Child()
    child.n = 3
    assert child.n == 3


def test_tree_node_marks_data():
    tree = Layers([jnp.ones(1), jnp.zeros(1)])
    assert isinstance(tree.layers, list)
    assert len(jax.tree.leaves(tree)) == 2
    doubled = jax.tree.map(lambda x: x + 1, tree)
    assert isinstance(doubled.layers, list)
    assert doubled.layers[0] == 2
    assert len(jax.tree.leaves(doubled)) == 2
    replaced = tree.replace(layers=[jnp.full(1, 5.0)])
    assert jax.tree.leaves(replaced) == [5.0]
    np.testing.assert_array_equal(tree.static, np.arange(2))


def test_tree_node_alone():
    node = nnx.TreeNode([jnp.ones(1)])
    assert node.replace([jnp.zeros(1)]).value[0] == 0
    with pytest.raises(nnx.AttributeKindError, match=r"a TreeNode is immutable; use `node\.replace\(value\)`"):
        node.value = 3
    assert type(jax.tree.map(lambda x: x, node)) is nnx.TreeNode


def test_subclasses_of_tree_node_are_pytrees():
    class Mine(nnx.TreeNode):
        pass

    assert type(jax.tree.map(lambda x: x, Mine([1, 2]))) is Mine
    assert jax.tree.leaves(Mine([1, 2])) == [1, 2]


def test_init_may_write_twice_and_call_super():
    class Child(Point):
        def __init__(self):
            super().__init__(jnp.ones(1))
            self.x = self.x + 1
            self.more = jnp.zeros(1)

    child = Child()
    assert child.x == 2
    assert len(jax.tree.leaves(child)) == 2
    with pytest.raises(nnx.AttributeKindError, match="immutable"):
        child.more = 1


def test_a_failing_init_leaves_nothing_behind():
    class Fails(nnx.Pytree):
        def __init__(self):
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        Fails()


def test_a_dataclass_pytree():
    @dataclasses.dataclass
    class Data(nnx.Pytree):
        x: jax.Array
        n: int = 3

    data = Data(jnp.ones(2))
    assert len(jax.tree.leaves(data)) == 1
    assert jax.tree.map(lambda x: x * 2, data).n == 3
    assert data.replace(n=4).n == 4
    with pytest.raises(nnx.AttributeKindError, match="immutable"):
        data.n = 5


def test_nested_pytrees_and_variables():
    outer = Point(Point(jnp.ones(1), "inner"), "outer")
    assert jax.tree.map(lambda x: x * 3, outer).x.x == 3
    assert jax.tree.map(lambda x: x * 3, outer).x.name == "inner"
    held = Point(nnx.Param(jnp.ones(1), sharding=("a",)))
    assert jax.tree.map(lambda x: x, held).x.sharding == ("a",)


def test_a_module_in_a_pytree_stays_no_pytree():
    """It cannot hide as a static: JAX's tree functions refuse it as they do anywhere else."""
    with pytest.raises(nnx.AttributeKindError, match="not a pytree"):
        jax.tree.leaves(Point(nnx.Sequence()))


@pytest.mark.parametrize(
    "value", [jnp.ones(1), np.ones(1), nnx.Param(1.0), Point(1)], ids=["jax", "numpy", "Param", "Pytree"]
)
@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: {"a": (x,)}], ids=["list", "dict"])
def test_data_hidden_in_a_static_are_refused(wrap, value):
    with pytest.raises(
        nnx.AttributeKindError,
        match=r"the field `x` of a Point would be static, but holds a .*`self\.x = nnx\.TreeNode",
    ):
        Point(wrap(value))
    with pytest.raises(nnx.AttributeKindError, match="the field `x` of a Point would be static"):
        Point(1).replace(x=wrap(value))
    assert len(jax.tree.leaves(Point(nnx.TreeNode(wrap(value))))) == 1 or isinstance(value, Point)


def test_a_pytree_is_a_node_of_a_module():
    module = nnx.Module()
    module.point = Point(jnp.ones(2), "p")
    assert module.get_state().paths == (("point",),)
    assert module.point.name == "p"
    module.point = module.point.replace(x=jnp.zeros(2))

    @nnx.jit
    def step(m):
        m.point = jax.tree.map(lambda x: x + 1, m.point)

    step(module)
    np.testing.assert_array_equal(module.point.x, jnp.ones(2))


@pytest.mark.parametrize("remake", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies(remake):
    point = remake(Point(jnp.ones(2), ["a"]))
    assert type(point) is Point
    assert point.name == ["a"]
    with pytest.raises(nnx.AttributeKindError, match="immutable"):
        point.x = 1


def test_repr():
    assert repr(Point(jnp.ones(20), "a")) == "Point(x=Array(float32[20]), name='a')"


def test_eval_shape_and_vmap():
    shapes = jax.eval_shape(lambda: Point(jnp.ones((2, 3))))
    assert shapes.x == jax.ShapeDtypeStruct((2, 3), jnp.float32)
    batched = jax.vmap(lambda x: Point(x, "v"))(jnp.arange(3.0))
    assert batched.x.shape == (3,)
    assert jax.vmap(lambda p: p.x * 2)(batched).shape == (3,)


def test_unflattening_with_none_leaves_works():
    """JAX's own machinery unflattens with placeholders."""
    tree = jax.tree.structure(Point(jnp.ones(2)))
    assert tree.unflatten([None]).x is None
    assert tree.unflatten([object()]).name == "p"
