"""Workflow files as the canvas saves them, turned into what the host's /prompt takes, and small edits of that."""

from __future__ import annotations

import copy
import json
from pathlib import Path

BYPASSED, MUTED = 4, 2
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def load(path: Path, object_info: dict) -> dict:
    """The API prompt for a workflow file. Bypassed nodes hand their input on, muted ones and notes are left out.

    object_info: the host's /object_info, which knows the order of a node's widgets.
    """
    graph = json.loads(Path(path).read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}

    def source(link_id: int | None) -> list | None:
        if link_id is None:
            return None
        _, origin, slot, *_, kind = links[link_id]
        node = nodes[origin]
        if node.get("mode") == BYPASSED:
            through = next((i for i in node.get("inputs", []) if i["type"] == kind), None)
            return source(through.get("link")) if through else None
        return [str(origin), slot]

    prompt = {}
    for node in graph["nodes"]:
        if node["type"] not in object_info:
            if node["type"] in ("Note", "MarkdownNote"):
                continue
            raise ValueError(f"{path}: the host has no node '{node['type']}'")
        if node.get("mode") in (BYPASSED, MUTED):
            continue
        inputs = dict(widgets(node, object_info[node["type"]]))
        for item in node.get("inputs", []):
            linked = source(item.get("link"))
            if linked is not None:
                inputs[item["name"]] = linked
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def widgets(node: dict, info: dict) -> list[tuple[str, object]]:
    """(name, value) of a node's widgets; a seed is followed by the canvas's own `control_after_generate` value."""
    values = iter(node.get("widgets_values", []))
    found = []
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            if not (isinstance(kind, list) or kind in WIDGET_TYPES) or options.get("forceInput"):
                continue
            value = next(values, None)
            if value is not None:
                found.append((name, value))
            if options.get("control_after_generate"):
                next(values, None)
    return found


def first(prompt: dict, class_type: str) -> str:
    """The id of the first node of this type."""
    return next(key for key, node in prompt.items() if node["class_type"] == class_type)


def change(prompt: dict, class_type: str, **inputs) -> dict:
    """A copy with these inputs of the first node of that type set."""
    prompt = copy.deepcopy(prompt)
    prompt[first(prompt, class_type)]["inputs"].update(inputs)
    return prompt


def bypass(prompt: dict, class_type: str) -> dict:
    """A copy without that node: what came in as its model goes to whoever took its model."""
    prompt = copy.deepcopy(prompt)
    key = first(prompt, class_type)
    model = prompt.pop(key)["inputs"]["model"]
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if value == [key, 0]:
                node["inputs"][name] = model
    return prompt


def insert(prompt: dict, before: str, class_type: str, **inputs) -> dict:
    """A copy with a new node on the model wire in front of the first node of type `before`."""
    prompt = copy.deepcopy(prompt)
    target = prompt[first(prompt, before)]["inputs"]
    key = str(max(int(k) for k in prompt) + 1)
    prompt[key] = {"class_type": class_type, "inputs": {"model": target["model"], **inputs}}
    target["model"] = [key, 0]
    return prompt
