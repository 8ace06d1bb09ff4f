"""The table of hazards in docs/compatibility.md: no cell is left open, and it says what ran."""

from __future__ import annotations

import re
from pathlib import Path

import matrix
import pytest
from hazards.guards import FAMILY_TESTS, FILES, TESTS
from hazards.not_applicable import REASONS
from hazards.rows import NODES, ROWS, nodes_of, rows_of

TESTS_FOLDER = Path(matrix.__file__).parent


@pytest.fixture(scope="module")
def written():
    return matrix.written()


def test_every_hazard_on_every_node_is_tested_or_has_a_reason(written):
    """A new hazard or node adds cells: write a test, or a reason in `hazards/not_applicable.py`."""
    covered = {cell for cells in written.values() for cell in cells} | set(matrix.reasons())
    assert not [f"{row} {node}" for row in ROWS for node in NODES if (row, node) not in covered]


def test_the_tables_name_tests_and_files_that_there_are(written):
    assert not [name for name in (*TESTS, *FAMILY_TESTS) if name not in written]
    assert not [file for file in FILES if not (TESTS_FOLDER / file).is_file()]


def test_every_test_that_has_a_hazard_in_its_name_is_counted(written):
    """If this fails: give the test's file a line in FILES of `hazards/guards.py`."""
    named = [name for name, cells in written.items() if re.search(r"::test_(\w+_)?h\d\d(_|$)", name) and not cells]
    assert not named


def test_reasons_are_sentences_and_each_is_needed(written):
    guarded = {cell for cells in written.values() for cell in cells}
    first = matrix.reasons()
    for rows, nodes, text in REASONS:
        assert text.endswith(".") and len(text) > 15 and "\n" not in text
        cells = {(row, node) for row in rows_of(rows) for node in nodes_of(nodes)}
        assert any(first[cell] == text and cell not in guarded for cell in cells), text


def test_names_and_ranges_of_hazards():
    assert matrix.named("test_h04_h05_a_cancelled_run") == ("H04", "H05")
    assert matrix.named("test_h12_to_h15_profiles") == ("H12", "H13", "H14", "H15")
    assert matrix.named("test_a_h2_o") == matrix.named("test_hello") == ()
    assert rows_of("H17-H20 H79") == ("H17", "H18", "H20", "H79")
    for wrong in ("H19", "H01-H99"):
        with pytest.raises(KeyError):
            rows_of(wrong)


def entry(outcome: str, *guards: str, **more) -> dict:
    return {"outcome": outcome, "properties": [["guards", list(guards)], *([k, v] for k, v in more.items())]}


def test_the_page_counts_what_ran_and_keeps_what_others_wrote(tmp_path):
    found = {
        "a": entry("passed", "H01 cache", "H20 cache", stack="all of it"),
        "b": entry("passed", "H01 cache"),
        "c": entry("failed", "H02 cache", "H20 switch", stack="all of it"),
        "d": entry("skipped", "H03 cache"),
        "e": {"outcome": "passed", "properties": [["family", ["flux", ""]], ["sites", ["model output", "last block"]]]},
        "f": {"outcome": "skipped", "properties": [["family", ["flux", "4 bit"]]]},
    }
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- hosts -->\nkept\n<!-- /hosts -->\n", encoding="utf-8")
    for _ in range(2):
        matrix.replace_section(page, "hazards", matrix.section(found))
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- hazards -->") == 1 and "\nkept\n<!-- /hosts -->" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    first, last = {}, {}
    for name, *values in rows:
        first.setdefault(name, values)
        last[name] = values
    assert first[f"H01 {ROWS['H01']}"][0] == "2" and first[f"H02 {ROWS['H02']}"][0] == "**1 failed**"
    assert first[f"H03 {ROWS['H03']}"][0] == "skipped" and first[f"H04 {ROWS['H04']}"][0] == "not run"
    assert last[f"H20 {ROWS['H20']}"] == ["**1 failed**"]  # of the nodes together
    assert last["flux"] == ["pass", "pass", "–"]
    assert re.search(r"\(a\) \|", text) and "\n- (a) " in text
    assert "2 tests passed, 1 failed, 1 skipped" in text
    assert list(tmp_path.iterdir()) == [page]
