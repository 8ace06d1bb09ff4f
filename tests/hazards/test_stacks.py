"""All of the pack's nodes on one MODEL wire, in the situations of H01 to H49; `stacks.py` has both.

The representative of each runs always, the cross product of nodes, sites, predictors and families with `--all`.
"""

from __future__ import annotations

import gc
import math
import re

import comfy.context_windows
import comfy.model_management
import comfy.sample
import families
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from sampling import relative
from scenes import predicting
from slipstream.engine.correction.anchors import Carried
from slipstream.engine.errors import SlipstreamError
from slipstream.engine.forecast.history import History
from slipstream.engine.forecast.predictors import KINDS
from slipstream.engine.run.plan import ORIGINAL, CacheConfig, CompensatorConfig, PredictorConfig
from slipstream.engine.run.run import Run
from slipstream.host.compensate.compensator import Compensator
from slipstream.host.model import add_cache, add_compensator, add_predictor
from slipstream.host.quantise.choose import QuantWish, planned
from slipstream.host.quantise.loras import quantised_modules
from slipstream.host.quantise.quantise import quantise
from slipstream.host.switch.segments import SwitchConfig
from slipstream.host.switch.switch import SwitchedRun, add_switch
from slipstream.host.switch.view import View
from slipstream.quant import policy
from slipstream.quant.formats import GROUP_SIZE
from stacks import EVERYTHING, LOADED, SITUATIONS, STACKS, STEPS, Bench, Stack, apart, in_order

FEW = pytest.mark.parametrize("stack", [LOADED, EVERYTHING], ids=str)
ONE = pytest.mark.parametrize("stack", [EVERYTHING], ids=str)


@pytest.fixture(scope="module")
def bench(lab, tmp_path_factory):
    return Bench(lab, tmp_path_factory.mktemp("files"))


def at_work(bench, stack, fills: int = 1) -> None:
    """Every cache of the stack has filled something in the last run, and every compensator had its anchors."""
    reports = bench.reports(stack)
    assert reports[-1]["trace"][-1]["action"] == "computed"
    for report in reports:
        assert report["filled"] >= fills, report["note"]
        assert not stack.compensated or report["compensation"]["anchors"] or report["filled"] == 0


def check(bench, stack, situation, model, thorough: bool) -> None:
    result = situation.run(bench, model)
    assert result.isfinite().all()
    at_work(bench, stack, min(situation.fills, 1) if stack.second else situation.fills)
    if situation.split:
        with apart():
            assert relative(situation.run(bench, model), result) < 1e-5
    if thorough:
        assert torch.equal(situation.run(bench, bench.model(stack)), result)
        plain = situation.run(bench, bench.model(stack.without_cache))
        assert 0 < relative(result, plain) < situation.near


WIRE = "cache predictor quantize files compensator switch"


@pytest.mark.guards("H08 H12-H13 H20-H31 H40-H44 H46-H48", nodes=WIRE)
@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
@ONE
def test_everything_in_every_situation(bench, stack, situation):
    check(bench, stack, situation, bench.model(stack), False)


@pytest.mark.long
@pytest.mark.guards("H08 H12-H13 H20-H31 H40-H44 H46-H48", nodes=WIRE)
@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_every_stack_in_every_situation(bench, stack, situation):
    check(bench, stack, situation, bench.model(stack), True)


PLACES = ("model output", "block stack", "last block")
SITES = [Stack(f"{site} + Taylor + 4 bit + compensator", site, "Taylor", "canvas", True) for site in PLACES]


@pytest.mark.long
@pytest.mark.guards("H08 H12-H13 H20-H31 H40-H44 H46-H48", nodes=WIRE)
@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
@pytest.mark.parametrize("stack", SITES, ids=str)
def test_every_site_of_a_compensated_4_bit_model_in_every_situation(bench, stack, situation):
    check(bench, stack, situation, bench.model(stack), True)


PREDICTED = [
    Stack(f"{site} + {kind}{' + all else' * whole}", site, kind, "canvas", whole, "same" * whole)
    for kind in KINDS
    for site in PLACES
    for whole in (False, True)
    if kind != "Per token" or site == "last block"
]


