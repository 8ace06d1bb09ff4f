"""Hazards H01 to H18: the state of a run belongs to that run alone."""

from __future__ import annotations

import ast
import gc
import math
from pathlib import Path

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from sampling import relative
from scenes import outliving
from slipstream.demo import emoji
from slipstream.engine.errors import SlipstreamError
from slipstream.engine.forecast.history import History
from slipstream.engine.run.plan import CacheConfig, PredictorConfig
from slipstream.engine.run.run import Run
from slipstream.host import model as patcher
from stacks import in_order

ROOT = Path(__file__).resolve().parents[2]
MODELS = ["flux", "unet", "sd3"]


@pytest.mark.card
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_h01_off_is_bit_identical(lab, name, cfg):
    base = getattr(lab, name)
    plain = lab.sample(base, cfg=cfg)
    model = patcher.add_cache(base, CacheConfig("Off", node_id="1"))
    for candidate in (model, patcher.add_predictor(model, PredictorConfig()), lab.fast(base, drift_budget=0.0)):
        assert torch.equal(lab.sample(candidate, cfg=cfg), plain)
    report = lab.report(model)
    assert report["evaluations"] == report["computed"] == 16


@pytest.mark.card
def test_h02_same_seed_twice(lab):
    model = lab.every(lab.flux)
    assert torch.equal(lab.sample(model, cfg=3.0), lab.sample(model, cfg=3.0))
    assert lab.report(model)["filled"] > 0


@pytest.mark.parametrize("name", MODELS)
def test_h03_bypassed_after_a_run_equals_the_plain_model(lab, name):
    base = getattr(lab, name)
    plain = lab.sample(base)
    lab.sample(lab.every(base))
    assert torch.equal(lab.sample(base), plain)


class Stopped(Exception):
    pass


def stop_at(step, error):
    def callback(index, *_):
        if index == step:
            raise error()

    return callback


@pytest.mark.card
@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, Stopped])
def test_h04_h05_a_cancelled_run_stops_at_once_and_leaves_nothing(lab, error):
    base = lab.flux
    plain, model = lab.sample(base), lab.every(base)
    clean = lab.sample(model)
    options_before = dict(model.model_options)
    with lab.calls(model) as runs, pytest.raises(error):
        lab.sample(model, callback=stop_at(6, error))
    assert len(runs) == 4  # evaluations 0, 1, 2 and 5 of the seven that were asked for: not one more
    assert dict(model.model_options) == options_before
    assert torch.equal(lab.sample(model), clean)
    assert torch.equal(lab.sample(base), plain)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_h06_an_error_inside_the_network_leaves_nothing(lab, error):
    base = lab.flux
    plain, model = lab.sample(base), lab.every(base)
    clean = lab.sample(model)
    calls = []

    def failing(arguments, extra):
        calls.append(1)
        if len(calls) == 3:
            raise error("out of memory")
        return extra["original_block"](arguments)

    broken = model.clone()
    broken.set_model_patch_replace(failing, "dit", "double_block", 1)
    with pytest.raises(error):
        lab.sample(broken)
    assert torch.equal(lab.sample(model), clean)
    assert torch.equal(lab.sample(base), plain)


def test_h06_a_run_that_cannot_be_attached_leaves_the_guider_as_it_was(lab, monkeypatch):
    """The host keeps guiders between runs: one of ours left on it would answer for a run that is over."""
    model = lab.every(lab.flux)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(emoji.conditioning("hamburger"), emoji.conditioning(""))
    given, attach = [], patcher.attach

    def failing(run, guider, network):
        attach(run, guider, network)
        raise AttributeError("a network without blocks")

    def before(executor, *args, **kwargs):
        given.append(executor.class_obj.model_options)
        try:
            return executor(*args, **kwargs)
        finally:
            given.append(executor.class_obj.model_options)

    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "another pack", before)
    model.wrappers[WrappersMP.OUTER_SAMPLE] = dict(reversed(model.wrappers[WrappersMP.OUTER_SAMPLE].items()))
    monkeypatch.setattr(patcher, "attach", failing)
    latent, sigmas = lab.latent(model), torch.linspace(1, 0, 9)
    with pytest.raises(AttributeError, match="without blocks"), torch.inference_mode():
        guider.sample(latent, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)
    assert len(given) == 2 and given[0] is given[1]


@pytest.mark.parametrize("site", ["model output", "block stack"])
def test_h07_a_run_ends_when_the_sampler_does(lab, site, monkeypatch):
    """Without waiting for the garbage collector: a run holds what the host samples with, and a circle would keep it."""
    assert not outliving(lab, lab.every(lab.flux, site=site), monkeypatch)


