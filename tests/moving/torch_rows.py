"""What the table "From PyTorch" claims."""

import copy
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tests.moving.rows import Row, numbers, rows

import nnx

X = numbers(5, 4)
KERNEL, BIAS = numbers(4, 2), numbers(2)


def _theirs() -> Any:
    import torch

    linear = torch.nn.Linear(4, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(KERNEL.T.copy()))
        linear.bias.copy_(torch.from_numpy(BIAS))
    return linear


def _ours() -> nnx.Linear:
    linear = nnx.Linear(4, 2, ctx=nnx.context(0))
    linear.kernel, linear.bias = KERNEL, BIAS
    return linear


def _tensor(x: Any) -> Any:
    import torch

    return torch.from_numpy(np.array(x))


class Classes(Row):
    line = "`class Net(torch.nn.Module)`, `def forward`"

    @staticmethod
    def theirs():
        import torch

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = _theirs()

            def forward(self, x):
                return torch.relu(self.linear(x))

        return Net()(_tensor(X)).detach()

    @staticmethod
    def ours():
        class Net(nnx.Module):
            def __init__(self):
                self.linear = _ours()

            def __call__(self, x):
                return nnx.relu(self.linear(x))

        return Net()(X)


class Linears(Row):
    line = "`torch.nn.Linear(4, 2)`, `.weight` [out, in]"

    @staticmethod
    def theirs():
        import torch

        linear = torch.nn.Linear(4, 2)
        return linear.weight.shape[0], linear.weight.shape[1], tuple(linear.bias.shape)

    @staticmethod
    def ours():
        ctx = nnx.context(0)
        linear = nnx.Linear(4, 2, ctx=ctx)
        return linear.kernel.shape[1], linear.kernel.shape[0], linear.bias.shape


class Images(Row):
    line = '`torch.nn.Conv2d(3, 8, 3, padding="same")`, images [N, C, H, W]'

    @staticmethod
    def theirs():
        import torch

        conv = torch.nn.Conv2d(3, 8, 3, padding="same")
        with torch.no_grad():
            conv.weight.copy_(_tensor(numbers(3, 3, 3, 8).transpose(3, 2, 0, 1)))
            conv.bias.zero_()
        return conv(_tensor(numbers(2, 6, 5, 3).transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)

    @staticmethod
    def ours():
        ctx = nnx.context(0)
        conv = nnx.Conv(3, 8, (3, 3), ctx=ctx)
        conv.kernel = numbers(3, 3, 3, 8)
        return conv(numbers(2, 6, 5, 3))


class Chains(Row):
    line = "`torch.nn.Sequential(a, torch.nn.ReLU(), b)`"

    @staticmethod
    def theirs():
        import torch

        a, b = _theirs(), torch.nn.Linear(2, 1, bias=False)
        b.weight.data = _tensor(numbers(2, 1).T)
        return torch.nn.Sequential(a, torch.nn.ReLU(), b)(_tensor(X)).detach()

    @staticmethod
    def ours():
        a, b = _ours(), nnx.Linear(2, 1, use_bias=False, ctx=nnx.context(0))
        b.kernel = numbers(2, 1)
        return nnx.Sequence([a, nnx.relu, b])(X)


class Containers(Row):
    line = "`torch.nn.ModuleList([...])`, `torch.nn.ModuleDict({...})`"

    @staticmethod
    def theirs():
        import torch

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])
                self.heads = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 2)})

        names = {name.replace("weight", "kernel") for name in Net().state_dict()}
        return sorted(names), len(Net().layers), list(Net().heads)

    @staticmethod
    def ours():
        class Net(nnx.Module):
            def __init__(self, ctx):
                self.layers = [nnx.Linear(4, 4, ctx=ctx) for _ in range(2)]
                self.heads = {"a": nnx.Linear(4, 2, ctx=ctx)}

        net = Net(nnx.context(0))
        return sorted(".".join(path) for path in net.get_state()), len(net.layers), list(net.heads)


class Parameters(Row):
    line = "`torch.nn.Parameter(x)`, `self.register_buffer(...)`"

    @staticmethod
    def theirs():
        import torch

        class Net(torch.nn.Module):
            def __init__(self, x):
                super().__init__()
                self.scale = torch.nn.Parameter(x)
                self.register_buffer("offset", x + 1)

            def forward(self, x):
                return self.scale * x + self.offset

        net = Net(_tensor(BIAS))
        names = [name for name, _ in net.named_parameters()], sorted(net.state_dict())
        return *names, net(_tensor(BIAS)).detach()

    @staticmethod
    def ours():
        class Net(nnx.Module):
            def __init__(self, x):
                self.scale = nnx.Param(x)
                self.offset = x + 1

            def __call__(self, x):
                return self.scale * x + self.offset

        net = Net(BIAS)
        names = ["/".join(path) for path in net.filter(nnx.Param)], ["/".join(path) for path in net.get_state()]
        return names[0], sorted(names[1]), net(BIAS)


