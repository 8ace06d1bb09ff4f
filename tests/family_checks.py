"""What every model family is held to, tiny and random, at every site."""

from __future__ import annotations

import comfy.sample
import families
import torch
from sampling import relative, runs_below
from slipstream.engine.families import architecture_of

STEPS = 9  # one more than where at most one step is skipped

# The host itself cannot split them, or gets another result: cond and uncond are not independent there.
NOT_INVARIANT = {"seedvr2", "ace_step15", "hunyuan3d21"}
# No block stack is known or safe to skip: cascades, a key-value cache across steps, swapped halves.
OUTPUT_ONLY = {"stable_cascade_c", "stable_cascade_b", "hidream_o1", "seedvr2", "hunyuan3d21", "triposplat"}

# Its pose branch lives in the same blocks and runs at every step, outside of what can be replaced.
RUNS_BESIDE = {"wan22_animate2"}


def sites_of(network) -> list[tuple[str, str]]:
    """(site, a module that a filled evaluation must not run)."""
    row = architecture_of(network)
    if row.unet:
        deep = "input_blocks.3" if network.middle_block is None else "middle_block"
        return [("U-Net depth", deep), ("U-Net encoder", "input_blocks.1")]
    if row.stacks:
        path = row.stacks[-1].path
        last = f"{path}.{list(network.get_submodule(path)._modules)[-1]}"
        return [("block stack", last), ("last block", last)]
    return []


def flat(latent) -> torch.Tensor:
    """One vector, also where the host nests the latents of several streams."""
    parts = latent.unbind() if latent.is_nested else (latent,)
    return torch.cat([part.reshape(-1) for part in parts])


def sample(model, name: str) -> torch.Tensor:
    latent = families.latent(name)
    noise = comfy.sample.prepare_noise(latent, 1)
    conds = families.conditioning(name, 11), families.conditioning(name, 12)
    with torch.inference_mode():
        out = comfy.sample.sample(
            model, noise, STEPS, 3.0, "euler", "simple", *conds, latent, seed=1, disable_pbar=True
        )
    return flat(out)


def check(lab, split, name: str, base) -> list[str]:
    """Off is identical, hooked is identical, filled runs skip what they say, split equals batched, nothing stays.

    Returns the sites, for the table of families.
    """
    network = base.model.diffusion_model
    sites = sites_of(network)
    assert bool(sites) != (name in OUTPUT_ONLY)
    plain = sample(base, name)
    assert plain.isfinite().all()
    off = lab.fast(base, drift_budget=0.0)
    assert torch.equal(sample(off, name), plain)
    models = {"model output": lab.every(base)}
    for site, inside in sites:
        hooked = lab.every(base, site=site, start_percent=0.99)
        assert torch.equal(sample(hooked, name), plain), site
        models[site] = model = lab.every(base, site=site)
        full = runs_below(base, inside, lambda: sample(base, name))
        some = runs_below(model, inside, lambda model=model: sample(model, name))
        assert some * 9 == full * 5 if name not in RUNS_BESIDE else some < full, site
    batched = {site: sample(model, name) for site, model in models.items()}
    for site, model in models.items():
        report = lab.report(model)
        assert (report["computed"], report["filled"]) == (5, 4), (site, report["note"])
        assert batched[site].isfinite().all() and 0 < relative(batched[site], plain) < 0.5, site
    assert torch.equal(sample(base, name), plain)
    if name not in NOT_INVARIANT:
        split()
        for site, model in models.items():
            error = relative(sample(model, name), batched[site])
            assert error < 1e-5, (site, error)
    return list(models)
