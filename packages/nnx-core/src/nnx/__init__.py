"""Neural networks for JAX with plain mutable Python objects: every installed nnx package under one name.

The names of `nnx.core` are here from the start. The names of `nnx.layers` and `nnx.train` resolve on first use, so that
`import nnx` imports nothing that it does not need, and so that a package that is not installed is an error only for
whoever asks for one of its names.
"""

import importlib as _importlib
import pkgutil as _pkgutil
import typing as _typing
from importlib.util import find_spec as _find_spec

from nnx import testing as testing
from nnx.core import *
from nnx.core.__about__ import __version__ as __version__

# The other distributions hold their part of this package in folders of their own wherever they are not installed side
# by side with this one: an editable install, or a second entry of sys.path.
__path__ = _pkgutil.extend_path(__path__, __name__)

# The parts of this package that come in distributions of their own, and those whose names are found here. Their modules
# are all that is known of them: which names they hold, their `__all__` says.
_DISTRIBUTIONS = {"layers": "nnx-layers", "train": "nnx-train", "examples": "nnx-examples"}
_SEARCHED = ("layers", "train")

if _typing.TYPE_CHECKING:
    from types import ModuleType as _ModuleType

    from nnx import examples as examples
    from nnx import layers as layers
    from nnx import train as train
    from nnx.layers import *
    from nnx.train import *
else:
    # Hidden from type checkers, which take a module's `__getattr__` for leave to accept any misspelt name.
    def __getattr__(name: str) -> object:
        # Every tool that looks at a module asks it for underscored names, and no `__all__` holds one: to import all
        # that is installed in order to answer would be slow, and could fail.
        if name.startswith("_"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=None)
        absent = []
        for part in [name] if name in _DISTRIBUTIONS else _SEARCHED:
            sibling = _sibling(part)
            if sibling is None:
                absent.append(_DISTRIBUTIONS[part])
            elif part == name:
                return sibling
            elif name in getattr(sibling, "__all__", ()):
                value = globals()[name] = getattr(sibling, name)
                return value
        # Without an `obj`, a traceback does not add Python's own guess to ours.
        raise AttributeError(_explain_missing(name, absent, __dir__()), name=name, obj=None)

    def __dir__() -> list[str]:
        names = {name for name in globals() if name.startswith("__") or not name.startswith("_")}
        for part in _DISTRIBUTIONS:
            if part not in _SEARCHED:
                # Only its own name belongs here, and for that it need not be imported.
                names.update([part] if _find_spec(f"{__name__}.{part}") else [])
            elif (sibling := _sibling(part)) is not None:
                names.update([part, *getattr(sibling, "__all__", ())])
        return sorted(names)


def _sibling(part: str) -> "_ModuleType | None":
    """The module `nnx.<part>`, or None where its distribution is not installed."""
    module_name = f"{__name__}.{part}"
    try:
        module = _importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only its own absence is an answer; what an installed sibling fails to import is that sibling's error.
        if error.name != module_name:
            raise
        return None
    # A folder that an uninstall left behind imports as an empty namespace package, which has no file.
    return None if module.__file__ is None else module


def _explain_missing(name: str, absent: list[str], known: list[str]) -> str:
    import difflib

    message = f"module {__name__!r} has no attribute {name!r}"
    if absent:
        message += f": {absent[0]} is not installed (pip install {absent[0]})"
        message += "".join(f"; nor is {other} (pip install {other})" for other in absent[1:])
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        message += f". Did you mean {near[0]!r}?"
    return message
