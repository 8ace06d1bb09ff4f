"""Profiles travel inside workflows: written back where a file is missing, packed in where a file is used.

`workflow["extra"]["slipstream_profiles"]` is {profile name: its file in base64}. The host saves a workflow's extra in
every picture's metadata, so a picture dropped on another machine's canvas brings its profile along. Both directions
happen when a prompt is queued; two routes let the canvas do the same when a workflow is loaded or saved.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import folder_paths
from aiohttp import web

from ...engine.calibration.profile import BLOCKS, Profile, ProfileError
from ...engine.errors import SlipstreamError
from ..canvas import strip
from ..canvas.events import server_of_host
from . import folder as profiles

log = logging.getLogger("slipstream")

KEY = "slipstream_profiles"
LOADER = "SlipstreamCacheLoader"
ROUTE = "/slipstream/profiles"

# A profile is a few kB. Above the first size its further statistics stay at home; more text than the second is ignored.
LARGEST_WHOLE = 2 << 20
LARGEST_TEXT = 8 << 20


def register() -> None:
    """Add the handler and the routes to the host's server, once; does nothing in a process that has none."""
    server = server_of_host()
    if not hasattr(server, "add_on_prompt_handler") or on_prompt in server.on_prompt_handlers:
        return
    server.add_on_prompt_handler(on_prompt)
    server.routes.get(ROUTE + "/{name}")(get_profile)
    server.routes.post(ROUTE)(post_profile)
    strip.register(server)


def on_prompt(json_data: dict) -> dict:
    """For the host, before it validates a queued prompt: restore the profiles it needs, then embed those it uses.

    An entry keeps the name that the workflow's own node has, also where the file has another one here, so that the
    workflow finds it again. A profile that cannot be restored is one warning; the prompt goes on without it.
    """
    workflow = _workflow(json_data)
    embedded = _dict(_dict(workflow.get("extra")).get(KEY))
    used: dict[str, str] = {}
    for inputs in _loaders(json_data):
        name = inputs["profile"]
        if name in embedded:
            try:
                inputs["profile"] = restore(name, embedded[name])
            except SlipstreamError as error:
                log.warning("%s", error)
        used[name] = inputs["profile"]
    if workflow:
        _embed(workflow, embedded, used)
    return json_data


def restore(name: object, text: object) -> str:
    """Write an embedded profile where no file has its name; returns the name to use. Raises SlipstreamError.

    A file of that name is never replaced. Of the same model, it is used: the user has calibrated again. Of another
    model, the embedded profile gets a name of its own, with a part of its SHA-256.
    """
    file = profiles.file_name(name) if isinstance(name, str) else None
    if file is None:
        raise _refused(str(name)[:60], "that is no file name")
    if not isinstance(text, str) or len(text) > LARGEST_TEXT:
        raise _refused(file, f"it is no text of at most {LARGEST_TEXT >> 20} MB")
    try:
        data = base64.b64decode(text, validate=True)
        profile = Profile.from_bytes(data, "it")
    except ProfileError as error:
        raise _refused(file, str(error)) from None
    except (ValueError, RuntimeError):
        raise _refused(file, "it is damaged") from None
    if (path := _path(file)) is not None:
        local = _local(path)
        if local is not None and local[0] == profile.model:
            return file
        file = f"{Path(file).stem[:100]} {hashlib.sha256(data).hexdigest()[:8]}.safetensors"
        if _path(file) is not None:
            return file
    try:
        # What was read is written anew, so nothing but a profile reaches the folder.
        written = profiles.save(file, profile)
    except (OSError, ValueError, RecursionError):
        raise _refused(file, "it cannot be written") from None
    log.info("Slipstream: profile %s was restored from the workflow", written)
    return written


def packed(name: str) -> str | None:
    """A local profile as it is embedded; None where there is none of that name, or one too large to embed."""
    file = profiles.file_name(name)
    path = _path(file) if file == name else None
    local = _local(path) if path is not None else None
    return local[1] if local is not None else None


