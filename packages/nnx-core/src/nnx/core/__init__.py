"""The core of nnx: Modules, Variables, States, filters, Contexts and the lifted transforms."""

from nnx.core.__about__ import __version__
from nnx.core._containers import Dict, Sequence
from nnx.core._context import Context, ContextDef, RngStream, context
from nnx.core._dataclass import dataclass, field, node_field, param_field, static_field, var_field
from nnx.core._diff import Diff, DiffEntry, diff
from nnx.core._display import display
from nnx.core._draw import draw
from nnx.core._errors import (
    AttributeKindError,
    ContextError,
    FilterError,
    NnxError,
    PathError,
    RetraceError,
    ShapeError,
    ShardingError,
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
from nnx.core._sharding import (
    get_named_sharding,
    get_partition_spec,
    logical_axis_rules,
    logical_to_mesh,
    logical_to_mesh_sharding,
    with_logical_constraint,
    with_logical_partitioning,
)
from nnx.core._state import Schema, State
from nnx.core._summary import Summary, SummaryRow, count_parameters, tabulate
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
from nnx.core.transforms._abstract import checkify, eval_shape, make_jaxpr
from nnx.core.transforms._autodiff import grad, jvp, value_and_grad, vjp
from nnx.core.transforms._axes import PARTITION_NAME
from nnx.core.transforms._branch import cond, switch
from nnx.core.transforms._custom import custom_vjp
from nnx.core.transforms._jacobians import hessian, jacfwd, jacrev
from nnx.core.transforms._jit import jit
from nnx.core.transforms._loops import fori_loop, while_loop
from nnx.core.transforms._map import vmap
from nnx.core.transforms._remat import remat
from nnx.core.transforms._scan import Carry, scan
from nnx.core.transforms._shard import shard_map
from nnx.core.transforms._sharded_init import sharded_init
from nnx.core.transforms._stack import Remat, Scan, Stack

__all__ = [
    "All",
    "Any",
    "AttributeKindError",
    "BatchStat",
    "Cache",
    "CaptureWarning",
    "Carry",
    "Context",
    "ContextDef",
    "ContextError",
    "Dict",
    "Diff",
    "DiffEntry",
    "Filter",
    "FilterError",
    "Intermediate",
    "Module",
    "ModuleDef",
    "MutableLeaf",
    "NnxError",
    "Node",
    "Not",
    "PARTITION_NAME",
    "Param",
    "PathError",
    "PathGlob",
    "Pure",
    "PureModule",
    "Pytree",
    "Remat",
    "RetraceError",
    "RetraceWarning",
    "RngStream",
    "Scan",
    "Schema",
    "Sequence",
    "ShapeError",
    "ShardingError",
    "Stack",
    "State",
    "Static",
    "StaticError",
    "StructureError",
    "Summary",
    "SummaryRow",
    "TraceContextError",
    "TreeNode",
    "Variable",
    "VariableError",
    "VariableMetadata",
    "__version__",
    "buffers",
    "checkify",
    "cond",
    "context",
    "count_parameters",
    "custom_vjp",
    "dataclass",
    "diff",
    "display",
    "draw",
    "eval_shape",
    "explain_retraces",
    "field",
    "fori_loop",
    "get_named_sharding",
    "get_partition_spec",
    "grad",
    "hessian",
    "is_node",
    "jacfwd",
    "jacrev",
    "jit",
    "jvp",
    "logical_axis_rules",
    "logical_to_mesh",
    "logical_to_mesh_sharding",
    "make_jaxpr",
    "node_field",
    "param_field",
    "register_node_type",
    "remat",
    "scan",
    "shard_map",
    "sharded_init",
    "static_field",
    "switch",
    "tabulate",
    "to_filter",
    "value_and_grad",
    "var",
    "var_field",
    "vjp",
    "vmap",
    "while_loop",
    "with_logical_constraint",
    "with_logical_partitioning",
    "with_metadata",
]
