"""The core of nnx: Modules, Variables, States, filters, Contexts and the lifted transforms."""

from nnx.core.__about__ import __version__
from nnx.core._containers import Dict, Sequence
from nnx.core._context import Context, ContextDef, RngStream, context
from nnx.core._dataclass import dataclass, field, node_field, param_field, static_field, var_field
from nnx.core._errors import (
    AttributeKindError,
    ContextError,
    FilterError,
    NnxError,
    PathError,
    RetraceError,
    ShapeError,
    StaticError,
    StructureError,
    TraceContextError,
    VariableError,
)
from nnx.core._explain import CaptureWarning, RetraceWarning, explain_retraces
from nnx.core._filters import All, Filter, Not, PathGlob, buffers, to_filter
from nnx.core._filters import Any_ as Any
from nnx.core._graph import ModuleDef
from nnx.core._module import Module, MutableLeaf
from nnx.core._nodes import is_node, register_node_type
from nnx.core._pure import Pure, PureModule
from nnx.core._pytree import Pytree, TreeNode
from nnx.core._state import Schema, State
from nnx.core._variable import (
    BatchStat,
    Cache,
    Intermediate,
    Node,
    Param,
    Static,
    Variable,
    VariableMetadata,
    var,
    with_metadata,
)
from nnx.core.transforms._autodiff import grad, value_and_grad
from nnx.core.transforms._jit import jit

__all__ = [
    "All",
    "Any",
    "AttributeKindError",
    "BatchStat",
    "Cache",
    "CaptureWarning",
    "Context",
    "ContextDef",
    "ContextError",
    "Dict",
    "Filter",
    "FilterError",
    "Intermediate",
    "Module",
    "ModuleDef",
    "MutableLeaf",
    "NnxError",
    "Node",
    "Not",
    "Param",
    "PathError",
    "PathGlob",
    "Pure",
    "PureModule",
    "Pytree",
    "RetraceError",
    "RetraceWarning",
    "RngStream",
    "Schema",
    "Sequence",
    "ShapeError",
    "State",
    "Static",
    "StaticError",
    "StructureError",
    "TraceContextError",
    "TreeNode",
    "Variable",
    "VariableError",
    "VariableMetadata",
    "__version__",
    "buffers",
    "context",
    "dataclass",
    "explain_retraces",
    "field",
    "grad",
    "is_node",
    "jit",
    "node_field",
    "param_field",
    "register_node_type",
    "static_field",
    "to_filter",
    "value_and_grad",
    "var",
    "var_field",
    "with_metadata",
]
