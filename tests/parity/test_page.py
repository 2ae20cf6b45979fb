"""The page of what is compared is that of the tables, and notices when it is not."""

from tests.parity import page
from tests.parity.cases import Case
from tests.parity.tables import EQUINOX, FLAX, TORCH


def test_the_page_is_up_to_date():
    assert page.main(["--check"]) == 0, "docs/parity.md is out of date: run `hatch run parity:page`"


def test_a_new_case_makes_it_out_of_date(monkeypatch):
    monkeypatch.setattr(page, "FLAX", [*FLAX, Case("Linear", (2, 9), {}, ((3, 2),))])
    assert page.main(["--check"]) == 1


def test_it_is_written_where_it_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PAGE", tmp_path / "parity.md")
    assert page.main(["--check"]) == 1
    assert page.main([]) == 0
    assert page.main(["--check"]) == 0
    assert f"{len(FLAX) + len(TORCH) + len(EQUINOX):,} fixed cases" in page.PAGE.read_text()


def test_there_are_three_hundred_cases_and_more():
    assert len({str(case) for case in FLAX}) >= 300
