"""The wiring inside the host: batches, img2img, masks, LoRA on either side, order of nodes, refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from sampling import SIZE, TRAINED, relative
from slipstream.engine.errors import SlipstreamError
from slipstream.engine.families import UNKNOWN
from slipstream.engine.run.plan import CacheConfig, Plan, PredictorConfig
from slipstream.engine.sites import levels
from slipstream.host import attach
from slipstream.host import model as patcher
from slipstream.host.canvas import events
from slipstream.host.memory import Memory
from slipstream.host.parts import ENTRIES


def lora(model, strength=1.0):
    """The model with a small weight patch, as a LoRA loader leaves it."""
    model = model.clone()
    key = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    weight = model.model.diffusion_model.double_blocks[0].img_mlp[0].weight
    patch = 0.06 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    assert model.add_patches({key: ("diff", (patch,))}, strength)
    return model


def test_lora_before_and_after_is_the_same_and_removal_restores(lab):
    base = lab.flux
    plain = lab.sample(base)
    before, after = lab.every(lora(base)), lora(lab.every(base))
    result = lab.sample(before)
    assert torch.equal(result, lab.sample(after)) and lab.report(after)["filled"] >= 8
    assert relative(result, plain) > 0.01  # the LoRA does something
    assert relative(result, lab.sample(lora(base))) < 0.5 * relative(result, plain)
    assert torch.equal(lab.sample(base), plain)


def test_wire_order_does_not_change_the_result(lab):
    base = lab.flux
    one = patcher.add_predictor(patcher.add_cache(base, CacheConfig(node_id="1")), PredictorConfig())
    other = patcher.add_cache(patcher.add_predictor(base, PredictorConfig()), CacheConfig(node_id="1"))
    alone = patcher.add_predictor(base, PredictorConfig(node_id="2"))
    results = [lab.sample(m, steps=28) for m in (one, other, alone)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert lab.report(alone)["filled"] >= 12


@pytest.mark.parametrize("name", ["flux", "unet"])
@pytest.mark.parametrize("batch", [1, 4])
def test_img2img_and_batches(lab, name, batch):
    model = lab.every(getattr(lab, name), 2)
    latent = lab.sample(getattr(lab, name), batch=batch, seed=9)
    options = {"latent": latent, "denoise": 0.6, "prompts": None, "batch": batch}
    result = lab.sample(model, **options)
    assert result.shape[0] == batch and lab.report(model)["filled"] >= 4
    plain = lab.sample(getattr(lab, name), **options)
    assert relative(result, plain) < 0.15


@pytest.mark.parametrize("name", ["flux", "unet", "sd3"])
def test_inpainting_keeps_the_unmasked_region_exact(lab, name):
    model = lab.every(getattr(lab, name))
    latent = lab.sample(getattr(lab, name), seed=9)
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., :4] = 1.0
    result = lab.sample(model, latent=latent, noise_mask=mask)
    assert lab.report(model)["filled"] >= 8
    plain = lab.sample(getattr(lab, name), latent=latent, noise_mask=mask)
    assert torch.equal(result[..., 4:], plain[..., 4:])
    assert not torch.equal(result[..., :4], latent[..., :4])


def test_the_site_is_found_by_looking(lab):
    for name, site in (("flux", levels.NETWORK), ("unet", levels.NETWORK), ("sd3", levels.SLOPE)):
        model = lab.every(getattr(lab, name))
        lab.sample(model)
        assert lab.report(model)["site"] == site
    model = lab.every(lab.flux, predictor=None)
    lab.sample(model, sampler="euler_ancestral")
    assert lab.report(model)["site"] == levels.DENOISED


def test_forecasts_beat_reuse_and_fewer_steps(lab):
    """The product's claim in small: nearer to the full run than reuse, and than fewer steps at no fewer evaluations."""
    options = {"steps": 28, "size": TRAINED}
    plain = lab.sample(lab.flux, **options)
    forecast, reuse = lab.fast(lab.flux, node="1"), lab.fast(lab.flux, predictor="Reuse", node="2", drift_budget=0.1)
    error = relative(lab.sample(forecast, **options), plain)
    computed = lab.report(forecast)["computed"]
    assert computed <= 14
    assert error < 0.6 * relative(lab.sample(lab.flux, steps=computed, size=TRAINED), plain)
    assert error < 0.6 * relative(lab.sample(reuse, **options), plain)