async def get_profile(request: web.Request) -> web.Response:
    """GET /slipstream/profiles/{name}: {"name", "data"}, or 404."""
    name = request.match_info["name"]
    data = packed(name)
    if data is None:
        return web.json_response({"error": f"there is no profile {name[:60]!r} that can be embedded"}, status=404)
    return web.json_response({"name": name, "data": data})


async def post_profile(request: web.Request) -> web.Response:
    """POST /slipstream/profiles with {"name", "data"}: {"name"} it has here, or 400 with one sentence."""
    try:
        body = _dict(await request.json())
        return web.json_response({"name": restore(body.get("name"), body.get("data"))})
    except SlipstreamError as error:
        return web.json_response({"error": str(error)}, status=400)
    except (ValueError, RecursionError, LookupError):
        return web.json_response({"error": "Cache Loader: what was sent is no JSON with name and data."}, status=400)


def _refused(name: str, reason: str) -> SlipstreamError:
    return SlipstreamError(
        f"Cache Loader: calibrate again or choose another profile, the workflow's {name!r} was not restored: {reason}."
    )


def _dict(value: object) -> dict:
    """What clients send may have any shape; what should be a table and is none counts as an empty one."""
    return value if isinstance(value, dict) else {}


def _workflow(json_data: dict) -> dict:
    """The canvas' workflow of a queued prompt; empty where a client sent none."""
    return _dict(_dict(_dict(_dict(json_data).get("extra_data")).get("extra_pnginfo")).get("workflow"))


def _loaders(json_data: dict) -> Iterator[dict]:
    """The inputs of every queued Cache Loader that names a profile."""
    for node in _dict(_dict(json_data).get("prompt")).values():
        inputs = _dict(_dict(node).get("inputs"))
        name = inputs.get("profile")
        if _dict(node).get("class_type") == LOADER and isinstance(name, str) and name not in profiles.CHOICES:
            yield inputs


def _embed(workflow: dict, embedded: dict, used: dict[str, str]) -> None:
    """Set the workflow's profiles: those in use as they are here, and those of bypassed nodes as they were."""
    resting = _named(workflow) - used.keys()
    kept = {name: text for name, text in embedded.items() if name in resting}
    found = {name: text for name, file in used.items() if (text := packed(file)) is not None}
    if kept or found:
        workflow["extra"] = {**_dict(workflow.get("extra")), KEY: {**kept, **found}}
    else:
        _dict(workflow.get("extra")).pop(KEY, None)


def _named(workflow: dict) -> set[str]:
    """Every text in a Cache Loader's widgets, in the workflow and its subgraphs; one of them is its profile."""
    found: set[str] = set()
    subgraphs = _dict(workflow.get("definitions")).get("subgraphs")
    for graph in (workflow, *(subgraphs if isinstance(subgraphs, list) else ())):
        nodes = _dict(graph).get("nodes")
        for node in nodes if isinstance(nodes, list) else ():
            if _dict(node).get("type") == LOADER:
                values = node.get("widgets_values")
                values = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
                found.update(value for value in values if isinstance(value, str))
    return found


def _path(file: str | None) -> Path | None:
    """Where a file of this checked name is, if it is."""
    profiles.register()
    path = folder_paths.get_full_path(profiles.FOLDER, file) if file else None
    return Path(path) if path is not None else None


def _local(path: Path) -> tuple[str, str | None] | None:
    """A local file's model and its text to embed, None where that is too large; None where it is no profile."""
    try:
        state = path.stat()
    except OSError:
        return None
    return _read(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=8)
def _read(path: Path, changed: int, size: int) -> tuple[str, str | None] | None:
    """`_local` for one state of the file: a prompt is queued often, and a file with statistics has megabytes."""
    try:
        profile = Profile.load(path)
        data = path.read_bytes()
    except (ProfileError, OSError):
        return None
    if len(data) > LARGEST_WHOLE:
        blocks = {BLOCKS: profile.blocks} if profile.blocks is not None else {}
        data = dataclasses.replace(profile, extras=blocks).to_bytes()
    text = base64.b64encode(data).decode()
    if len(text) > LARGEST_TEXT:
        log.warning("Cache Loader: profile '%s' is too large to be embedded in a workflow; share its file.", path.name)
        return profile.model, None
    return profile.model, text
