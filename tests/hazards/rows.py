"""The hazards: situations that have broken a pack of this kind for its users, and the nodes that can meet them.

`tests/matrix.py` makes a table of them from a run of the tests. Ids are for ever: append, never renumber.
"""

from __future__ import annotations

# Column of the table -> the nodes of the canvas.
NODES: dict[str, str] = {
    "cache": "Cache Loader",
    "predictor": "Taylor Predictor",
    "calibrate": "Calibrate",
    "quantize": "W4A4 Quantize",
    "files": "Save / Load Quantized Model",
    "convert": "Quantize Model File",
    "compensator": "Error Compensator",
    "switch": "Hybrid Model Switch",
    "pruned": "Load Pruned UNet",
    "remote": "Hybrid Remote",
    "report": "Speed & Quality Report",
}

GROUPS: dict[str, dict[str, str]] = {
    "State": {
        "H01": "switched off it is the plain model, bit for bit",
        "H02": "the same seed twice gives the same picture",
        "H03": "bypassed or removed after a run: plain again, bit for bit",
        "H04": "the same after a cancelled run",
        "H05": "a cancel stops at once, and the next run is as if it had not been",
        "H06": "an error or lack of memory in the middle of a step",
        "H07": "nothing of a run is kept after it",
        "H08": "cond and uncond evaluated apart or together",
        "H09": "in either order",
        "H10": "inputs are never written to, in any precision",
        "H11": "an output edited by others does not reach what is stored",
        "H12": "another size, length or batch in the next run, or two samplers in one prompt",
        "H13": "another number of steps in the next run",
        "H14": "clones with other settings, used in turns",
        "H15": "the same MODEL queued again with another seed",
        "H16": "the node twice, or beside another step cache",
        "H17": "wrappers of other packs are still called",
        "H18": "runs inside runs, threads, two queues",
    },
    "Conditioning": {
        "H20": "cfg 1, then 3, then 1",
        "H21": "guidance that comes and goes within a run",
        "H22": "prompts that change within a run",
        "H23": "prompts for areas, of another shape each",
        "H24": "prompts for masks",
        "H25": "three prompts packed as two and one when memory is short",
        "H26": "a batch: a picture does not depend on its neighbour",
        "H27": "a negative of another length",
        "H28": "a ControlNet for a part of the run",
        "H29": "a LoRA that changes its strength within a run",
        "H30": "guidance with passes of its own (perturbed attention, skipped layers)",
        "H31": "reference latents, and fewer channels out than in",
        "H32": "several outputs at once, sound and picture",
        "H33": "context windows of long video",
    },
    "Samplers and schedules": {
        "H40": "samplers that evaluate twice in a step",
        "H41": "every scheduler and shift",
        "H42": "samplers that add noise",
        "H43": "samplers with a memory",
        "H44": "a run that starts late",
        "H45": "few steps",
        "H46": "sigmas that are in no list",
        "H47": "an inpaint mask",
        "H48": "one run in two parts, and schedules that rise again",
        "H49": "noise, velocity, flow and edm predictions",
    },
    "Numbers": {
        "H50": "forecasts are exact on polynomials, forward, on uneven steps",
        "H51": "a short or repeated history lowers the order",
        "H52": "denominators of zero",
        "H53": "half precision does not overflow",
        "H54": "a forecast beats reuse, and both beat fewer steps",
        "H55": "seconds by the clock, not by the count",
    },
    "Host": {
        "H60": "no graphics card, no triton, no optional package",
        "H61": "releases of the host",
        "H62": "arguments of newer hosts pass through untouched",
        "H63": "too little memory, partial loads, unloaded between prompts",
        "H64": "compiled before or after the node",
        "H65": "a LoRA before, after, with another strength, removed",
        "H66": "weights that are packed or in 8 bit already",
        "H67": "workflows saved by older versions",
        "H68": "clones on several cards",
        "H69": "memory that a node takes is counted, capped and shown",
    },
    "Quantised layers, switching, remote": {
        "H70": "a LoRA on a 4-bit layer, strength 0, removed",
        "H71": "saved and loaded, cloned, moved, unloaded",
        "H72": "odd widths, no or one token, strided inputs, overflow, NaN in a weight",
        "H73": "switched to its twin: bit for bit, with every sampler (without `--all`, one of each way of stepping)",
        "H74": "two clones of one checkpoint",
        "H75": "models that do not fit each other are refused by name",
        "H76": "caches on either model, switches in a chain",
        "H77": "a server that is away, slow, wrong, or answers twice",
        "H78": "files that are damaged, foreign or hostile",
        "H79": "a full disk, or the end of the process, while a file is written",
    },
    "Hosts from 0.34 on": {
        "H80": "the host records what a forward allocates and replays it (a stand-in of its recorder)",
    },
}
ROWS: dict[str, str] = {row: title for group in GROUPS.values() for row, title in group.items()}


def rows_of(text: str) -> tuple[str, ...]:
    """`H01 H04-H07` -> the ids. Raises KeyError for an id that there is not."""
    ids, found = list(ROWS), []
    for part in text.split():
        first, _, last = part.partition("-")
        known = ROWS[first], ROWS[last or first]
        assert known
        found += ids[ids.index(first) : ids.index(last or first) + 1]
    return tuple(found)


def nodes_of(text: str) -> tuple[str, ...]:
    """`cache predictor` -> the columns; `all` is every one. Raises KeyError for one that there is not."""
    if text == "all":
        return tuple(NODES)
    for name in text.split():
        NODES[name]
    return tuple(text.split())