class Modes(Row):
    line = "`model.train()`, `model.eval()`"

    @staticmethod
    def theirs():
        import torch

        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(4, momentum=0.01), torch.nn.Dropout(0.5))
        model.train()
        some = bool((model(_tensor(X)) == 0).any())
        model.eval()
        return some, model[0].running_mean, model(_tensor(X)[:1] * 0).detach().sign()

    @staticmethod
    def ours():
        model = nnx.Sequence([nnx.BatchNorm(4, ctx=nnx.context(0)), nnx.Dropout(0.5)])
        training = nnx.context(dropout=0, flags={"deterministic": False, "use_running_average": False})
        some = bool((model(X, ctx=training) == 0).any())
        evaluation = nnx.context(flags={"deterministic": True, "use_running_average": True})
        return some, model[0].mean, jnp.sign(model(X[:1] * 0, ctx=evaluation))


class StateDicts(Row):
    line = "`model.state_dict()`"

    @staticmethod
    def theirs():
        model = _theirs()
        return {name.replace("weight", "kernel"): x.T for name, x in sorted(model.state_dict().items())}

    @staticmethod
    def ours():
        model = _ours()
        return {".".join(path): v.value for path, v in model.get_state().items()}


class Loading(Row):
    line = "`model.load_state_dict(torch.load(f))`"

    @staticmethod
    def theirs():
        import torch

        f = io.BytesIO()
        torch.save(_theirs().state_dict(), f)
        f.seek(0)
        model = torch.nn.Linear(4, 2)
        model.load_state_dict(torch.load(f))
        return model(_tensor(X)).detach()

    @staticmethod
    def ours():
        state_dict = {"weight": KERNEL.T, "bias": BIAS}
        model = nnx.Linear(4, 2, ctx=nnx.context(0))
        nnx.load_torch_state_dict(model, state_dict)
        return model(X)


class Steps(Row):
    line = "`optimizer.zero_grad(); loss.backward(); optimizer.step()`"

    @staticmethod
    def theirs():
        import torch

        model = _theirs()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        losses = []
        for _ in range(2):
            loss = (model(_tensor(X)) ** 2).mean()
            optimizer.zero_grad(); loss.backward(); optimizer.step()  # fmt: skip # noqa: E702
            losses.append(loss.detach())
        return losses, model.weight.detach().T

    @staticmethod
    def ours():
        model = _ours()
        optimizer = nnx.Optimizer(model, optax.adam(0.1))

        def f(model):
            return (model(X) ** 2).mean()

        losses = []
        for _ in range(2):
            loss, grads = nnx.value_and_grad(f)(model); optimizer.update(model, grads)  # fmt: skip # noqa: E702
            losses.append(loss)
        return losses, model.kernel


class NoGradient(Row):
    line = "`with torch.no_grad()`"

    @staticmethod
    def theirs():
        import torch

        with torch.no_grad():
            y = _theirs()(_tensor(X))
        assert not y.requires_grad
        return y

    @staticmethod
    def ours():
        model = _ours()
        y = model(X)
        grads = nnx.grad(lambda model: (model(X) * y).sum())(model)
        np.testing.assert_allclose(grads["bias"].value, y.sum(0), rtol=1e-5)
        return y


class Detaching(Row):
    line = "`y.detach()`"

    @staticmethod
    def theirs():
        model = _theirs()
        y = model(_tensor(X))
        (y * y.detach()).sum().backward()
        return model.weight.grad.T

    @staticmethod
    def ours():
        def loss(model):
            y = model(X)
            return (y * jax.lax.stop_gradient(y)).sum()

        return nnx.grad(loss)(_ours())["kernel"].value


class Freezing(Row):
    line = "`p.requires_grad = False`"

    @staticmethod
    def theirs():
        import torch

        model = _theirs()
        for name, p in model.named_parameters():
            if name == "weight":
                p.requires_grad = False
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        (model(_tensor(X)) ** 2).mean().backward()
        optimizer.step()
        return model.weight.detach().T, model.bias.detach()

    @staticmethod
    def ours():
        model = _ours()
        only = nnx.PathGlob("bias")
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=only)
        grads = nnx.grad(lambda model: (model(X) ** 2).mean(), wrt=only)(model)
        optimizer.update(model, grads)
        return model.kernel, model.bias