@pytest.mark.parametrize("ending", ["finished", "cancelled"])
def test_h07_no_tensor_is_reachable_after_the_run(lab, ending):
    def alive():
        gc.collect()
        return {id(o) for o in gc.get_objects() if type(o) in (Run, History)}

    model, before = lab.every(lab.flux), alive()
    if ending == "finished":
        lab.sample(model)
    else:
        with pytest.raises(Stopped):
            lab.sample(model, callback=stop_at(6, Stopped))
    assert alive() <= before


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 2])
def test_h08_split_equals_batched(lab, split, name, batch):
    model = lab.every(getattr(lab, name))
    with lab.calls(model) as together:
        batched = lab.sample(model, cfg=3.0, batch=batch)
    split()
    with lab.calls(model) as apart:
        separate = lab.sample(model, cfg=3.0, batch=batch)
    assert set(together) == {2 * batch} and set(apart) == {batch}
    assert lab.report(model)["filled"] >= 8
    assert relative(separate, batched) < 1e-5


def test_h08_split_equals_batched_with_measured_decisions(lab, split):
    model = lab.fast(lab.flux)
    batched, together = lab.sample(model, cfg=3.0, steps=28), lab.report(model)
    split()
    separate, apart = lab.sample(model, cfg=3.0, steps=28), lab.report(model)
    assert [e["action"] for e in together["trace"]] == [e["action"] for e in apart["trace"]]
    assert together["filled"] >= 8
    assert relative(separate, batched) < 1e-5


def test_h09_the_order_of_the_branches_does_not_matter(lab):
    results = []
    for order in ("forward", "backward"):
        model = lab.fast(lab.flux)
        model.set_model_unet_function_wrapper(in_order(order))
        results.append(lab.sample(model, cfg=3.0, steps=28))
        assert lab.report(model)["filled"] >= 8
    assert torch.equal(*results)


@pytest.mark.card
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_h10_inputs_are_never_written_to(lab, dtype):
    model = lab.every(lab.flux)
    model.set_model_compute_dtype(dtype)
    checked = []

    def outside(executor, *args, **kwargs):
        before = [a.clone() if torch.is_tensor(a) else None for a in args]
        out = executor(*args, **kwargs)
        assert all(b is None or torch.equal(a, b) for a, b in zip(args, before, strict=True))
        checked.append(args[0].dtype)
        return out

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", outside)
    lab.sample(model, cfg=3.0)
    assert set(checked) == {dtype} and len(checked) == 16
    assert lab.report(model)["filled"] >= 8


