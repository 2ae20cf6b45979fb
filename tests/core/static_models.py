"""What the tests of statics hold in Modules: values of every kind, hashable and not, frozen and not."""

import dataclasses
import enum
from typing import NamedTuple

import jax.numpy as jnp

import nnx


class Holder(nnx.Module):
    """A Module with one static."""

    def __init__(self, value):
        self.value = value
        self.w = nnx.Param(jnp.float32(1))

    def method(self):
        return self.w

    def other(self):
        return -self.w


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Config:
    size: int
    names: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    size: int
    inner: object = None


class Plain:
    def __init__(self, **fields):
        self.__dict__.update(fields)


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self, a, b):
        self.a, self.b = a, b


class ByValue:
    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, ByValue) and self.value == other.value

    def __hash__(self):
        return hash(self.value)


class OnlyEqual:
    def __init__(self, value):
        self._value = (value,)

    def __eq__(self, other):
        return True

    __hash__ = None

    def __iter__(self):
        return iter(self._value)


def function(x, y=1):
    return x + y


def other_function(x, y=1):
    return x + y


def definition(value):
    return Holder(value).partition().moduledef
