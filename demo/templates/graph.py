"""Workflow files as the canvas saves them: nodes by their slots, laid out in columns from left to right."""

from __future__ import annotations

import math
import textwrap
import uuid
from dataclasses import dataclass, field

# Of LiteGraph, as drawn by the hosts' canvases: a row of slots, a row of widgets, a node's title, pixels.
SLOT, WIDGET, TITLE = 20, 24, 30
GAP, MARGIN, HEADER = 26, 16, 36
# Below a node that shows a strip after a run.
STRIP = 130
NOTE, NOTE_LINE, LETTER = "MarkdownNote", 14, 6.0
OURS, OTHERS = "#3a8fd9", "#8a94a6"


@dataclass(frozen=True, slots=True)
class Kind:
    """A node type: its slots as "name:TYPE", how many widgets it has, how many of them newer canvases fold."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    widgets: int = 0
    folded: int = 0
    strip: bool = False


def _kind(inputs: str, outputs: str, widgets: int = 0, folded: int = 0, strip: bool = False) -> Kind:
    return Kind(tuple(inputs.split()), tuple(outputs.split()), widgets, folded, strip)


_SAMPLED = "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT"
KINDS = {
    NOTE: _kind("", "", 1),
    "BasicScheduler": _kind("model:MODEL", "SIGMAS", 3),
    "CLIPLoader": _kind("", "CLIP", 3),
    "CLIPTextEncode": _kind("clip:CLIP", "CONDITIONING", 1),
    "CheckpointLoaderSimple": _kind("", "MODEL CLIP VAE", 1),
    "ConditioningZeroOut": _kind("conditioning:CONDITIONING", "CONDITIONING"),
    "ControlNetApplyAdvanced": _kind(
        "positive:CONDITIONING negative:CONDITIONING control_net:CONTROL_NET image:IMAGE vae:VAE",
        "positive:CONDITIONING negative:CONDITIONING", 3,
    ),
    "ControlNetLoader": _kind("", "CONTROL_NET", 1),
    "DifferentialDiffusion": _kind("model:MODEL", "MODEL", 1),
    "DualCLIPLoader": _kind("", "CLIP", 4),
    "EmptyHunyuanLatentVideo": _kind("", "LATENT", 4),
    "EmptyLatentImage": _kind("", "LATENT", 3),
    "EmptySD3LatentImage": _kind("", "LATENT", 3),
    "FluxGuidance": _kind("conditioning:CONDITIONING", "CONDITIONING", 1),
    "InpaintModelConditioning": _kind(
        "positive:CONDITIONING negative:CONDITIONING vae:VAE pixels:IMAGE mask:MASK",
        "positive:CONDITIONING negative:CONDITIONING latent:LATENT", 1,
    ),
    "KSampler": _kind(_SAMPLED, "LATENT", 7),
    "KSamplerAdvanced": _kind(_SAMPLED, "LATENT", 10),
    "KSamplerSelect": _kind("", "SAMPLER", 1),
    "LoadImage": _kind("", "IMAGE MASK", 2),
    "LoraLoader": _kind("model:MODEL clip:CLIP", "MODEL CLIP", 3),
    "ModelSamplingAuraFlow": _kind("model:MODEL", "MODEL", 1),
    "ModelSamplingSD3": _kind("model:MODEL", "MODEL", 1),
    "PreviewImage": _kind("images:IMAGE", ""),
    "SaveAnimatedWEBP": _kind("images:IMAGE", "", 5),
    "SaveImage": _kind("images:IMAGE", "", 1),
    "SlipstreamCacheLoader": _kind("model:MODEL", "MODEL", 13, 11, True),
    "SlipstreamCalibrate": _kind(
        "model:MODEL positive:CONDITIONING negative:CONDITIONING sampler:SAMPLER sigmas:SIGMAS latent_image:LATENT "
        "positive_2:CONDITIONING positive_3:CONDITIONING positive_4:CONDITIONING",
        "profile:STRING summary:STRING frontier:IMAGE sigmas:SIGMAS", 12, 5,
    ),
    "SlipstreamHybridSwitch": _kind(
        "model_a:MODEL model_b:MODEL positive_b:CONDITIONING negative_b:CONDITIONING", "MODEL", 5, 1, True
    ),
    "SlipstreamSaveModel": _kind("model:MODEL after:LATENT", "file:STRING", 1),
    "SlipstreamTaylorPredictor": _kind("model:MODEL", "MODEL", 3, 1, True),
    "SlipstreamW4A4Quantize": _kind("model:MODEL", "MODEL", 8, 4, True),
    "UNETLoader": _kind("", "MODEL", 2),
    "VAEDecode": _kind("samples:LATENT vae:VAE", "IMAGE"),
    "VAELoader": _kind("", "VAE", 1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class File:
    """A model file: folder below models, and where the host's own templates take it from."""

    folder: str
    name: str
    url: str

    @classmethod
    def at(cls, folder: str, repository: str, path: str) -> File:
        return cls(folder, path.rsplit("/")[-1], f"https://huggingface.co/{repository}/resolve/main/{path}")


