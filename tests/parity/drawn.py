"""Cases with sizes that hypothesis draws, against flax.nnx and, where that has no such layer, against torch."""

import functools

import numpy as np
from hypothesis import strategies as st
from tests.parity.cases import Case
from tests.parity.torch_side import TorchCase, features_first, features_last, of_function
from torch.nn import functional

EXAMPLES = 12
"""How many cases are drawn for each layer: the same ones in each run."""

_sizes = st.integers(1, 6)
_flag = st.booleans()
_batch = st.lists(st.integers(1, 3), max_size=3).map(tuple)


@st.composite
def _linear(draw):
    features, out = draw(_sizes), draw(_sizes)
    return Case("Linear", (features, out), {"use_bias": draw(_flag)}, ((*draw(_batch), features),))


@st.composite
def _linear_general(draw):
    shape = tuple(draw(st.lists(_sizes, min_size=1, max_size=4)))
    axes = tuple(sorted(draw(st.sets(st.integers(0, len(shape) - 1), min_size=1, max_size=3))))
    out = tuple(draw(st.lists(_sizes, min_size=1, max_size=3)))
    features = tuple(shape[axis] for axis in axes)
    return Case("LinearGeneral", (features, out), {"axis": axes, "use_bias": draw(_flag)}, (shape,))


@st.composite
def _embed(draw):
    count = draw(st.integers(2, 9))  # flax has a branch of its own for a single vector
    indices = np.array(draw(st.lists(st.integers(-count, count - 1), max_size=6)), np.int32)
    return Case("Embed", (count, draw(_sizes)), {}, (indices,), note=str(indices.tolist()))


@st.composite
def _conv(draw, name):
    size = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    dilation = tuple(draw(st.integers(1, 2)) for _ in size)
    strides = tuple(draw(st.integers(1, 3)) for _ in size)
    # So large that every padding has enough to mirror.
    space = tuple((n - 1) * d + 1 + draw(st.integers(1, 4)) for n, d in zip(size, dilation, strict=True))
    groups = draw(st.integers(1, 2)) if name == "Conv" else 1
    features, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    paddings = ["SAME", "VALID", "CIRCULAR", tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in size)]
    options = {"strides": strides, "kernel_dilation": dilation, "use_bias": draw(_flag)}
    if name == "Conv":
        paddings.append("REFLECT")
        options["feature_group_count"] = groups
    else:
        options["transpose_kernel"] = draw(_flag)
    options["padding"] = draw(st.sampled_from(paddings))
    return Case(name, (features, out, size), options, ((*draw(_batch), *space, features),))


@st.composite
def _pool(draw, name):
    window = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    space = tuple(n + draw(st.integers(0, 4)) for n in window)
    call = {
        "window_shape": window,
        "strides": tuple(draw(st.integers(1, 3)) for _ in window),
        "padding": draw(st.sampled_from(("SAME", "VALID"))),
    }
    return Case(name, inputs=((*draw(_batch), *space, draw(_sizes)),), call=call)


@st.composite
def _adaptive(draw, kind):
    space = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    cells = tuple(draw(st.integers(1, n)) for n in space)
    function = getattr(functional, f"adaptive_{kind}_pool{len(space)}d")
    return TorchCase(
        f"adaptive_{kind}_pool",
        inputs=((draw(st.integers(1, 3)), *space, draw(_sizes)),),
        call={"output_shape": cells},
        torch=of_function(lambda x: features_last(function(features_first(x), cells))),
        named=f"F.{function.__name__}",
    )


@st.composite
def _norm(draw, name):
    # More than one element in each group, or the variance is 0 and all gradients are rounding errors.
    space = tuple(draw(st.lists(st.integers(2, 4), min_size=1, max_size=3)))
    batch = draw(st.integers(2, 4))
    groups, size = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    features = groups * size
    options = {"use_scale": draw(_flag), "epsilon": draw(st.sampled_from((1e-5, 1e-3, 0.1)))}
    if name != "RMSNorm":
        options["use_bias"] = draw(_flag)
    args = (features, groups) if name == "GroupNorm" else (features,)
    call = {"use_running_average": draw(_flag)} if name == "BatchNorm" else {}
    return Case(name, args, options, ((batch, *space, features),), call)


@st.composite
def _attention(draw):
    kv_heads, shared, size = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    heads = kv_heads * shared
    features, out, memory = draw(_sizes), draw(_sizes), draw(_sizes)
    batch, length, other = draw(st.integers(1, 2)), draw(_sizes), draw(_sizes)
    options = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "qkv_features": heads * size,
        "in_features": features,
        "out_features": out,
        "in_kv_features": memory,
        "use_bias": draw(_flag),
    }
    call = {"is_causal": True} if draw(_flag) else {}
    return Case("MultiHeadAttention", (), options, ((batch, length, features), (batch, other, memory)), call)


def _make_rnn(new, name, features, hidden, **options):
    options.pop("param_dtype", None)
    return new("RNN", new(name, features, hidden), **options)


@st.composite
def _rnn(draw):
    name = draw(st.sampled_from(("OptimizedLSTMCell", "GRUCell", "SimpleCell")))
    features, hidden, steps = draw(_sizes), draw(_sizes), draw(_sizes)
    options = {"reverse": draw(_flag), "keep_order": draw(_flag), "return_carry": True, "time_major": draw(_flag)}
    batch = draw(_batch)
    shape = (steps, *batch, features) if options["time_major"] else (*batch, steps, features)
    make = functools.partial(_make_rnn, name=name, features=features, hidden=hidden)
    return Case("RNN", options=options, inputs=(shape,), make=make, note=f"of {name} {hidden}")


DRAWN: dict[str, st.SearchStrategy[Case]] = {
    "Linear": _linear(),
    "LinearGeneral": _linear_general(),
    "Embed": _embed(),
    "Conv": _conv("Conv"),
    "ConvTranspose": _conv("ConvTranspose"),
    **{name: _pool(name) for name in ("avg_pool", "max_pool", "min_pool")},
    **{f"adaptive_{kind}_pool": _adaptive(kind) for kind in ("avg", "max")},
    **{name: _norm(name) for name in ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")},
    "MultiHeadAttention": _attention(),
    "RNN": _rnn(),
}
"""How the cases of a layer are drawn."""
