"""Other step caches on the same model: two caches would count each other's fills as real outputs, so one is refused."""

from __future__ import annotations

from collections.abc import Mapping

from ..engine.errors import SlipstreamError

# Marks that other caches leave in transformer_options or as wrapper keys -> the name their users know.
MARKS = {
    "easycache": "EasyCache",
    "lazycache": "LazyCache",
    "teacache": "TeaCache",
    "rel_l1_thresh": "TeaCache",
    "magcache": "MagCache",
    "magcache_thresh": "MagCache",
    "taylorseer": "TaylorSeer",
    "cache_dit": "CacheDiT",
    "cachedit": "CacheDiT",
    "ltx2_cache": "CacheDiT",
    "wan_cache": "CacheDiT",
    "hicache": "HiCache",
    "spectrum": "Spectrum",
    "fbcache": "First Block Cache (WaveSpeed)",
    "meancache": "MeanCache",
}

# Some leave no mark but the one function around the network; the node class that made it stands in its name.
MAKERS = {
    "fbcache": "First Block Cache (WaveSpeed)",
    "taylorseer": "TaylorSeer",
    "teacache": "TeaCache",
    "magcache": "MagCache",
}


def other_cache(model_options: Mapping, wrappers: Mapping) -> str | None:
    """The name of another step cache found on a model, or None.

    wrappers: {type: {key: [functions]}} as the host keeps them on the patcher.
    """
    keys = set(model_options.get("transformer_options", {}))
    for table in (wrappers, model_options.get("transformer_options", {}).get("wrappers", {})):
        for group in table.values():
            keys.update(key for key, functions in group.items() if functions)
    names = {str(key).lower() for key in keys}
    if "lazycache" in names:  # the host's LazyCache also leaves EasyCache's mark
        return "LazyCache"
    for mark, name in MARKS.items():
        if any(key == mark or key.startswith((mark + "_", mark + ".", mark + "-")) for key in names):
            return name
    maker = getattr(model_options.get("model_function_wrapper"), "__qualname__", "").lower()
    return next((name for mark, name in MAKERS.items() if mark in maker), None)


def refuse_other_cache(node: str, model_options: Mapping, wrappers: Mapping) -> None:
    """Raise SlipstreamError when another step cache is on the model."""
    name = other_cache(model_options, wrappers)
    if name is not None:
        raise SlipstreamError(
            f"{node}: {name} is already on this model; use one step cache at a time and remove the other."
        )
