"""The arguments of every layer and function are those of flax.nnx, but for those that the table gives a reason for."""

import inspect

import pytest
from flax import nnx as flax_nnx
from tests.parity import arguments
from tests.parity.arguments import DIFFERENT, differences, is_newest, shared

import nnx
from nnx import layers

pytestmark = pytest.mark.skipif(not is_newest(), reason="the arguments are held to those of the newest flax")


@pytest.mark.parametrize("name", shared())
def test_arguments(name):
    found = dict(differences(name))
    reasoned = {place for place in DIFFERENT if place[0] == name}
    assert {place: what for place, what in found.items() if place not in reasoned} == {}
    assert reasoned <= set(found), "the table has differences that are none"


def test_the_table_is_of_what_both_have():
    assert {place[0] for place in DIFFERENT} <= set(shared())
    assert len(shared()) > 50


def _with(function, **changes):
    """A function with another signature: arguments by name, or None to leave one out."""
    kept = [changes.get(name, found) for name, found in inspect.signature(function).parameters.items()]

    def other(*args, **kwargs):
        raise AssertionError

    other.__signature__ = inspect.Signature([found for found in kept if found is not None])
    return other


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (None, "not there"),
        (inspect.Parameter("use_bias", inspect.Parameter.KEYWORD_ONLY, default=False), "the default is False"),
        (inspect.Parameter("use_bias", inspect.Parameter.KEYWORD_ONLY), "the default is"),
        (inspect.Parameter("with_bias", inspect.Parameter.KEYWORD_ONLY, default=True), "not there"),
    ],
    ids=["left out", "default", "required", "renamed"],
)
def test_a_difference_is_found(monkeypatch, change, what):
    assert list(differences("Linear")) == []
    monkeypatch.setattr(layers.Linear, "__init__", _with(layers.Linear.__init__, use_bias=change))
    ((place, found),) = differences("Linear")
    assert place == ("Linear", "__init__", "use_bias")
    assert found.startswith(what)


def test_another_initializer_is_found(monkeypatch):
    init = inspect.Parameter("kernel_init", inspect.Parameter.KEYWORD_ONLY, default=nnx.initializers.he_normal())
    monkeypatch.setattr(layers.Linear, "__init__", _with(layers.Linear.__init__, kernel_init=init))
    assert [place[2] for place, _ in differences("Linear")] == ["kernel_init"]


def test_the_order_counts(monkeypatch):
    order = inspect.signature(layers.Linear.__init__)
    first, second, third, *rest = order.parameters.values()

    def other(*args, **kwargs):
        raise AssertionError

    other.__signature__ = order.replace(parameters=[first, third, second, *rest])
    monkeypatch.setattr(layers.Linear, "__init__", other)
    assert [place[2] for place, _ in differences("Linear")] == ["in_features", "out_features"]


def test_an_argument_more_must_be_optional(monkeypatch):
    def other(self, x, axis=-1): ...

    def required(self, x, *, axis): ...

    monkeypatch.setattr(arguments, "layers", _Module(silu=None, GRUCell=layers.GRUCell))
    for call in (other, required):
        monkeypatch.setattr(arguments.layers, "silu", call)
        assert [place[2] for place, _ in differences("silu")] == ["axis"]


class _Module:
    """What stands for the package."""

    def __init__(self, **names):
        vars(self).update(names)


# Each with arguments of the constructor: what its metadata reach is asked of both libraries.
_METADATA = {
    "Linear": (3, 4),
    "LinearGeneral": (3, (2, 4)),
    "Einsum": ("ab,bc->ac", (3, 4), (4,)),
    "Conv": (3, 4, 2),
    "ConvTranspose": (3, 4, 2),
    "Embed": (7, 4),
    "PReLU": (),
    "BatchNorm": (4,),
    "LayerNorm": (4,),
    "GroupNorm": (4, 2),
    "InstanceNorm": (4,),
    "RMSNorm": (4,),
    "LoRA": (3, 2, 4),
    "LoRALinear": (3, 4),
    "SimpleCell": (3, 4),
    "GRUCell": (3, 4),
    "OptimizedLSTMCell": (3, 4),
    "LSTMCell": (3, 4),
    "MultiHeadAttention": (2, 4),
}
_MORE = {"LoRALinear": {"lora_rank": 2}, "MultiHeadAttention": {"normalize_qk": True}}


def _metadata_arguments(made):
    return [name for name in inspect.signature(made.__init__).parameters if name.endswith("_metadata")]


@pytest.mark.parametrize("name", _METADATA)
def test_metadata_reach_the_same_parameters(name):
    made, theirs = getattr(layers, name), getattr(flax_nnx, name)
    options = _MORE.get(name, {})

    def make(made, options, **randomness):
        """The layer, inside of the trace that it is made in."""
        random = {} if name == "PReLU" else {key: new(0) for key, new in randomness.items()}
        return made(*_METADATA[name], **random, **options)

    for argument in _metadata_arguments(theirs):
        marked = {argument: {"tag": 7}, **options}
        state = nnx.eval_shape(lambda marked=marked: make(made, marked, ctx=nnx.context)).get_state()
        ours = {path for path, v in state.items() if v.metadata.get("tag") == 7}
        layer = flax_nnx.eval_shape(lambda marked=marked: make(theirs, marked, rngs=flax_nnx.Rngs))
        flat = flax_nnx.to_flat_state(flax_nnx.state(layer))
        assert ours == {path for path, v in flat if v.get_metadata().get("tag") == 7}
        assert ours


def test_all_layers_with_metadata_are_asked():
    made = {name for name in shared() if isinstance(getattr(flax_nnx, name), type)}
    assert {name for name in made if _metadata_arguments(getattr(flax_nnx, name))} == set(_METADATA)