@pytest.mark.parametrize("kind", [WrappersMP.DIFFUSION_MODEL, WrappersMP.APPLY_MODEL])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_h11_an_edited_result_does_not_reach_the_cache(lab, name, kind):
    model = lab.every(getattr(lab, name), predictor=None)
    clean = lab.sample(model)

    def spoil(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        kept = out.clone()
        out.fill_(math.nan)
        return kept

    spoiled = model.clone()
    spoiled.add_wrapper_with_key(kind, "test", spoil)
    assert torch.equal(lab.sample(spoiled), clean)
    assert lab.report(spoiled)["filled"] >= 8


def test_h12_size_and_batch_change_between_runs(lab):
    used = lab.every(lab.flux)
    for options in ({"size": (16, 16)}, {"size": (8, 24)}, {"batch": 3}, {"batch": 1}):
        fresh = lab.every(lab.flux)
        assert torch.equal(lab.sample(used, **options), lab.sample(fresh, **options))
        assert lab.report(used)["filled"] >= 8


def test_h12_two_samplers_in_one_prompt(lab):
    model, fresh = lab.every(lab.flux), lab.every(lab.flux)

    def two_passes(m):
        small = lab.sample(m)
        large = torch.nn.functional.interpolate(small, scale_factor=1.5)
        return lab.sample(m, latent=large, denoise=0.6)

    assert torch.equal(two_passes(model), two_passes(fresh))
    assert lab.report(model)["filled"] >= 4


def test_h13_different_step_counts_one_after_the_other(lab):
    used = lab.every(lab.flux)
    for steps in (20, 9, 28):
        assert torch.equal(lab.sample(used, steps=steps), lab.sample(lab.every(lab.flux), steps=steps))


def test_h14_two_clones_in_turns_equal_each_alone(lab):
    base = lab.flux
    slow, quick = lab.every(base, 2, node="1"), lab.every(base, 4, order=2, node="2")
    alone = [lab.sample(slow, seed=3, cfg=3.0), lab.sample(quick, seed=4)]
    for _ in range(2):
        assert torch.equal(lab.sample(slow, seed=3, cfg=3.0), alone[0])
        assert torch.equal(lab.sample(quick, seed=4), alone[1])
    assert (lab.report(slow)["filled"], lab.report(quick)["filled"]) == (6, 8)


def test_h15_a_cached_model_output_still_skips_on_the_second_queue(lab):
    model = lab.fast(lab.flux)  # the host hands out the same MODEL again when only the seed changes
    fills = []
    for seed in (1, 2):
        lab.sample(model, seed=seed, steps=28)
        fills.append(lab.report(model)["filled"])
    assert min(fills) >= 8


@pytest.mark.parametrize("kind", ["EasyCacheNode", "LazyCacheNode"])
def test_h16_another_step_cache_is_refused_by_name(lab, kind):
    from comfy_extras import nodes_easycache  # needs packages that the rest of this file does without

    node = getattr(nodes_easycache, kind)
    name = node.define_schema().node_id

    def easycache(model):
        return node.execute(model, 0.2, 0.15, 0.95, False).result[0]

    with pytest.raises(SlipstreamError, match=f"Cache Loader: {name} is already on this model"):
        lab.fast(easycache(lab.flux))
    later = easycache(lab.fast(lab.flux))
    with lab.calls(later) as runs, pytest.raises(SlipstreamError, match=name):
        lab.sample(later)
    assert not runs


def test_h16_the_same_node_twice_is_refused(lab):
    model = lab.fast(lab.flux)
    with pytest.raises(SlipstreamError, match="already went through a Cache Loader"):
        patcher.add_cache(model, CacheConfig())
    with pytest.raises(SlipstreamError, match="already went through a Taylor Predictor"):
        patcher.add_predictor(model, PredictorConfig())


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_h17_other_wrappers_are_still_called(lab, first):
    calls = {"function": 0, "network": 0}

    def function_wrapper(apply_model, arguments):
        calls["function"] += 1
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    def network(executor, *args, **kwargs):
        calls["network"] += 1
        return executor(*args, **kwargs)

    def theirs(model):
        model = model.clone()
        model.set_model_unet_function_wrapper(function_wrapper)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "theirs", network)
        return model

    model = theirs(lab.every(lab.flux)) if first == "ours" else lab.every(theirs(lab.flux))
    result = lab.sample(model)
    assert calls == {"function": 16, "network": 16}
    assert lab.report(model)["filled"] >= 8
    assert torch.equal(result, lab.sample(lab.every(lab.flux)))


def test_h18_a_run_inside_another_run(lab):
    outer_model, inner_model = lab.every(lab.flux, node="1"), lab.every(lab.unet, node="2")
    alone = [lab.sample(outer_model, cfg=3.0), lab.sample(inner_model, cfg=3.0)]
    inner = []

    def between(step, *_):
        if step in (3, 7):
            inner.append(lab.sample(inner_model, cfg=3.0))

    assert torch.equal(lab.sample(outer_model, cfg=3.0, callback=between), alone[0])
    assert all(torch.equal(result, alone[1]) for result in inner) and len(inner) == 2


def test_h18_no_mutable_module_globals():
    """Threads and queue items share modules, so a module may hold tables but no state. The exceptions are named."""
    allowed = {
        ("host/canvas/events.py", "_reports"),  # finished numbers, bounded, behind a lock
        ("kernels/dispatch.py", "_devices"),  # which kernel serves which shape on which card, behind a lock
        ("kernels/dispatch.py", "_folder"),  # where that is kept
        ("kernels/dispatch.py", "_use"),  # the user's override
        ("kernels/lasting.py", "_outside"),  # where the host wants what lasts to be allocated
        ("host/allocations.py", "_record"),  # how many runs keep the host's compiler off, behind a lock
        ("kernels/derived.py", "_kept"),  # other layouts of a weight, which go with its memory
        ("host/compensate/reference.py", "_COPIES"),  # 8-bit copies of layers, which go with the layer
    }
    found = set()
    for folder in ("engine", "quant", "kernels", "host", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.Global):
                    found.update((path.relative_to(ROOT).as_posix(), name) for name in node.names)
            for node in tree.body:
                value = getattr(node, "value", None)
                names = [t.id for t in getattr(node, "targets", [getattr(node, "target", None)]) if hasattr(t, "id")]
                empty = isinstance(value, ast.List | ast.Dict) and not (
                    getattr(value, "elts", []) + getattr(value, "keys", [])
                )
                made = isinstance(value, ast.Call) and getattr(value.func, "id", "") in (
                    "dict", "list", "set", "OrderedDict", "defaultdict", "Counter", "deque", "WeakKeyDictionary",
                )  # fmt: skip
                if empty or made:
                    found.update((path.relative_to(ROOT).as_posix(), name) for name in names)
    assert found <= allowed
    assert not [name for name, _ in allowed if not (ROOT / name).is_file()]  # a file that moves takes its line along