@pytest.mark.long
@pytest.mark.guards("H08 H22 H40 H42-H43", nodes=WIRE)
@pytest.mark.parametrize("stack", PREDICTED, ids=str)
def test_every_predictor_at_every_site(bench, stack):
    """Adams-Bashforth where it cannot serve fills nothing and says so; of the others each fills in most situations."""
    chosen = [
        s for s in SITUATIONS if s.name in ("a negative", "prompt schedule", "heun", "euler_ancestral", "dpmpp_2m")
    ]
    filled, refused = [], 0
    for situation in chosen:
        model = bench.model(stack)
        result = situation.run(bench, model)
        assert result.isfinite().all()
        reports = bench.reports(stack)
        told = all("Adams-Bashforth serves" in report["note"] for report in reports)
        assert not told or (stack.predictor == "Adams-Bashforth" and not any(report["filled"] for report in reports))
        refused += told
        filled.append(min(report["filled"] for report in reports))
        if situation.split:
            with apart():
                assert relative(situation.run(bench, model), result) < 1e-5
    assert sum(map(bool, filled)) >= len(chosen) - 1 - refused, filled
    assert refused == 0 or stack.site != "model output" or refused < len(chosen)


# State


@pytest.mark.guards("H01", nodes=WIRE)
@FEW
def test_nodes_that_are_set_to_do_nothing_are_not_there(bench, stack):
    """Caches that are off, in two ways, and compensators of strength 0: the same bits as without those nodes."""

    def idle(number: int, config: CacheConfig):
        model = bench.base(stack, number)
        if stack.compensated:
            model = add_compensator(model, CompensatorConfig("none", 2, 0.0, node_id="e"))
        return add_predictor(add_cache(model, config), PredictorConfig(node_id="p"))

    models = [bench.base(stack), bench.base(stack, 1)]
    wanted = add_switch(*models, SwitchConfig(0.5)) if stack.second else models[0]
    plain = bench.sample(wanted, cfg=3.0)
    for config in (CacheConfig("Off", node_id="o"), CacheConfig("Custom", drift_budget=0.0, node_id="o")):
        models = [idle(0, config), idle(1, config)]
        model = add_switch(*models, SwitchConfig(0.5)) if stack.second else models[0]
        assert torch.equal(bench.sample(model, cfg=3.0), plain)


@pytest.mark.guards("H02-H03 H15", nodes=WIRE)
@FEW
def test_the_same_seed_twice_another_seed_and_the_plain_model_after_it(bench, stack):
    bases = [bench.base(stack, number) for number in range(2 if stack.second else 1)]
    plain = [bench.sample(base) for base in (*bases, bench.network())]
    model = bench.model(stack)
    first = bench.sample(model, cfg=3.0)
    assert torch.equal(bench.sample(model, cfg=3.0), first)
    bench.sample(model, seed=2)
    at_work(bench, stack)
    for base, expected in zip((*bases, bench.network()), plain, strict=True):
        assert torch.equal(bench.sample(base), expected)


class Stopped(Exception):
    pass


ENDINGS = [comfy.model_management.InterruptProcessingException, Stopped, torch.OutOfMemoryError]


@pytest.mark.guards("H04-H07", nodes=WIRE)
@pytest.mark.parametrize("error", ENDINGS)
@FEW
def test_a_run_that_is_stopped_or_fails_leaves_nothing(bench, stack, error):
    """Cancelled between two steps in the first model's part, or failing inside of a block of the second model."""
    kinds = (Run, History, Compensator, Carried, SwitchedRun, View)

    def alive():
        gc.collect()
        return {id(o) for o in gc.get_objects() if type(o) in kinds}

    plain, model = bench.sample(bench.network()), bench.model(stack)
    clean, before = bench.sample(model, cfg=3.0), alive()
    inside = (bench.network(1) if stack.second else model).model.diffusion_model
    inside, calls = inside.double_blocks[0].img_attn.qkv, []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 3 and error is torch.OutOfMemoryError:
            raise error("out of memory")

    def stop(step, *_):
        if step == 4 and error is not torch.OutOfMemoryError:
            raise error()

    hook = inside.register_forward_pre_hook(fail)
    try:
        with pytest.raises(error):
            bench.sample(model, cfg=3.0, callback=stop)
    finally:
        hook.remove()
    assert alive() <= before
    assert all("forward" not in vars(layer) for _, layer in quantised_modules(model))
    assert torch.equal(bench.sample(model, cfg=3.0), clean)
    assert alive() <= before
    assert torch.equal(bench.sample(bench.network()), plain)


