"""What an artist reads: every input says what to try, in English and in Chinese, and every node has its help page.

After a change of words: `SLIPSTREAM_WRITE_WORDS=1 python dev.py test tests/host/test_words.py` writes locales/en anew.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path

import pytest
from comfy_api.latest import io
from slipstream.nodes import SlipstreamExtension

ROOT = Path(__file__).resolve().parents[2]
LOCALES, DOCS = ROOT / "locales", ROOT / "web" / "docs"
CHINESE = re.compile("[\u4e00-\u9fff]")
# Words that Chinese users write as they are.
SAME = {"cfg", "sigmas", "latent", "VAE", "GPTQ", "LoRA", "JSON"}
# To the host's translator these are places for numbers, other messages and plurals.
SYNTAX = re.compile(r"[{}@|]")
NUMBERS = (io.Int.Input, io.Float.Input)
LONGEST_PAGE = 80
LARGEST_PICTURE = 40_000


@pytest.fixture(scope="module")
def schemas() -> dict:
    nodes = asyncio.run(SlipstreamExtension().get_node_list())
    assert len(nodes) == len(json.loads((ROOT / "tests" / "unit" / "contract.json").read_text()))
    return {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in nodes)}


def locale(language: str) -> dict:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def english(schema) -> dict:
    """A node's entry in locales/en, from its schema. Choices have none: the frontend shows them as they are."""
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {i.id: {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs},
        "outputs": {
            str(n): {"name": o.display_name or o.io_type, "tooltip": o.tooltip} for n, o in enumerate(schema.outputs)
        },
    }


def texts(entry: object) -> list[str]:
    return [entry] if isinstance(entry, str) else [text for part in entry.values() for text in texts(part)]


def shape(entry: object) -> object:
    return {key: shape(value) for key, value in entry.items()} if isinstance(entry, dict) else ""


def test_every_input_says_what_to_try(schemas):
    """A sentence each, with a number where the input is one; folded where most never need it."""
    for node, schema in schemas.items():
        assert len(schema.description) > 60, node
        assert len(getattr(schema, "search_aliases", "unknown to older hosts")) >= 3, node
        for each in (*schema.inputs, *schema.outputs):
            assert each.tooltip and len(each.tooltip) >= 20, f"{node}: {each.id} has no tooltip"
        for each in schema.inputs:
            if isinstance(each, NUMBERS):
                assert re.search(r"\d", each.tooltip), f"{node}: {each.id} names no number to try"
            if "(Custom only)" in each.tooltip:
                assert getattr(each, "advanced", "unknown to older hosts"), f"{node}: {each.id} is not folded"
            if isinstance(each, io.Combo.Input) and "auto" in each.options:
                assert each.default == "auto" and "auto" in each.tooltip, f"{node}: {each.id}"


def test_english_is_what_the_nodes_say(schemas):
    path = LOCALES / "en" / "nodeDefs.json"
    said = {node: english(schema) for node, schema in schemas.items()}
    if os.environ.get("SLIPSTREAM_WRITE_WORDS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert locale("en") == said, "write locales/en anew, as the first lines of this file say"


def test_chinese_has_every_word_and_no_other(schemas):
    chinese = locale("zh")
    assert shape(chinese) == shape({node: english(schema) for node, schema in schemas.items()})
    for text in texts(chinese):
        assert CHINESE.search(text) or text in SAME, text
        assert not re.search("[\u4e00-\u9fff][,;:!?]", text), f"Latin punctuation: {text}"
    for node, schema in schemas.items():
        for each in schema.inputs:
            if isinstance(each, NUMBERS):
                assert re.search(r"\d", chinese[node]["inputs"][each.id]["tooltip"]), f"{node}: {each.id}"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_word_reads_as_the_translators_syntax(language):
    assert [text for text in texts(locale(language)) if SYNTAX.search(text)] == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_node_has_its_page(schemas, language):
    """Found as the frontend looks for it; it names every input as the canvas does, and shows the node."""
    pages = {path.stem if language == "en" else path.parent.name: path for path in pages_of(language)}
    assert pages.keys() == schemas.keys()
    for node, path in pages.items():
        page, words = path.read_text(encoding="utf-8"), locale(language)[node]
        assert page.count("\n") <= LONGEST_PAGE, f"{path} is long"
        assert page.startswith(f"# {words['display_name']}\n"), path
        for name, entry in words["inputs"].items():
            assert re.search(rf"\b{name}\b", page), f"{path} does not tell of {name}"
            assert language == "en" or entry["name"] in page, f"{path} does not tell of {entry['name']}"
        pictures = re.findall(r"!\[.+\]\((.+?)\)", page)
        assert f"images/{node}.png" in pictures, path
        for picture in pictures:  # the frontend takes both languages' links from this folder
            assert 0 < (DOCS / picture).stat().st_size <= LARGEST_PICTURE, picture


def pages_of(language: str) -> list[Path]:
    return sorted(DOCS.glob("*.md" if language == "en" else f"*/{language}.md"))


def test_no_picture_is_left_over():
    used = {picture for path in DOCS.rglob("*.md") for picture in re.findall(r"\((images/.+?)\)", path.read_text())}
    assert {f"images/{path.name}" for path in (DOCS / "images").iterdir()} == used
