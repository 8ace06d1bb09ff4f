"""A pytest plugin: which hazard on which node a test guards, and a page that is written from what really ran.

    pytest --matrix docs/compatibility.md [--matrix-outcomes FILE]

A test guards what its name says (`test_h08_h09_...`) on the nodes that `hazards/guards.py` gives for its file, or what
that file says of the test, or its marker: `@pytest.mark.guards("H20-H24", nodes="cache switch")`. A parameter that has
`rows` or `nodes` narrows it, unless the marker has `always=True`. Of the page only what stands between
`<!-- hazards -->` and `<!-- /hazards -->` is replaced. FILE keeps outcomes from run to run, so that several runs make
one page.
"""

from __future__ import annotations

import ast
import datetime
import functools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from hazards.guards import FAMILY_TESTS, FILES, TESTS
from hazards.not_applicable import REASONS
from hazards.rows import GROUPS, NODES, ROWS, nodes_of, rows_of

TESTS_FOLDER = Path(__file__).parent
GUARDS, STACK, SITES, FAMILY = "guards", "stack", "sites", "family"
Cell = tuple[str, str]


# What a test guards


def declared(file: str, name: str, marks: Iterable[tuple[str, str]] = ()) -> set[Cell]:
    """The cells of a test function. file: below tests/; marks: (rows, nodes) of its markers."""
    cells = {(row, node) for rows, nodes in marks for row in rows_of(rows) for node in nodes_of(nodes)}
    own = TESTS.get(f"{file}::{name}")
    if own is not None:
        rows, nodes = own
        cells |= {(row, node) for row in rows_of(rows) for node in nodes_of(nodes)}
    elif file in FILES:
        cells |= {(row, node) for row in named(name) for node in nodes_of(FILES[file])}
    return cells


def named(name: str) -> tuple[str, ...]:
    """`test_h04_h07_to_h09_...` -> H04, H07, H08, H09."""
    found = re.match(r"test((?:_to)?_h\d\d)+(?=_|$)", name)
    text = found[0].removeprefix("test_") if found else ""
    return rows_of(re.sub(r"(h\d\d)_to_(h\d\d)", r"\1-\2", text).replace("_", " ").upper())


@functools.cache
def written() -> dict[str, set[Cell]]:
    """Every test function of the project that guards something, read from the files and not imported."""
    found = {}
    for path in sorted(TESTS_FOLDER.glob("*/test_*.py")):
        file = path.relative_to(TESTS_FOLDER).as_posix()
        body = ast.parse(path.read_text(encoding="utf-8")).body
        names = {n.targets[0].id: n.value.value for n in body if isinstance(n, ast.Assign) and _is_text(n)}
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                marks = [mark for decorator in node.decorator_list if (mark := _mark(decorator, names))]
                found[f"{file}::{node.name}"] = declared(file, node.name, marks)
    return found


def _is_text(node: ast.Assign) -> bool:
    return isinstance(node.targets[0], ast.Name) and isinstance(getattr(node.value, "value", None), str)


def _mark(decorator: ast.expr, names: Mapping[str, str]) -> tuple[str, str] | None:
    """(rows, nodes) of a guards marker; names: the texts that the file has given names."""
    if not isinstance(decorator, ast.Call) or not ast.unparse(decorator.func).endswith("mark.guards"):
        return None
    given = (decorator.args[0], decorator.keywords[0].value)
    return tuple(names[n.id] if isinstance(n, ast.Name) else n.value for n in given)


def of_item(item: pytest.Item) -> set[Cell]:
    """The cells of a collected test, narrowed by its parameters."""
    file = Path(str(item.path)).relative_to(TESTS_FOLDER).as_posix()
    found = list(item.iter_markers("guards"))
    marks = [(mark.args[0], mark.kwargs["nodes"]) for mark in found if not mark.kwargs.get("always")]
    always = [(mark.args[0], mark.kwargs["nodes"]) for mark in found if mark.kwargs.get("always")]
    cells = declared(file, getattr(item, "originalname", item.name), marks)
    for value in _parameters(item):
        if isinstance(rows := getattr(value, "rows", None), str):
            cells = {cell for cell in cells if cell[0] in rows_of(rows)}
        if isinstance(nodes := getattr(value, "nodes", None), str):
            cells = {cell for cell in cells if cell[1] in nodes_of(nodes)}
    return cells | {(row, node) for rows, nodes in always for row in rows_of(rows) for node in nodes_of(nodes)}