@dataclass(eq=False, slots=True)
class Node:
    """One node. files: of its widgets; room: lines of a text or pixels of a picture, beyond what its widgets need."""

    kind: str
    values: list
    inputs: dict[str, tuple[Node, int]] = field(default_factory=dict)
    title: str = ""
    files: tuple[File, ...] = ()
    room: int = 0
    id: int = 0
    place: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __getitem__(self, output: int) -> tuple[Node, int]:
        return self, output

    @property
    def height(self) -> int:
        """Pixels without the title, all widgets unfolded."""
        kind = KINDS[self.kind]
        slots = max(len(kind.inputs), len(kind.outputs))
        return SLOT * slots + WIDGET * kind.widgets + (14 if kind.widgets else 6) + self.room


Group = tuple[str, list[Node]]


class Graph:
    """A workflow. Nodes are numbered in the order in which they were added."""

    def __init__(self, name: str):
        self.name = name
        self.nodes: list[Node] = []
        self.groups: list[dict] = []

    def add(self, kind: str, *values, title: str = "", room: int = 0, **inputs) -> Node:
        """A node whose widgets have these values; a File stands for its name. Inputs are nodes, or node[output]."""
        files = tuple(value for value in values if isinstance(value, File))
        plain = [value.name if isinstance(value, File) else value for value in values]
        sources = {name: source if isinstance(source, tuple) else source[0] for name, source in inputs.items()}
        node = Node(kind, plain, sources, title, files, room)
        self.nodes.append(node)
        node.id = len(self.nodes)
        return node

    def note(self, title: str, *, expect: str, turn: str) -> Node:
        """What an artist should know; the files are listed by themselves. Add it last."""
        lines = [f"## {title}"]
        for folder in dict.fromkeys(file.folder for node in self.nodes for file in node.files):
            files = {file.name: file for node in self.nodes for file in node.files if file.folder == folder}
            lines.append(f"**models/{folder}**  ")
            lines += [f"[{file.name}]({file.url})  " for file in files.values()]
        lines += ["", f"**Expect.** {expect}", "", f"**Turn.** {turn}"]
        return self.add(NOTE, "\n".join(lines), title="Read me")

    def lay_out(self, *columns: tuple[int, list[Group]]) -> dict:
        """The file, with columns of (width, groups); a last node that is a note or saves a picture takes what is left
        of the height, and so does every column's last group."""
        heights = [sum(_group_height(nodes, width) for _, nodes in groups) for width, groups in columns]
        total, x = max(h + GAP * (len(c[1]) - 1) for h, c in zip(heights, columns, strict=True)), 0
        for width, groups in columns:
            y = 0
            for place, (title, nodes) in enumerate(groups):
                end = total if place == len(groups) - 1 else y + _group_height(nodes, width)
                self._stack(nodes, x + MARGIN, y + HEADER, width, end - MARGIN)
                ours = any(node.kind.startswith("Slipstream") for node in nodes)
                box = [x, y, width + 2 * MARGIN, end - y]
                number = len(self.groups) + 1
                self.groups.append(
                    dict(id=number, title=title, bounding=box, color=OURS if ours else OTHERS, font_size=22, flags={})
                )
                y = end + GAP
            x += width + 2 * MARGIN + GAP
        return self._saved()

    def _stack(self, nodes: list[Node], x: int, y: int, width: int, end: int) -> None:
        for node in nodes:
            height = _height(node, width)
            if node is nodes[-1] and node.kind in (NOTE, "SaveImage", "SaveAnimatedWEBP", "CLIPTextEncode"):
                height = max(height, end - y - TITLE)
            node.place = (x, y + TITLE, width, height - folded_pixels(node.kind))
            y += TITLE + height + (STRIP if KINDS[node.kind].strip else GAP)

    def _saved(self) -> dict:
        links, outgoing = [], {}
        for node in self.nodes:
            for slot, (name, kind) in enumerate(map(_slot, KINDS[node.kind].inputs)):
                if name in node.inputs:
                    source, output = node.inputs[name]
                    links.append([len(links) + 1, source.id, output, node.id, slot, kind])
                    outgoing.setdefault((source.id, output), []).append(len(links))
        into = {(link[3], link[4]): link[0] for link in links}
        return dict(
            id=str(uuid.uuid5(uuid.NAMESPACE_URL, f"slipstream/workflows/{self.name}")), revision=0,
            last_node_id=len(self.nodes), last_link_id=len(links),
            nodes=[_node(node, order, into, outgoing) for order, node in enumerate(self.nodes)],
            links=links, groups=self.groups, config={}, extra={}, version=0.4,
        )  # fmt: skip