@pytest.mark.guards("H09", nodes=WIRE)
@FEW
def test_the_order_of_the_branches_does_not_matter(bench, stack):
    results = []
    for order in ("forward", "backward"):

        def dressed(model, order=order):
            model.set_model_unet_function_wrapper(in_order(order))
            return model

        results.append(bench.sample(bench.model(stack, dress=dressed), cfg=3.0))
        at_work(bench, stack)
    assert relative(*results) < 1e-6


@pytest.mark.guards("H10-H11", nodes=WIRE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@FEW
def test_inputs_stay_and_outputs_are_not_shared(bench, stack, dtype):
    def dressed(model, spoil: bool):
        model.set_model_compute_dtype(dtype)

        def outside(executor, *args, **kwargs):
            before = [a.clone() if torch.is_tensor(a) else None for a in args]
            out = executor(*args, **kwargs)
            assert all(b is None or torch.equal(a, b) for a, b in zip(args, before, strict=True))
            kept = out.clone()
            if spoil:
                out.fill_(math.nan)
            return kept

        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "outside", outside)
        return model

    results = []
    for spoil in (False, True):
        results.append(bench.sample(bench.model(stack, dress=lambda m, spoil=spoil: dressed(m, spoil)), cfg=3.0))
        at_work(bench, stack)
    assert results[0].isfinite().all() and torch.equal(*results)


@pytest.mark.guards("H14", nodes=WIRE)
@FEW
def test_two_of_them_in_turns_are_each_as_if_alone(bench, stack):
    one, two = bench.model(stack), bench.model(Stack("", "model output", "Reuse", stack.quant, False, stack.second), 3)
    alone = [bench.sample(one, cfg=3.0), bench.sample(two)]
    assert torch.equal(bench.sample(one, cfg=3.0), alone[0])
    assert torch.equal(bench.sample(two), alone[1])


@pytest.mark.guards("H16", nodes=WIRE)
@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
@FEW
def test_another_step_cache_on_either_model_is_refused_by_name(bench, stack, node):
    name, values = node.define_schema().node_id, (0.2, 0.15, 0.95, False)

    def theirs(model):
        return node.execute(model, *values).result[0]

    with pytest.raises(SlipstreamError, match=f"{name} is already on this model"):
        bench.model(stack, dress=theirs)
    single = Stack("", stack.site, stack.predictor, stack.quant, stack.compensated)
    late = [theirs(bench.model(stack))]
    late.append(add_switch(bench.network(1), theirs(bench.model(single)), SwitchConfig(0.5, node_id="s")))
    for model in late:
        with bench.lab.calls(model) as runs, pytest.raises(SlipstreamError, match=name):
            bench.sample(model)
        assert not runs


@pytest.mark.guards("H16", nodes="cache predictor quantize compensator")
def test_each_node_twice_is_refused_by_name(bench):
    model = bench.model(Stack("", "model output", "Taylor", "canvas", True))
    for again, name in (
        (lambda: add_cache(model, CacheConfig()), "Cache Loader"),
        (lambda: add_predictor(model, PredictorConfig()), "Taylor Predictor"),
        (lambda: add_compensator(model, CompensatorConfig()), "Error Compensator"),
        (lambda: quantise(model, QuantWish()), "W4A4 Quantize"),
    ):
        with pytest.raises(SlipstreamError, match=f"^{name}: .*remove one of the two"):
            again()