def test_accumulated_change_skips(lab):
    model = lab.fast(lab.flux, method="accumulated change", drift_budget=0.1)
    plain, result = lab.sample(lab.flux, steps=28), lab.sample(model, steps=28)
    assert lab.report(model)["filled"] >= 8
    assert relative(result, plain) < 0.15


def test_percent_range_and_max_skip_hold(lab):
    model = lab.fast(lab.flux, drift_budget=1.0, start_percent=0.3, end_percent=0.8, max_skip=2)
    lab.sample(model, steps=28)
    trace = lab.report(model)["trace"]
    filled = [e for e in trace if e["action"] != "computed"]
    assert filled and all(0.2 - 1e-6 <= e["sigma"] <= 0.7 + 1e-6 for e in filled)
    assert "fff" not in "".join("c" if e["action"] == "computed" else "f" for e in trace)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"drift_budget": 1.5}, "Cache Loader: drift_budget is 1.5"),
        ({"drift_budget": float("nan")}, "Cache Loader: drift_budget is nan"),
        ({"end_percent": -0.1}, "Cache Loader: end_percent is -0.1"),
        ({"start_percent": 0.9, "end_percent": 0.2}, "start_percent 0.9 is not before end_percent 0.2"),
        ({"preset": "Turbo"}, "there is no preset 'Turbo'; choose one of Balanced"),
        ({"method": "magic"}, "there is no method 'magic'"),
        ({"max_skip": -1}, "max_skip is -1"),
        ({"site": "attic"}, "there is no site 'attic'"),
        ({"depth": -2}, "depth is -2"),
        ({"threshold": -1.0}, "threshold is -1.0"),
        ({"cache_device": "tape"}, "there is no cache device 'tape'"),
        ({"memory_budget_mb": -1}, "memory_budget_mb is -1"),
    ],
)
def test_bad_input_is_one_clear_sentence(lab, values, sentence):
    with pytest.raises(SlipstreamError) as caught:
        patcher.add_cache(lab.flux, CacheConfig(**{"preset": "Custom", **values}))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_bad_predictor_input(lab):
    for values in ({"kind": "Oracle"}, {"order": 5}):
        with pytest.raises(SlipstreamError, match="Taylor Predictor: "):
            patcher.add_predictor(lab.flux, PredictorConfig(**values))


def test_a_plan_survives_json():
    plan = Plan(CacheConfig("Fast", node_id="3"), PredictorConfig("Reuse"))
    assert Plan.from_json(plan.as_json(), ENTRIES) == plan
    with pytest.raises(SlipstreamError, match="update the pack"):
        Plan.from_json({"warp": {}}, ENTRIES)


class FakeExecutor:
    """Stands for the rest of the host: records what reaches the network."""

    def __init__(self):
        self.seen = []

    def __call__(self, *args, **kwargs):
        self.seen.append((args, kwargs))
        return args[0] * 2


def test_h62_arguments_the_pack_does_not_know_pass_through_untouched(lab):
    kept = {}

    def newer_host(executor, *args, **kwargs):
        kept["run"] = next(w for w in executor.wrappers if w is not newer_host)
        return executor(*args, **kwargs)

    model = lab.every(lab.flux)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", newer_host)
    lab.sample(model)
    ours, host = kept["run"], FakeExecutor()
    x, options = torch.ones(1, 4), {"sigmas": torch.ones(1), "cond_or_uncond": [0], "uuids": ["a"]}
    out = ours(host, x, 3, "context", foo=1, transformer_options=options)
    args, kwargs = host.seen[0]
    assert args[0] is x and args[1:] == (3, "context")
    assert kwargs == {"foo": 1, "transformer_options": options}
    assert torch.equal(out, x * 2)


class ListModel:
    """H32 in small: a network that returns a list of tensors (audio and video)."""

    def __init__(self, run):
        self.run, self.calls = run, 0

    def __call__(self, x, options):
        def network(inputs, transformer_options):
            self.calls += 1
            return [t * float(transformer_options["sigmas"][0]) for t in inputs]

        return attach._diffusion_model(self.run, network, (x, options), {})


