"""The canvas: one file per node, each a schema and a call into `host`."""

from __future__ import annotations

import importlib
import logging

from comfy_api.latest import ComfyExtension, io

from . import values

log = logging.getLogger("slipstream")

# Module -> node class. One file that fails to import must not take the others with it.
NODES = {
    "cache_loader": "CacheLoader",
    "taylor_predictor": "TaylorPredictor",
    "report": "Report",
    "calibrate": "Calibrate",
    "w4a4_quantise": "W4A4Quantise",
    "save_quantised": "SaveQuantisedModel",
    "load_quantised": "LoadQuantisedModel",
    "quantise_file": "QuantiseFile",
    "remote_segment": "RemoteSegmentNode",
    "hybrid_switch": "HybridSwitch",
    "load_pruned_unet": "LoadPrunedUNet",
    "error_compensator": "ErrorCompensator",
}


class SlipstreamExtension(ComfyExtension):
    """What the host asks for the list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        try:
            importlib.import_module("..host.profiles.embedding", __name__).register()
        except Exception:
            log.exception("Slipstream: profiles are not embedded in workflows on this host")
        nodes = []
        for module, name in NODES.items():
            try:
                node = getattr(importlib.import_module(f".{module}", __name__), name)
                node = values.guarded(node)
            except Exception:
                log.exception("Slipstream: the node file nodes/%s.py does not load on this host", module)
                continue
            nodes.append(node)
        return nodes