@pytest.mark.guards("H17 H62", nodes=WIRE)
@FEW
def test_wrappers_of_others_are_called_and_arguments_of_newer_hosts_arrive(bench, stack):
    calls = {"function": 0, "network": 0}

    def dressed(model):
        def function(apply_model, arguments):
            calls["function"] += 1
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

        def network(executor, *args, **kwargs):
            calls["network"] += kwargs.pop("something_new", 0)
            return executor(*args, **kwargs)

        def newer_host(executor, *args, **kwargs):
            return executor(*args, something_new=1, **kwargs)

        model.set_model_unet_function_wrapper(function)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "a newer host", newer_host)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "theirs", network)
        return model

    result = bench.sample(bench.model(stack, dress=dressed), cfg=3.0)
    at_work(bench, stack)
    anchors = 2 * sum("compensation" in r and stack.compensated for r in bench.reports(stack))
    assert calls["function"] == STEPS + anchors and calls["network"] >= calls["function"] // 2
    assert torch.equal(result, bench.sample(bench.model(stack), cfg=3.0))


@pytest.mark.guards("H18", nodes="files", always=True)
@pytest.mark.guards("H18", nodes=WIRE)
@ONE
def test_a_run_inside_another_run(bench, stack):
    outer, inner = bench.model(stack), bench.model(Stack("", "block stack", "Taylor", "file"))
    alone, found = [bench.sample(outer, cfg=3.0), bench.sample(inner)], []

    def between(step, *_):
        if step in (3, 8):
            found.append(bench.sample(inner))

    # the inner run loads the second model's weights in the middle of the outer run; nobody may notice
    assert torch.equal(bench.sample(outer, cfg=3.0, callback=between), alone[0])
    assert len(found) == 2 and all(torch.equal(one, alone[1]) for one in found)


@pytest.mark.guards("H45", nodes=WIRE)
@FEW
def test_up_to_4_steps_nothing_is_skipped_and_up_to_8_one(bench, stack):
    model, without = bench.model(stack), bench.model(stack.without_cache)
    for steps in (2, 4):
        assert torch.equal(bench.sample(model, steps=steps), bench.sample(without, steps=steps))
    bench.sample(model, steps=8)
    assert all(report["filled"] <= 1 for report in bench.reports(stack))


@pytest.mark.guards("H49", nodes=WIRE)
@pytest.mark.parametrize("prediction", ["eps", "v_prediction", "edm"])
@FEW
def test_other_predictions_than_flow(bench, stack, prediction):
    def dressed(model):
        return predicting(model, prediction)

    model = bench.model(stack, dress=dressed)
    result = bench.sample(model, cfg=3.0, steps=20)
    assert result.isfinite().all()
    at_work(bench, stack)
    assert torch.equal(bench.sample(bench.model(stack, dress=dressed), cfg=3.0, steps=20), result)


# Families


def whole(bench, base, twin, site: str) -> tuple[object, bool]:
    """Quantised, compensated, cached and forecast, and half of the run on a second load that is the same; and whether
    no input of a layer is rounded."""
    plan = planned(base, QuantWish("w4a16"))
    names = [n for group in plan.groups.values() for n in group if plan.shapes[n][1] % GROUP_SIZE == 0]
    # the rounded inputs of other layers differ with the last bit of a sum
    wish = QuantWish("w4a16", layers="\n".join([*(f"^{re.escape(name)}$ = w4a16" for name in names), ". = keep"]))
    wish = wish if names else QuantWish()
    sides = []
    for number, side in enumerate((base, twin)):
        model = quantise(side, wish)
        model = add_compensator(model, CompensatorConfig("none", 1, node_id=f"e{number}", reference=ORIGINAL))
        sides.append(bench.lab.every(model, 2, site=site, node=f"c{number}"))
    return add_switch(*sides, SwitchConfig(0.5, node_id="s")), bool(names)