class Clipping(Row):
    line = "`torch.nn.utils.clip_grad_norm_`, `torch.optim.lr_scheduler`"

    @staticmethod
    def theirs():
        import torch

        model = _theirs()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for _ in range(2):
            optimizer.zero_grad()
            (model(_tensor(X)) ** 2).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
        return model.weight.detach().T

    @staticmethod
    def ours():
        model = _ours()
        schedule = optax.exponential_decay(1.0, transition_steps=1, decay_rate=0.5)
        optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(schedule)))
        for _ in range(2):
            optimizer.update(model, nnx.grad(lambda model: (model(X) ** 2).mean())(model))
        return model.kernel


class Compiling(Row):
    line = "`torch.compile`"

    @staticmethod
    def theirs():
        import torch

        # The compiler itself takes a quarter of a minute; what it is handed is what the row is about.
        compiled = torch.compile(lambda model, x: model(x) ** 2, backend="eager")
        return compiled(_theirs(), _tensor(X)).detach()

    @staticmethod
    def ours():
        return nnx.jit(lambda model, x: model(x) ** 2)(_ours(), X)


class Recomputing(Row):
    line = "`torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False)`"

    @staticmethod
    def theirs():
        import torch.utils.checkpoint

        model, f = _theirs(), torch.tanh
        x = model(_tensor(X))
        torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False).sum().backward()
        return model.weight.grad.T

    @staticmethod
    def ours():
        f = jnp.tanh

        def loss(model):
            x = model(X)
            return nnx.remat(f)(x).sum()

        return nnx.grad(loss)(_ours())["kernel"].value


class Recurrent(Row):
    line = "`torch.nn.LSTM(4, 3, batch_first=True)`"

    @staticmethod
    def theirs():
        import torch

        lstm = torch.nn.LSTM(4, 3, batch_first=True)
        for p in lstm.parameters():
            p.data = _tensor(numbers(*p.shape))
        return lstm(_tensor(numbers(2, 5, 4)))[0].detach()

    @staticmethod
    def ours():
        ctx = nnx.context(0)
        lstm = nnx.RNN(nnx.LSTMCell(4, 3, ctx=ctx))
        shapes = {"weight_ih_l0": (12, 4), "weight_hh_l0": (12, 3), "bias_ih_l0": (12,), "bias_hh_l0": (12,)}
        nnx.load_torch_state_dict(lstm, {name: numbers(*shape) for name, shape in shapes.items()})
        return lstm(numbers(2, 5, 4))


class Attention(Row):
    line = "`torch.nn.functional.scaled_dot_product_attention(q, k, v)`, [N, heads, T, features]"

    @staticmethod
    def theirs():
        import torch

        q, k, v = (_tensor(numbers(2, 3, 5, 4)) * i for i in (1, 2, 3))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).numpy().transpose(0, 2, 1, 3)

    @staticmethod
    def ours():
        q, k, v = (jnp.asarray(numbers(2, 3, 5, 4).transpose(0, 2, 1, 3)) * i for i in (1, 2, 3))
        return nnx.dot_product_attention(q, k, v)


class Counting(Row):
    line = "`sum(p.numel() for p in model.parameters())`"

    @staticmethod
    def theirs():
        model = _theirs()
        return sum(p.numel() for p in model.parameters())

    @staticmethod
    def ours():
        model = _ours()
        return nnx.count_parameters(model)


class Copies(Row):
    line = "`copy.deepcopy(model)`"

    @staticmethod
    def theirs():
        model = _theirs()
        other = copy.deepcopy(model)
        model.weight.data.zero_()
        return other(_tensor(X)).detach(), model(_tensor(X)).detach()

    @staticmethod
    def ours():
        model = _ours()
        other, clone = copy.deepcopy(model), model.clone()
        model.kernel = jnp.zeros((4, 2))
        assert jnp.array_equal(other(X), clone(X))
        return other(X), model(X)


class Seeds(Row):
    line = "`torch.manual_seed(0)`"

    @staticmethod
    def theirs():
        import torch

        kernels = []
        for _ in range(2):
            torch.manual_seed(0)
            kernels.append(torch.nn.Linear(4, 2).weight)
        return bool((kernels[0] == kernels[1]).all()), bool((kernels[0] == torch.nn.Linear(4, 2).weight).any())

    @staticmethod
    def ours():
        kernels = []
        for _ in range(2):
            ctx = nnx.context(0)
            kernels.append(nnx.Linear(4, 2, ctx=ctx).kernel)
        return bool((kernels[0] == kernels[1]).all()), bool((kernels[0] == nnx.Linear(4, 2, ctx=ctx).kernel).any())


ROWS = rows(globals())