def _parameters(item: pytest.Item) -> list:
    spec = getattr(item, "callspec", None)
    return [] if spec is None else list(spec.params.values())


def reasons() -> dict[Cell, str]:
    """Why a cell needs no test; of several the first."""
    found: dict[Cell, str] = {}
    for rows, nodes, text in REASONS:
        for row in rows_of(rows):
            for node in nodes_of(nodes):
                found.setdefault((row, node), text)
    return found


# The plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("matrix")
    group.addoption("--matrix", metavar="PAGE", help="write the table of hazards into this Markdown page")
    group.addoption("--matrix-outcomes", metavar="FILE", help="outcomes of earlier runs: read, and written again")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "guards(rows, nodes): the hazards that this test guards, and on which nodes")
    if not hasattr(config, "workerinput"):  # of several processes the first one writes
        config.pluginmanager.register(Outcomes(config), "slipstream-outcomes")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        cells = of_item(item)
        if cells:
            item.user_properties.append((GUARDS, sorted(f"{row} {node}" for row, node in cells)))
            item.user_properties += [(STACK, v.name) for v in _parameters(item) if hasattr(v, "in_matrix")]
        file, _, name = item.nodeid.rpartition("::")
        column = FAMILY_TESTS.get(f"{Path(file).parent.name}/{Path(file).name}::{getattr(item, 'originalname', name)}")
        if column is not None:
            item.user_properties.append((FAMILY, [item.callspec.params["name"], column]))


