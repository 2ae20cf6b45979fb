"""fit: both styles, logging, evaluation, checkpoints, resuming, signals, and numbers that go bad."""

import csv
import io
import json
import os
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx
from nnx.train._writer import LOSES_THREADS_AT_EXIT

# One object: a transformation is compared by identity, so another one would compile the step anew.
TX = optax.adam(1e-2)
X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)


def parts(seed=0):
    model = nnx.Linear(4, 2, ctx=nnx.context(seed))
    return model, nnx.Optimizer(model, TX)


@nnx.jit
def lifted(state, batch, ctx):
    model, optimizer = state
    batch = batch + 0.1 * jax.random.normal(ctx.make_rng("noise"), batch.shape)
    loss, grads = nnx.value_and_grad(lambda model: ((model(batch) - 1) ** 2).mean())(model)
    optimizer.update(model, grads)
    return {"loss": loss}


@jax.jit
def functional(state, batch):
    def loss_fn(params):
        out, _ = state.apply(params)(batch)
        return ((out - 1) ** 2).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads), {"loss": loss}


class Batches:
    """An endless data iterator with a position."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return X * (self.at % 5)

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


class Recorder:
    def __init__(self):
        self.rows, self.resumed, self.closed = [], [], 0

    def resume(self, step):
        self.resumed.append(step)

    def log(self, step, values):
        self.rows.append((step, dict(values)))

    def close(self):
        self.closed += 1


def test_both_styles_learn():
    model, optimizer = parts()
    recorder = Recorder()
    result = nnx.fit(
        lifted, (model, optimizer), [X, X], steps=300, context=nnx.context(noise=0), log_every=100, loggers=[recorder]
    )
    assert result.step == 300
    assert result.state[0] is model
    assert [step for step, _ in recorder.rows] == [100, 200, 300]
    assert recorder.rows[-1][1]["loss"] < recorder.rows[0][1]["loss"]
    assert result.metrics == recorder.rows[-1][1]
    assert recorder.closed == 1
    state = nnx.TrainState.from_module(parts()[0], optax.adam(1e-2))
    before = state.params
    result = nnx.fit(functional, state, [X], steps=300, log_every=300, loggers=[])
    assert result.state.step == 300
    assert result.metrics["loss"] < 0.2
    assert not np.array_equal(result.state.params["kernel"].value, before["kernel"].value)


def test_the_terminal_and_the_progress_bar(capsys):
    nnx.fit(functional, nnx.TrainState.from_module(parts()[0], optax.sgd(0.1)), [X], steps=4, log_every=2)
    out, err = capsys.readouterr()
    assert [line.split("  ")[0] for line in out.splitlines()] == ["step 2", "step 4"]
    assert err == ""  # no bar where there is no terminal
    state = nnx.TrainState.from_module(parts()[0], optax.sgd(0.1))
    nnx.fit(functional, state, [X], steps=4, log_every=2, loggers=[], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "4/4" in err
    assert "loss=" in err


def test_evaluation():
    recorder = Recorder()
    state = nnx.TrainState.from_module(parts()[0], optax.sgd(0.1))
    result = nnx.fit(
        functional,
        state,
        [X],
        steps=7,
        log_every=100,
        loggers=[recorder],
        evaluate=lambda state: {"steps": state.step},
        evaluate_every=3,
    )
    assert [(step, row["steps"]) for step, row in recorder.rows if "steps" in row] == [(3, 3.0), (6, 6.0), (7, 7.0)]
    assert set(result.metrics) == {"loss", "steps"}


def train(folder, steps, loggers=(), step_fn=lifted, **options):
    model, optimizer = parts()
    ctx, data = nnx.context(noise=0), Batches()
    with nnx.Checkpointer(folder, save_every=4, keep_last=None) as checkpointer:
        result = nnx.fit(
            step_fn,
            (model, optimizer),
            data,
            steps=steps,
            context=ctx,
            checkpointer=checkpointer,
            log_every=1,
            loggers=list(loggers),
            **options,
        )
        return result, checkpointer.steps, data


def test_the_same_command_again_goes_on_exactly(tmp_path):
    whole, _, _ = train(tmp_path / "whole", 20, [nnx.JSONLinesLogger(tmp_path / "whole.jsonl")])
    loggers = nnx.JSONLinesLogger(tmp_path / "log.jsonl"), nnx.CSVLogger(tmp_path / "log.csv")
    # As after a kill before the first save.
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 99.0}\n{"st')
    first, steps, _ = train(tmp_path / "run", 10, loggers)
    assert (first.step, steps) == (10, (4, 8, 10))
    # As after a kill: lines were written that no checkpoint knows of, the last of them cut short.
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 99.0}\n{"step": 12, "lo')
    with (tmp_path / "log.csv").open("a") as file:
        file.write("11,99.0\n12,")
    second, steps, data = train(tmp_path / "run", 20, loggers)
    assert (second.step, steps, data.at) == (20, (4, 8, 10, 12, 16, 20), 20)
    assert second.metrics == whole.metrics
    np.testing.assert_array_equal(second.state[0].kernel, whole.state[0].kernel)
    assert (tmp_path / "log.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(int(row["step"]), float(row["loss"])) for row in rows] == [(row["step"], row["loss"]) for row in lines]
    again, _, _ = train(tmp_path / "run", 20)
    assert again.step == 20


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_returns(tmp_path, which):
    before = signal.getsignal(which)

    def step(state, batch, ctx):
        metrics = lifted(state, batch, ctx)
        if int(state[1].step) == 6:
            os.kill(os.getpid(), which)
        return metrics

    result, steps, _ = train(tmp_path, 20, step_fn=step)
    assert (result.step, result.signal, steps) == (6, which, (4, 6))
    assert signal.getsignal(which) is before
    result, _, _ = train(tmp_path, 8)
    assert (result.step, result.signal) == (8, None)


def test_numbers_that_go_bad(tmp_path):
    def step(state, batch, ctx):
        metrics = lifted(state, batch, ctx)
        if int(state[1].step) == 6:
            state[0].bias = state[0].bias * jnp.nan
            return {"loss": metrics["loss"] * jnp.nan}
        return metrics

    with pytest.raises(
        nnx.NonFiniteError, match="at step 6 `loss` is not finite.* 1 arrays are not: `0/bias`"
    ) as error:
        train(tmp_path / "a", 20, step_fn=step)
    assert (error.value.step, error.value.names, error.value.paths) == (6, ("loss",), ("0/bias",))
    with nnx.Checkpointer(tmp_path / "a") as checkpointer:
        assert checkpointer.steps == (4,)
    # Where nothing is logged in between, it is seen at the next save.
    model, optimizer = parts()
    with (
        nnx.Checkpointer(tmp_path / "b", save_every=7) as checkpointer,
        pytest.raises(nnx.NonFiniteError, match="at step 7"),
    ):
        nnx.fit(
            lambda state, batch, ctx: {"loss": step(state, batch, ctx)["loss"] + state[0].bias.sum()},
            (model, optimizer),
            Batches(),
            steps=20,
            context=nnx.context(noise=0),
            checkpointer=checkpointer,
            loggers=[],
        )
    result, _, _ = train(tmp_path / "c", 6, step_fn=step, check_finite=False)
    assert np.isnan(result.metrics["loss"])


@pytest.mark.skipif(LOSES_THREADS_AT_EXIT, reason="Python before 3.12.3 saves nothing in the background")
def test_a_save_that_failed_in_the_background_ends_the_next_step(tmp_path, monkeypatch):
    steps = []

    def step(state, batch, ctx):
        metrics = lifted(state, batch, ctx)
        steps.append(1)
        if len(steps) == 4:
            monkeypatch.setattr(
                checkpointer._storage, "writing", lambda *_: (_ for _ in ()).throw(OSError("no space left"))
            )
        if len(steps) == 5:  # the save after step 4 is under way
            checkpointer._writer._thread.join()
        return metrics

    with (
        nnx.Checkpointer(tmp_path, save_every=4) as checkpointer,
        pytest.raises(nnx.CheckpointError, match="failed in the background: no space left"),
    ):
        nnx.fit(step, parts(), Batches(), steps=100, context=nnx.context(noise=0), checkpointer=checkpointer)
    assert len(steps) == 5


def test_data_without_a_position_begin_anew_and_it_is_said(tmp_path):
    state = nnx.TrainState.from_module(parts()[0], TX)
    with nnx.Checkpointer(tmp_path, save_every=2) as checkpointer:
        nnx.fit(functional, state, [X, X], steps=3, checkpointer=checkpointer, loggers=[])
        with pytest.warns(nnx.CheckpointWarning, match="goes on at step 3, and the data begin anew"):
            nnx.fit(functional, state, [X, X], steps=4, checkpointer=checkpointer, loggers=[])


def test_the_best_is_that_of_the_loss(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 4.0])

    @jax.jit
    def step(state, loss):
        return state + 1, {"accuracy": state, "loss": loss}  # sorted by name

    with nnx.Checkpointer(tmp_path, save_every=1, keep_last=1, keep_best=1) as checkpointer:
        nnx.fit(step, jnp.zeros(()), losses, steps=4, checkpointer=checkpointer, loggers=[])
        assert (checkpointer.best_step, checkpointer.steps) == (2, (2, 4))


def test_it_waits_only_where_a_number_is_shown():
    """Metrics that count how often they are asked for their value, which is what waits for the device."""
    asked = []

    class Number:
        def __init__(self, step):
            self.step = step

        def __float__(self):
            asked.append(self.step)
            return 0.5

    steps = iter(range(1, 100))
    recorder = Recorder()
    nnx.fit(
        lambda state, batch: (state, {"loss": Number(next(steps))}),
        jnp.zeros(()),
        [X],
        steps=25,
        log_every=10,
        loggers=[recorder],
        progress=True,
    )
    assert asked == [10, 20, 25]
    assert [step for step, _ in recorder.rows] == [10, 20, 25]


def test_wrong_arguments():
    state = nnx.TrainState.from_module(parts()[0], optax.sgd(0.1))
    with pytest.raises(ValueError, match="fit: steps is positive, got 0"):
        nnx.fit(functional, state, [X], steps=0)
    with pytest.raises(ValueError, match="the data are empty"):
        nnx.fit(functional, state, [], steps=1, loggers=[])
    with pytest.raises(ValueError, match="an iterator that has come to its end"):
        nnx.fit(functional, state, iter([X]), steps=2, loggers=[])


def test_in_a_thread_that_gets_no_signals():
    results = []

    def work():
        state = nnx.TrainState.from_module(parts()[0], optax.sgd(0.1))
        results.append(nnx.fit(functional, state, [X], steps=2, loggers=[]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0].step == 2


def test_loggers(tmp_path, monkeypatch):
    out = io.StringIO()
    nnx.TerminalLogger(out).log(3, {"loss": 1234.5})
    assert out.getvalue() == "step 3  loss 1234\n"
    logger = nnx.JSONLinesLogger(tmp_path / "new" / "log.jsonl")
    logger.log(1, {"loss": float("nan"), "b": 2.0})
    logger.close()
    assert json.loads((tmp_path / "new" / "log.jsonl").read_text()) == {"step": 1, "loss": "nan", "b": 2.0}
    logger = nnx.CSVLogger(tmp_path / "new" / "log.csv")
    logger.log(1, {"a": 1.0})
    logger.log(2, {"b": 2.0})
    logger.log(3, {"a": 3.0})
    logger.close()
    assert (tmp_path / "new" / "log.csv").read_text() == "step,a,b\n1,1.0,\n2,,2.0\n3,3.0,\n"
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install nnx-train\[tensorboard\]"):
        nnx.TensorBoardLogger(tmp_path)


def test_files_for_tensorboard(tmp_path):
    with nnx.Checkpointer(tmp_path / "run", save_every=2) as checkpointer:
        for steps in (3, 5):
            nnx.fit(
                lifted,
                parts(),
                Batches(),
                steps=steps,
                context=nnx.context(noise=0),
                checkpointer=checkpointer,
                log_every=1,
                loggers=[nnx.TensorBoardLogger(tmp_path / "events")],
            )
    from tensorboardX.proto.event_pb2 import Event

    logged = []
    for file in sorted((tmp_path / "events").iterdir()):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            logged += [(event.step, value.tag) for value in event.summary.value]
            data = data[16 + length :]
    assert logged == [(step, "loss") for step in (1, 2, 3, 4, 5)]


def test_tensorboard_is_told_where_a_run_goes_on(tmp_path, monkeypatch):
    seen = []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None, filename_suffix=""):
            seen.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def close(self):
            seen.append("closed")

    module = type(sys)("tensorboardX")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    logger = nnx.TensorBoardLogger(tmp_path)
    logger.resume(4)
    logger.log(5, {"loss": 1.0})
    logger.close()
    assert seen == [(str(tmp_path), 5), ("loss", 1.0, 5), "closed"]
