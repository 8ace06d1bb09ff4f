"""ComfyUI-Slipstream: caching, prediction and quantised kernels in the sampling loop, with the error measured."""

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint():
    """Called by the host; nothing is imported before, so a host that never calls it pays nothing."""
    from .nodes import SlipstreamExtension

    return SlipstreamExtension()
