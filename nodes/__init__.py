"""The canvas: one file per node, each a schema and a call into `host`; a file with a node in it is found by itself."""

from __future__ import annotations

import importlib
import logging
import pkgutil

from comfy_api.latest import ComfyExtension, io

from . import values

log = logging.getLogger("slipstream")


class SlipstreamExtension(ComfyExtension):
    """What the host asks for the list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        try:
            importlib.import_module("..host.profiles.embedding", __name__).register()
        except Exception:
            log.exception("Slipstream: profiles are not embedded in workflows on this host")
        nodes = []
        for module in sorted(found.name for found in pkgutil.iter_modules(__path__)):
            # One file that does not import must not take the others with it.
            try:
                names = vars(importlib.import_module(f".{module}", __name__))
                nodes += [values.guarded(node) for node in names.values() if _is_node(node, names["__name__"])]
            except Exception:
                log.exception("Slipstream: the node file nodes/%s.py does not load on this host", module)
        return nodes


def _is_node(value: object, module: str) -> bool:
    """Whether this is a node that the module itself defines."""
    return isinstance(value, type) and issubclass(value, io.ComfyNode) and value.__module__ == module