def test_models_that_return_several_tensors():
    from slipstream.engine.run.clock import Clock
    from slipstream.engine.run.given import Given
    from slipstream.engine.run.plan import check_cache
    from slipstream.engine.run.recipe import resolve
    from slipstream.engine.run.run import Run
    from slipstream.engine.run.samplers import Sampler

    plan = Plan(check_cache(CacheConfig("Custom", "interval", 1.0, max_skip=2)), PredictorConfig())
    sigmas = tuple(1.0 - i / 12 for i in range(13))
    sampler = Sampler("euler")
    given = Given(
        plan=plan,
        clock=Clock(sigmas),
        sampler=sampler,
        recipe=resolve(plan, sampler, UNKNOWN, sigmas),
        window=(10.0, 0.0),
        percent_to_sigma=lambda percent: 10.0 * (1 - percent),
        timestep_of=lambda sigma: sigma,
    )
    run = Run(given, Memory())
    model, x = ListModel(run), [torch.ones(2, 3, 4), torch.ones(2, 5)]
    for sigma in sigmas[:-1]:
        options = {"sigmas": torch.tensor([sigma]), "cond_or_uncond": [1, 0], "uuids": ["n", "p"]}
        run.begin(sigma)
        out = model(x, options)
        run.end()
        assert isinstance(out, list) and [t.shape for t in out] == [t.shape for t in x]
        assert all(torch.allclose(t, torch.full_like(t, sigma), atol=1e-5) for t in out)  # linear: forecast exactly
    assert model.calls == run.report()["computed"] < 8


def test_the_summary_says_what_was_done_and_why_not(lab):
    model = lab.fast(lab.flux)
    lab.sample(model, steps=28)
    assert "evaluations of euler" in events.summary(lab.report(model))
    assert "s saved" in events.summary(lab.report(model))
    lab.sample(model, sampler="dpm_adaptive")
    assert "dpm_adaptive cannot be served" in events.summary(lab.report(model))


def test_reports_of_finished_runs_are_bounded(lab):
    class OneRun:
        plan = Plan(CacheConfig(node_id="x"))
        evaluations = ()

    for i in range(3 * events.KEPT_REPORTS):
        OneRun.plan = Plan(CacheConfig(node_id=f"bound{i}"))
        events.finished(OneRun, {"evaluations": 0, "filled": 0})
    assert len(events._reports) == events.KEPT_REPORTS


def test_a_report_belongs_to_its_workflow(lab, monkeypatch):
    """Every copy of a template has the same node ids: the report of one tab must not be that of another's picture."""
    asked = {"workflow": "first"}

    class Server:
        last_prompt_id, client_id = "p", "tab"
        prompt_queue = property(lambda self: self)

        def get_current_queue_volatile(self):
            return [(0, "p", {}, {"extra_pnginfo": {"workflow": {"id": asked["workflow"]}}})], []

        def send_progress_text(self, *_):
            pass

    numbers = dict.fromkeys(("evaluations", "filled", "computed", "seconds"), 0)
    words = dict.fromkeys(("note", "remark", "chose", "sampler"), "")
    plan = Plan(CacheConfig(node_id="5"))
    monkeypatch.setattr(events, "server_of_host", Server)
    monkeypatch.setattr(events.STRIPS, "finished", lambda *_: None)
    for workflow in ("first", "second"):
        asked["workflow"] = workflow
        assert events.last_report(plan) is None
        events.finished(type("Run", (), {"plan": plan, "evaluations": ()}), {**numbers, **words, "of": workflow})
    for workflow in ("first", "second"):
        asked["workflow"] = workflow
        assert events.last_report(plan)["of"] == workflow


def test_a_model_that_returns_nan_is_computed_and_reported_as_json(lab):
    """A forecast from NaN would spread it, and the browser cannot parse NaN or Infinity."""
    model = lab.fast(lab.flux, drift_budget=1.0)

    inner = model.clone()
    inner.add_object_patch("diffusion_model.final_layer.forward", lambda x, vec, *a, **k: x[..., :64] * math.nan)
    lab.sample(inner)
    report = lab.report(inner)
    assert report["filled"] == 0
    json.dumps(report, allow_nan=False)
