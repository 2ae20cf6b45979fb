"""State dicts of torch into models of ours: what comes out of both is the same."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import nnx

CTX = nnx.context(0, flags={"use_running_average": True, "deterministic": True})


def agree(ours, theirs, x, *, first=False, tolerance=1e-5, turn=lambda y: y):
    """Loads theirs into ours and compares what they make of `x`; `first`: torch wants the features first."""
    report = nnx.load_torch_state_dict(ours, theirs.state_dict())
    assert report.fits
    theirs.eval()
    with torch.no_grad():
        given = torch.from_numpy(np.array(x))
        expected = theirs(given.movedim(-1, 1) if first else given)
    expected = expected[0] if isinstance(expected, tuple) else expected
    expected = (expected.movedim(1, -1) if first else expected).numpy()
    found = turn(ours(jnp.asarray(x)))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    return report


def drawn(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_affine_layers_and_embeddings():
    agree(nnx.Linear(5, 7, ctx=CTX), nn.Linear(5, 7), drawn(3, 5))
    agree(nnx.Linear(5, 7, use_bias=False, ctx=CTX), nn.Linear(5, 7, bias=False), drawn(3, 5))
    agree(nnx.LinearGeneral(5, (2, 3), ctx=CTX), nn.Linear(5, 6), drawn(3, 5), turn=lambda y: y.reshape(3, 6))
    agree(nnx.Embed(9, 4, ctx=CTX), nn.Embedding(9, 4), np.array([[0, 8], [3, 3]]))
    agree(nnx.PReLU(), nn.PReLU(), drawn(3, 5))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions(rank):
    x = drawn(2, 7, 6, 5, 4)[(slice(None),) * (rank + 1) + (0,) * (3 - rank)]
    size = (3, 2, 2)[:rank]
    theirs = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](4, 6, size, groups=2)
    agree(nnx.Conv(4, 6, size, padding="VALID", feature_group_count=2, ctx=CTX), theirs, x, first=True)
    for transpose_kernel in (False, True):
        theirs = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1](4, 6, size, stride=2)
        ours = nnx.ConvTranspose(4, 6, size, strides=2, padding="VALID", transpose_kernel=transpose_kernel, ctx=CTX)
        agree(ours, theirs, x, first=True)


def test_norms():
    theirs = nn.BatchNorm2d(4)
    theirs(torch.from_numpy(drawn(8, 4, 5, 5)) * 3 + 1)  # its averages move
    report = agree(nnx.BatchNorm(4, use_running_average=True, ctx=CTX), theirs, drawn(2, 5, 5, 4), first=True)
    assert report.ignored == ("num_batches_tracked",)
    agree(nnx.LayerNorm(5, epsilon=1e-5, ctx=CTX), nn.LayerNorm(5), drawn(3, 5))
    agree(nnx.RMSNorm(5, epsilon=1e-6, ctx=CTX), nn.RMSNorm(5, eps=1e-6), drawn(3, 5))
    agree(nnx.GroupNorm(6, 3, epsilon=1e-5, ctx=CTX), nn.GroupNorm(3, 6), drawn(2, 4, 6), first=True)


@pytest.mark.parametrize("bias", [True, False])
def test_attention(bias):
    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 4, bias=bias, batch_first=True)
            if bias:
                nn.init.normal_(self.attention.in_proj_bias)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    class Ours(nnx.Module):
        def __init__(self):
            self.attention = nnx.MultiHeadAttention(4, 12, use_bias=bias, ctx=CTX)

        def __call__(self, x):
            return self.attention(x)

    agree(Ours(), Theirs(), drawn(2, 5, 12))


@pytest.mark.parametrize(
    ("cell", "theirs"),
    [("LSTMCell", nn.LSTM), ("OptimizedLSTMCell", nn.LSTM), ("GRUCell", nn.GRU), ("SimpleCell", nn.RNN)],
)
@pytest.mark.parametrize("both", [False, True])
def test_recurrent_layers(cell, theirs, both):
    made = getattr(nnx, cell)
    layer = theirs(5, 4, batch_first=True, bidirectional=both)
    if cell == "GRUCell":
        with pytest.raises(nnx.StructureError, match="a bias inside of the reset gate, which GRUCell has not"):
            nnx.load_torch_state_dict(nnx.RNN(made(5, 4, ctx=CTX)), theirs(5, 4).state_dict())
        for name, parameter in layer.named_parameters():
            if name.startswith("bias_hh"):
                parameter.data[8:] = 0
    rnn = nnx.RNN(made(5, 4, ctx=CTX))
    ours = nnx.Bidirectional(rnn, nnx.RNN(made(5, 4, ctx=CTX))) if both else rnn
    agree(ours, layer, drawn(2, 6, 5))


def test_a_model_from_its_files(tmp_path):
    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.features(x).mean((2, 3)))

    class Ours(nnx.Module):
        def __init__(self, *, ctx):
            self.conv = nnx.Conv(3, 8, (3, 3), ctx=ctx)
            self.norm = nnx.BatchNorm(8, use_running_average=True, ctx=ctx)
            self.head = nnx.Linear(8, 2, ctx=ctx)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    theirs = Theirs()
    theirs(torch.from_numpy(drawn(4, 3, 6, 6)))
    theirs.eval()
    x = drawn(2, 6, 6, 3)
    expected = theirs(torch.from_numpy(x).movedim(-1, 1)).detach().numpy()
    rename = {"features.0.*": "conv.*", "features.1.*": "norm.*"}
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is a pickle, which may execute anything"):
        nnx.load_torch_state_dict(Ours(ctx=CTX), tmp_path / "model.pt")
    for source in (torch.load(tmp_path / "model.pt", weights_only=True), tmp_path / "model.safetensors"):
        ours = Ours(ctx=CTX)
        nnx.load_torch_state_dict(ours, source, rename=rename)
        np.testing.assert_allclose(ours(x), expected, rtol=1e-5, atol=1e-5)
    half = theirs.to(torch.bfloat16).state_dict()
    nnx.load_torch_state_dict(ours, half, rename=rename, cast=True)
    np.testing.assert_array_equal(ours.head.kernel, half["head.weight"].float().numpy().T)


class OurBlock(nnx.Module):
    def __init__(self, width, *, ctx):
        self.norm1, self.norm2 = (nnx.LayerNorm(width, epsilon=1e-5, ctx=ctx) for _ in range(2))
        self.self_attn = nnx.MultiHeadAttention(2, width, ctx=ctx)
        self.linear1, self.linear2 = nnx.Linear(width, 16, ctx=ctx), nnx.Linear(16, width, ctx=ctx)

    def __call__(self, x):
        x = x + self.self_attn(self.norm1(x), is_causal=True)
        return x + self.linear2(nnx.relu(self.linear1(self.norm2(x))))


def test_a_transformer_by_its_own_names():
    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
            self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).layers
            self.norm = nn.LayerNorm(8)
            self.head = nn.Linear(8, 11, bias=False)
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.5)

        def forward(self, tokens):
            x = self.embed(tokens)
            mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
            for layer in self.layers:
                x = layer(x, src_mask=mask, is_causal=True)
            return self.head(self.norm(x))

    class Ours(nnx.Module):
        def __init__(self, *, ctx):
            self.embed = nnx.Embed(11, 8, ctx=ctx)
            self.layers = [OurBlock(8, ctx=ctx) for _ in range(3)]
            self.norm = nnx.LayerNorm(8, epsilon=1e-5, ctx=ctx)
            self.head = nnx.Linear(8, 11, use_bias=False, ctx=ctx)

        def __call__(self, tokens):
            x = self.embed(tokens)
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x))

    tokens = np.random.default_rng(0).integers(0, 11, (2, 7))
    agree(Ours(ctx=CTX), Theirs(), tokens, tolerance=1e-4)


def test_a_recurrent_classifier():
    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.rnn = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
            self.head = nn.Linear(10, 3)

        def forward(self, tokens):
            return self.head(self.rnn(self.embed(tokens))[0].amax(1))

    class Ours(nnx.Module):
        def __init__(self, *, ctx):
            self.embed = nnx.Embed(11, 6, ctx=ctx)
            self.rnn = nnx.Bidirectional(*(nnx.RNN(nnx.LSTMCell(6, 5, ctx=ctx)) for _ in range(2)))
            self.head = nnx.Linear(10, 3, ctx=ctx)

        def __call__(self, tokens):
            return self.head(self.rnn(self.embed(tokens)).max(1))

    agree(Ours(ctx=CTX), Theirs(), np.random.default_rng(0).integers(0, 11, (4, 6)))


def test_a_residual_net():
    class TheirBlock(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(y + self.downsample(x))

    class Block(nnx.Module):
        def __init__(self, inputs, outputs, stride, *, ctx):
            def conv(inputs, size, stride):
                pads = [(size // 2, size // 2)] * 2  # SAME would pad the other side of a stride
                return nnx.Conv(inputs, outputs, (size, size), strides=stride, padding=pads, use_bias=False, ctx=ctx)

            def norm():
                return nnx.BatchNorm(outputs, use_running_average=True, ctx=ctx)

            self.conv1, self.bn1 = conv(inputs, 3, stride), norm()
            self.conv2, self.bn2 = conv(outputs, 3, 1), norm()
            self.downsample = nnx.Sequence([conv(inputs, 1, stride), norm()])

        def __call__(self, x):
            y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
            return nnx.relu(y + self.downsample(x))

    theirs = nn.Sequential(TheirBlock(3, 4, 1), TheirBlock(4, 6, 2))
    theirs(torch.from_numpy(drawn(8, 3, 8, 8)) + 1)  # the averages move
    ours = nnx.Sequence([Block(3, 4, 1, ctx=CTX), Block(4, 6, 2, ctx=CTX)])
    report = agree(ours, theirs, drawn(2, 8, 8, 3), first=True, tolerance=1e-4)
    assert len(report.ignored) == 6  # num_batches_tracked
