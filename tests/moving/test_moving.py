"""Each row of "Moving to nnx" is held by a pair of programs: ours runs here, the peers' in `hatch run parity`."""

import jax
import pytest
from tests.moving import equinox_rows, flax_rows, flax_transform_rows, torch_rows
from tests.moving.rows import PAGE, assert_same, missing, tables

TABLES = tables(PAGE.read_text(encoding="utf-8"))
ROWS = {"flax.nnx": flax_rows.ROWS + flax_transform_rows.ROWS, "equinox": equinox_rows.ROWS, "PyTorch": torch_rows.ROWS}
EACH = [pytest.param(peer, row, id=f"{peer}-{row.__name__}") for peer, rows in ROWS.items() for row in rows]


@pytest.mark.parametrize("peer", ROWS)
def test_each_row_of_the_page_has_its_programs(peer):
    assert list(TABLES) == list(ROWS)
    assert [line.theirs for line in TABLES[peer]] == [row.line for row in ROWS[peer]]


@pytest.mark.parametrize(("peer", "row"), EACH)
def test_the_programs_hold_the_code_of_the_page(peer, row):
    (line,) = [line for line in TABLES[peer] if line.theirs == row.line]
    assert missing(line.theirs, row.theirs) == []
    assert missing(line.theirs if line.ours == "the same" else line.ours, row.ours) == []


# What each of them does is tested at both ends elsewhere.
@pytest.mark.slow
@pytest.mark.parametrize(("peer", "row"), EACH)
def test_ours_runs(peer, row):
    with jax.numpy_rank_promotion("allow"):
        assert row.ours() is not None


def test_a_row_without_programs_is_seen():
    text = PAGE.read_text(encoding="utf-8")
    added = text.replace("| `nnx.clone(model)` |", "| `nnx.new(model)` | `nnx.old(model)` | |\n| `nnx.clone(model)` |")
    assert len(tables(added)["flax.nnx"]) == len(TABLES["flax.nnx"]) + 1
    assert missing("`nnx.clone(model)` and `nnx.old(...)`", flax_rows.Clone.theirs) == ["nnx.old(...)"]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(1, 2), (1, 1.0), ([1], [1, 2]), ({"a": 1}, {"b": 1}), (jax.numpy.ones(2), jax.numpy.ones((1, 2)))],
)
def test_what_differs_is_seen(theirs, ours):
    with pytest.raises(AssertionError):
        assert_same(theirs, ours)
