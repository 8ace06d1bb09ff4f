"""How the profiles in `demo/profiles` were made: `python dev.py bench` has the environment, see README.md beside this.

    COMFYUI_PATH=... python -m demo.models.make_profiles

Calibrated on prompts and seeds that neither the demo nor the benches draw.
"""

from __future__ import annotations

from pathlib import Path

from lab.boot import boot

FOLDER = Path(__file__).resolve().parent.parent / "profiles"
PROMPTS = ("grapes", "dog face", "blue heart", "pig face", "cookie", "crying face", "peach", "bear")
FIRST_SEED, STEPS = 7000, 28
JOBS = {"tiny_flux_emoji": "simple", "tiny_sd15_emoji": "normal"}


def main() -> None:
    boot()
    FOLDER.mkdir(exist_ok=True)
    for name, scheduler in JOBS.items():
        make(name, scheduler)


def make(name: str, scheduler: str) -> None:
    """Calibrate one model with one scheduler and write its profile."""
    import comfy.samplers
    import torch
    from slipstream.demo import emoji
    from slipstream.engine.run.plan import PredictorConfig
    from slipstream.host.calibrate.calibrate import calibrate, summary
    from slipstream.host.calibrate.job import Job, Wish
    from slipstream.host.model import add_predictor

    torch.set_num_threads(1)
    base = emoji.load_flux() if "flux" in name else emoji.load_unet()
    job = Job(
        add_predictor(base, PredictorConfig("Taylor")),
        tuple((emoji.conditioning(p), FIRST_SEED + i) for i, p in enumerate(PROMPTS)),
        emoji.conditioning(""),
        1.0,
        comfy.samplers.sampler_object("euler"),
        comfy.samplers.calculate_sigmas(base.get_model_object("model_sampling"), scheduler, STEPS),
        {"samples": torch.zeros(1, 16, 16, 16)},
    )
    with torch.inference_mode():
        profile = calibrate(job, Wish(), lambda sentence: print(f"\r{name}: {sentence:60}", end="", flush=True))
    profile.save(FOLDER / f"{name} {scheduler} {STEPS}.safetensors")
    print(f"\n{summary(profile)}\n")


if __name__ == "__main__":
    main()