def folded_pixels(kind: str) -> int:
    """By how much a node is lower on canvases that fold advanced widgets behind a button; others unfold it."""
    folded = KINDS[kind].folded
    return WIDGET * (folded - 1) if folded else 0


def _slot(text: str) -> tuple[str, str]:
    name, _, kind = text.rpartition(":")
    return name or kind, kind


def _height(node: Node, width: int) -> int:
    if node.kind != NOTE:
        return node.height
    letters = width / LETTER
    lines = sum(math.ceil(max(1, len(_shown(line)) / letters)) for line in node.values[0].splitlines())
    return 70 + NOTE_LINE * lines


def _shown(line: str) -> str:
    """A line of Markdown as it is read: links without their address."""
    return line.split("](")[0] if line.startswith("[") else textwrap.dedent(line)


def _group_height(nodes: list[Node], width: int) -> int:
    gaps = sum(STRIP if KINDS[node.kind].strip else GAP for node in nodes) - GAP
    if not KINDS[nodes[-1].kind].strip:
        gaps += MARGIN
    return HEADER + sum(TITLE + _height(node, width) for node in nodes) + gaps + GAP - MARGIN


def _node(node: Node, order: int, into: dict, outgoing: dict) -> dict:
    kind = KINDS[node.kind]
    properties: dict = {"Node name for S&R": node.kind}
    if node.files:
        properties["models"] = [dict(name=f.name, url=f.url, directory=f.folder) for f in node.files]
    x, y, width, height = node.place
    saved = dict(
        id=node.id, type=node.kind, pos=[x, y], size=[width, height], flags={}, order=order, mode=0,
        inputs=[
            dict(name=name, type=wire, link=into.get((node.id, slot)))
            for slot, (name, wire) in enumerate(map(_slot, kind.inputs))
        ],
        outputs=[
            dict(name=name, type=wire, links=outgoing.get((node.id, slot), []))
            for slot, (name, wire) in enumerate(map(_slot, kind.outputs))
        ],
        properties=properties, widgets_values=node.values,
    )  # fmt: skip
    if node.title:
        saved["title"] = node.title
    if node.kind == NOTE:
        saved |= dict(color="#432", bgcolor="#000")
    return saved