class Outcomes:
    """What became of every test that guards something."""

    def __init__(self, config: pytest.Config):
        self.page, self.file = config.getoption("--matrix"), config.getoption("--matrix-outcomes")
        self.found: dict[str, dict] = {}
        if self.file and Path(self.file).is_file():
            self.found = json.loads(Path(self.file).read_text(encoding="utf-8"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        kept = [[key, value] for key, value in report.user_properties if key in (GUARDS, STACK, SITES, FAMILY)]
        before = self.found.get(report.nodeid, {}).get("outcome") if report.when != "setup" else None
        if kept and before not in ("failed", "skipped"):
            self.found[report.nodeid] = {"outcome": report.outcome, "properties": kept}

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.file:
            _write(Path(self.file), json.dumps(self.found, indent=0) + "\n")
        if self.page:
            replace_section(Path(self.page), "hazards", section(self.found))
            terminalreporter.write_line(f"wrote the hazards' tables into {self.page}")


# The page


def replace_section(page: Path, name: str, text: str) -> None:
    """Put text between `<!-- name -->` and `<!-- /name -->` of a page, at its end if it has no such section."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before = page.read_text(encoding="utf-8") if page.is_file() else "# Compatibility\n"
    head, opened, rest = before.partition(begin)
    if not opened:
        head, rest = before.rstrip("\n") + "\n\n", "\n"
    else:
        rest = rest.partition(end)[2]
    _write(page, f"{head}{begin}\n{text.strip()}\n{end}{rest}")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def mark(outcomes: Mapping[str, int], wanted: bool = True) -> str:
    """`12` tests passed, or what is wrong in words."""
    if outcomes["failed"]:
        return f"**{outcomes['failed']} failed**"
    if outcomes["passed"]:
        return str(outcomes["passed"])
    return ("skipped" if outcomes["skipped"] else "not run") if wanted else ""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = [head, ["---", *[":---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def section(found: Mapping[str, Mapping]) -> str:
    """The Markdown of all tables. found: {test id: {"outcome", "properties"}}."""
    cells, stacks = defaultdict(Counter), defaultdict(Counter)
    families, columns = defaultdict(dict), []
    for entry in found.values():
        about, outcome = dict(entry["properties"]), entry["outcome"]
        for text in about.get(GUARDS, ()):
            cells[tuple(text.split())][outcome] += 1
        for row in {text.split()[0] for text in about.get(GUARDS, ())} if STACK in about else ():
            stacks[row, about[STACK]][outcome] += 1
        if FAMILY in about:
            name, column = about[FAMILY]
            for site in about.get(SITES, [column] if column else []):
                columns += [site] if site not in columns else []
                families[name][site] = outcome
    total = Counter(entry["outcome"] for entry in found.values() if GUARDS in dict(entry["properties"]))
    lines = [_about(total), *_matrix(cells), *_stacks(stacks), *_families(families, columns)]
    return "\n".join(lines)


def _about(total: Mapping[str, int]) -> str:
    try:
        from comfyui_version import __version__ as host
    except ImportError:
        host = "of the checkout"
    date = datetime.date.today().strftime("%-d %B %Y")
    rest = "".join(f", {total[name]} {name}" for name in ("failed", "skipped") if total[name])
    return f"""## What can go wrong, node by node

Each line is a situation that has broken a pack of this kind for somebody; each column is a node. A number is how many
tests of that situation on that node passed in the run that wrote this page; in most of them further nodes are on the
same wire. A letter in brackets is a reason why there is nothing to test, given below the table.

{total["passed"]} tests passed{rest}, on ComfyUI {host}, {date}. To repeat it:
`python dev.py test --all --matrix docs/compatibility.md`. Several cards (H68) need ComfyUI 0.23 or newer: on an older
one that row is skipped, and here it is from a run on 0.33.0 that shared its outcomes.
"""


def _matrix(cells: Mapping[Cell, Counter]) -> list[str]:
    guarded, why, lines = {cell for some in written().values() for cell in some}, reasons(), []
    letters: dict[str, str] = {}
    for group, titles in GROUPS.items():
        rows = []
        for row, title in titles.items():
            line = [f"{row} {title}"]
            for node in NODES:
                cell = row, node
                if cell in guarded or cell in cells:
                    line.append(mark(cells[cell]))
                elif cell in why:
                    line.append(f"({letters.setdefault(why[cell], _letter(len(letters)))})")
                else:
                    line.append("**no test**")
            rows.append(line)
        lines += [f"### {group}", "", *table(["", *NODES.values()], rows), ""]
    lines += ["Reasons:", "", *(f"- ({letter}) {text}" for text, letter in letters.items()), ""]
    return lines


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else _letter(number // 26 - 1) + _letter(number % 26)


def _stacks(stacks: Mapping[Cell, Counter]) -> list[str]:
    names = list(dict.fromkeys(name for _, name in stacks))
    rows = [[f"{row} {ROWS[row]}", *(mark(stacks[row, name], False) for name in names)]
            for row in ROWS if any((row, name) in stacks for name in names)]  # fmt: skip
    if not rows:
        return []
    words = (
        "Several nodes on one MODEL wire. Each number is of tests in which the run in this situation is repeated, "
        "cut into single evaluations, compared with a fresh one and with the same nodes without a cache, and steps "
        "were really skipped."
    )
    return ["## Nodes together", "", words, "", *table(["", *names], rows), ""]


def _families(families: Mapping[str, Mapping[str, str]], columns: list[str]) -> list[str]:
    if not families:
        return []
    signs = {"passed": "pass", "failed": "**failed**", "skipped": "–"}
    rows = [[name, *(signs[some[c]] if c in some else "–" for c in columns)] for name, some in families.items()]
    words = (
        "A tiny network of each family with random weights: off is bit-identical, what is skipped does not run, cond "
        "and uncond apart or together give the same. – : the family has no such place, or its tiny network no layer "
        "that is wide enough."
    )
    return ["## Model families", "", words, "", *table(["", *columns], rows), ""]
