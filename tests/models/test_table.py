"""The table of kr2cache/models/README.md says what tests/models/table.py finds."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import NAMES
from table import FAULT, YES, Row, markdown, parsed, row_of

PAGE = parsed((Path(__file__).parents[2] / "kr2cache" / "models" / "README.md").read_text("utf-8"))
SOME = (
    "albert",
    "bart",
    "canine",
    "clip",
    "convbert",
    "deberta-v2",
    "fnet",
    "funnel",
    "gpt2",
    "modernbert",
    "roformer",
    "vit",
)
"""Of each kind, for every run of the tests."""


@pytest.mark.parametrize("name", SOME)
def test_the_page_says_what_an_architecture_can_serve_as(name: str, tmp_path: Path) -> None:
    assert row_of(name, tmp_path) == PAGE[name]


def test_the_page_is_printed_as_it_is() -> None:
    """Each architecture stands in one line, and lines are in the order of the script."""
    page = (Path(__file__).parents[2] / "kr2cache" / "models" / "README.md").read_text("utf-8")
    assert markdown(PAGE) in page


def verdicts(row: Row | None) -> list[bool]:
    """What works. The reasons stay out: with routed experts, they differ from one kind of CPU to another."""
    return [] if row is None else [cell == YES for cell in row]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # of tiny models that read pictures
@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_right_about_every_architecture(name: str, tmp_path: Path) -> None:
    row = row_of(name, tmp_path)
    assert not any(FAULT in cell for cell in row), row
    assert verdicts(row) == verdicts(PAGE.get(name)), f"{row}: python tests/models/table.py prints the table anew"
