"""nnx-plan: what training a model takes of each chip, by recipe and number of chips, before there are any."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nnx.core import Module, ShardingError, context
from nnx.train._plan import Plan, plan, recipe_mesh, sizes_of
from nnx.train._recipes import RECIPES, sharding_rules

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 2 if it could not be carried out."""
    parser = argparse.ArgumentParser(
        prog="nnx-plan",
        description="Memory of each chip and communication of each step, by recipe and number of chips. The model is "
        "looked at by nnx.eval_shape: it needs no chips and no memory, whatever its size.",
    )
    parser.add_argument("model", help="its class or a function that makes it, as module:name; called with a Context")
    parser.add_argument("--arguments", type=json.loads, default={}, help="further arguments by name, as JSON")
    parser.add_argument("--batch", type=int, default=0, help="sequences of a step, on all chips together")
    parser.add_argument("--length", type=int, default=0, help="tokens of a sequence")
    parser.add_argument("--chips", default="8", help="numbers of chips (default: %(default)s)")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="(default: all)")
    parser.add_argument("--tensor", type=int, default=8, help="the most chips to a layer (default: %(default)s)")
    parser.add_argument("--fsdp", type=int, help="the most chips to a copy of the parameters (default: all)")
    parser.add_argument("--optimizer", choices=["adam", "sgd", "none"], default="adam", help="(default: %(default)s)")
    parser.add_argument("--activation-dtype", default="bfloat16", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        _print(options)
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        sys.stderr.write(f"nnx-plan: {error}\n")
        return 2
    return 0


def _print(options: Any) -> None:
    make = _factory(options.model)
    tx = {"adam": optax.adam(1e-3), "sgd": optax.sgd(1e-3), "none": None}[options.optimizer]
    inputs = []
    if options.batch and options.length:
        inputs = [jax.ShapeDtypeStruct((options.batch, options.length), jnp.int32)]
    sizes = sizes_of(
        lambda: make(**options.arguments, ctx=context(0)),
        tx,
        inputs=inputs,
        activation_bytes=jnp.dtype(options.activation_dtype).itemsize,
    )
    out = sys.stdout
    out.write(f"{sizes.parameters:,} parameters, {sizes.tokens:,} tokens a step; bytes of each chip\n\n")
    out.write("| recipe | mesh | state | gradients | gathered | activations | total | sent a step |\n")
    out.write("| --- | --- | --- | --- | --- | --- | --- | --- |\n")
    for recipe in options.recipes.split(","):
        for chips in map(int, options.chips.split(",")):
            mesh = recipe_mesh(recipe, chips, tensor=options.tensor, fsdp=options.fsdp)
            shape = " ".join(f"{axis}={size}" for axis, size in mesh.items())
            rules: dict[str, Any] = sharding_rules(recipe)
            if recipe == "tensor_parallel":
                rules["batch"] = "data"
            try:
                out.write(f"| {recipe} | {shape} | {_row(plan(sizes, mesh, rules))} |\n")
            except ShardingError as error:
                out.write(f"| {recipe} | {shape} | {error} | | | | | |\n")


def _factory(text: str) -> Callable[..., Module]:
    module, _, name = text.partition(":")
    if not name:
        raise ValueError(f"give the model as module:name, such as my.models:Transformer, got {text!r}")
    found: Callable[..., Module] = getattr(importlib.import_module(module), name)
    return found


def _row(found: Plan) -> str:
    parts = (found.state, found.gradients, found.gathered, found.activations, found.total)
    sent = ", ".join(f"{axis} {_text(size)}" for axis, size in found.communication.items()) or "nothing"
    return " | ".join([*map(_text, parts), sent])


def _text(nbytes: int) -> str:
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    raise AssertionError


if __name__ == "__main__":
    sys.exit(main())