def sample(model, name: str, steps: int = STEPS, latent=None) -> torch.Tensor:
    latent = families.latent(name) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, 1)
    conds = families.conditioning(name, 11), families.conditioning(name, 12)
    with torch.inference_mode():
        out = comfy.sample.sample(
            model, noise, steps, 3.0, "euler", "simple", *conds, latent, seed=1, disable_pbar=True
        )
    return torch.cat([part.reshape(-1) for part in (out.unbind() if out.is_nested else (out,))])


# The host itself cannot split them, or gets another result: cond and uncond are not independent there.
NOT_INVARIANT = {"seedvr2", "ace_step15", "hunyuan3d21"}


def together(bench, name: str) -> None:
    base = families.make(name)
    plain = sample(base, name)
    try:
        model, exact = whole(bench, base, families.make(name), "auto")
    except SlipstreamError as error:
        assert "has no linear layer" in str(error)
        pytest.skip("its tiny network has no layer wide enough")
    result = sample(model, name)
    assert result.isfinite().all() and 0 < relative(result, plain) < 0.5
    at_work(bench, EVERYTHING)
    if exact and name not in NOT_INVARIANT:
        with apart():
            assert relative(sample(model, name), result) < 1e-5
    assert torch.equal(sample(model, name), result)
    assert torch.equal(sample(base, name), plain)


@pytest.mark.guards("H01-H03 H08", nodes="cache predictor quantize compensator switch")
@pytest.mark.parametrize("name", ["sd15", "lumina2"])
def test_all_nodes_on_a_family(bench, monkeypatch, name):
    monkeypatch.setattr(policy, "LIMITS", policy.Limits(values=1))
    together(bench, name)


@pytest.mark.long
@pytest.mark.guards("H01-H03 H08 H31-H32", nodes="cache predictor quantize compensator switch")
@pytest.mark.parametrize("name", families.available())
def test_all_nodes_on_every_family(bench, monkeypatch, name):
    """H31: image to video gives fewer channels than it takes; H32: sound and picture are two outputs."""
    monkeypatch.setattr(policy, "LIMITS", policy.Limits(values=1))
    together(bench, name)


@pytest.mark.guards("H31", nodes="cache predictor quantize compensator switch")
def test_fewer_channels_come_out_than_go_in(bench, monkeypatch):
    monkeypatch.setattr(policy, "LIMITS", policy.Limits(values=1))
    together(bench, "wan21_i2v")


@pytest.mark.guards("H32", nodes="cache predictor quantize compensator switch")
def test_sound_and_picture_are_two_outputs(bench, monkeypatch):
    if "ltxav" not in families.available():
        pytest.skip("this host has no model with two outputs")
    monkeypatch.setattr(policy, "LIMITS", policy.Limits(values=1))
    together(bench, "ltxav")


@pytest.mark.guards("H33", nodes="cache predictor quantize compensator switch")
def test_context_windows(bench, monkeypatch):
    """Longer videos than the model can: every window has a history of its own, and the anchors see all of them."""
    monkeypatch.setattr(policy, "LIMITS", policy.Limits(values=1))
    windows = comfy.context_windows
    handler = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule("standard_static"),
        fuse_method=windows.get_matching_fuse_method("pyramid"), context_length=3, context_overlap=1, dim=2,
    )  # fmt: skip
    models = [families.make("wan21") for _ in range(2)]
    for model in models:
        model.model_options["context_handler"] = handler
    latent = torch.zeros(1, 16, 5, 8, 8)
    plain = sample(models[0], "wan21", latent=latent)
    model, _ = whole(bench, *models, "last block")
    result = sample(model, "wan21", latent=latent)
    at_work(bench, EVERYTHING)
    assert relative(result, plain) < 0.3
    with apart():
        assert relative(sample(model, "wan21", latent=latent), result) < 1e-5
    assert bench.reports(EVERYTHING)[0]["cache_bytes"] > 0


def test_the_stacks_and_the_situations_have_names_of_their_own():
    for things in (STACKS + SITES + PREDICTED, SITUATIONS):
        names = [thing.name for thing in things]
        assert len(set(names)) == len(names)
