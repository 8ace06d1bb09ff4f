"""The demonstration: a small trained model, the real host, one page of results.

The folder is also a node pack of its own (for `python dev.py serve`, the demo and the tests), so that the small model
can be drawn with on the canvas; it is not shipped with Slipstream.
"""

__all__ = ["comfy_entrypoint"]


async def comfy_entrypoint():
    """Called by the host when this folder is installed beside the pack."""
    from .nodes import DemoExtension

    return DemoExtension()
