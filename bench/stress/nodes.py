"""Nodes and routes that only the stress servers have: a failure on demand, and a count of what is alive.

The host loads this one file as a custom node.
"""

from __future__ import annotations

import gc
import os
import sys

import comfy.model_management
import torch
from aiohttp import web
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io

CATEGORY = "slipstream/stress"
KINDS = ("error", "memory", "cancel")


class Fail(io.ComfyNode):
    """Raises at the k-th evaluation that reaches the network."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StressFail",
            category=CATEGORY,
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("kind", options=list(KINDS)),
                io.Int.Input("at"),
                io.String.Input("words"),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, kind, at, words) -> io.NodeOutput:
        model, seen = model.clone(), [0]

        def sampling(executor, *args, **kwargs):
            seen[0] = 0
            return executor(*args, **kwargs)

        def evaluation(executor, *args, **kwargs):
            seen[0] += 1
            if seen[0] > at:
                if kind == "memory":
                    raise comfy.model_management.OOM_EXCEPTION(words)
                if kind == "error":
                    raise RuntimeError(words)
                comfy.model_management.interrupt_current_processing()
                comfy.model_management.throw_exception_if_processing_interrupted()
            return executor(*args, **kwargs)

        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "stress_fail", sampling)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "stress_fail", evaluation)
        return io.NodeOutput(model)


class Fresh(io.ComfyNode):
    """Hands a latent on; another number makes the host sample anew instead of taking its own cached result."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StressFresh",
            category=CATEGORY,
            inputs=[io.Latent.Input("samples"), io.Int.Input("number", max=2**40)],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, samples, number) -> io.NodeOutput:
        return io.NodeOutput(dict(samples))


def resident_bytes() -> int:
    """What this process occupies in RAM, as the system counts it."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import psutil

        return psutil.Process().memory_info().rss


def census() -> dict:
    """Counts after a collection: resident bytes, live tensors and their bytes (shared storage once), all objects."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [o for o in objects if issubclass(type(o), torch.Tensor)]
    storages = {}
    for tensor in tensors:
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            try:
                storages[storage.data_ptr()] = storage.nbytes()
            except RuntimeError:  # the compiler's stand-ins have no memory
                continue
    found = {
        "resident_bytes": resident_bytes(),
        "tensors": len(tensors),
        "tensor_bytes": sum(storages.values()),
        "objects": len(objects),
    }
    if torch.cuda.is_available():
        found["cuda_bytes"] = torch.cuda.memory_allocated()
    return found


class StressExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        server = sys.modules["server"].PromptServer.instance

        async def count(request: web.Request) -> web.Response:
            return web.json_response(census())

        server.routes.get("/stress/census")(count)
        return [Fail, Fresh]


async def comfy_entrypoint() -> StressExtension:
    return StressExtension()
