"""Models that are quantised when they are first sampled: who samples them, what is left over, what the guard does."""

from __future__ import annotations

import gc
import math

import comfy.model_management
import comfy.samplers
import comfy.weight_adapter
import pytest
import torch
from sampling import SIZE, relative
from slipstream.demo import emoji
from slipstream.engine.errors import SlipstreamError
from slipstream.engine.metrics import psnr
from slipstream.host.quantise import first_run
from slipstream.host.quantise import make as quant_layers
from slipstream.host.quantise import quantise as quantising
from slipstream.host.quantise import teller as telling
from slipstream.host.quantise.choose import FIRST_RUN, QuantWish
from slipstream.host.quantise.first_run import shortened
from slipstream.host.quantise.quantise import quantise, quantised, settled, summary
from slipstream.quant.formats import FORMATS
from slipstream.quant.layer import sqnr
from slipstream.quant.linear import W4A4Linear

MLP = "diffusion_model.double_blocks.0.img_mlp.0"


def with_lora(model):
    """A clone with a LoRA on one layer."""
    model, layer = model.clone(), model.get_model_object(MLP)
    generator = torch.Generator().manual_seed(5)
    up, down = (
        torch.randn(*shape, generator=generator) / 8 for shape in ((layer.out_features, 4), (4, layer.in_features))
    )
    file = {"x.lora_up.weight": up, "x.lora_down.weight": down}
    assert model.add_patches({f"{MLP}.weight": comfy.weight_adapter.LoRAAdapter.load("x", file, 4.0, None, set())}, 1.0)
    return model


def wish(label: str, layers: str = "", **options) -> QuantWish:
    """A wish that no other test shares, of the format that is the quickest to make unless another is asked for."""
    options = {"format": "convrot_w4a4", "evaluations": 4, "calibration": FIRST_RUN, **options}
    return QuantWish(layers=f"# {label}\n{layers}", **options)


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.model.modules())


def placed(model) -> int:
    return sum(isinstance(layer, W4A4Linear) for layer in model.object_patches.values())


@pytest.fixture
def said(monkeypatch):
    sentences = []
    monkeypatch.setattr(telling, "show", lambda node, text: sentences.append((node, text)))
    monkeypatch.setattr(quantising, "show", lambda node, text: sentences.append((node, text)))
    return sentences


def test_the_first_sampling_quantises_and_the_next_is_the_same(lab, said):
    """The run goes on with the quantised layers, draws the same random numbers, and leaves the 16-bit network as it
    was; a clone made before shares the layers."""
    base = lab.flux
    plain = lab.sample(base, sampler="euler_ancestral")
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    model = quantise(base, wish("first"), node_id="7")
    lora, clone = with_lora(model), model.clone()
    assert quantised(model) is None and "waits for the first run" in summary(model) and not placed(model)
    with pytest.raises(SlipstreamError, match="first sampled"):
        settled(model)
    first = lab.sample(clone, sampler="euler_ancestral")
    found = quantised(model)
    assert found is quantised(clone) is quantised(lora) and placed(clone) == len(found.layers) and not hooks(base)
    assert clone.model_size() < 0.3 * base.model_size() and clone.loaded_size() == clone.model_size()
    assert 0 < relative(first, plain) < 0.5 and not torch.equal(first, plain)
    for again in (clone, model, clone.clone(), settled(model)):
        assert torch.equal(lab.sample(again, sampler="euler_ancestral"), first)
    texts = [text for node, text in said if node == "7" and "Layer shapes" not in text]
    assert texts[0] == "measuring 4 evaluations" and texts[1].startswith("quantising layer ")
    assert len(texts) == 2 + len({c.group for n, c in found.choices.items() if n in found.layers})
    assert texts[-1] == summary(clone) and "measured at 4 evaluations" in texts[-1] and "MB instead of" in texts[-1]
    lab.sample(lora)
    assert lora.get_model_object(MLP) is clone.get_model_object(MLP)
    assert torch.equal(lab.sample(base, sampler="euler_ancestral"), plain)
    comfy.model_management.unload_all_models()
    after = base.model.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in weights)
    assert placed(quantise(base, wish("first"))) == len(found.layers)  # known by now
    del model, lora, clone, again, found
    gc.collect()
    assert not placed(quantise(base, wish("first")))


def test_measured_layers_are_nearer_than_data_free_ones(lab, record_property):
    """Scored on the inputs that prompts give which were not measured; GPTQ is nearer still."""
    base, layers = lab.flux, "double_blocks.1 = keep\nsingle_blocks = keep"
    plan = quant_layers.planned(base, QuantWish(layers=layers))
    rows = {names[0]: first_run.Collector(plan.shapes[names[0]][1], 64) for names in plan.groups.values()}
    with first_run.watching(plan.linears, rows) as seen:
        lab.sample(base, prompts=emoji.PROMPTS[20:22], steps=8, seed=9)
    assert seen == set(rows) and not hooks(base)
    found = {}
    for label, options in {"free": {"calibration": ""}, "rows": {}, "gptq": {"gptq": True}}.items():
        model = quantise(base, wish("nearer", layers, format="auto", **options))
        lab.sample(model, prompts=emoji.PROMPTS[:1], steps=8)
        values = [
            sqnr(plan.linears[name].weight.detach(), layer.layer(lora=False), collector.statistics().rows,
                 plan.linears[name].bias.detach())
            for name, collector in rows.items()
            if "mod" not in name and (layer := quantised(model).layers[name])
        ]  # fmt: skip
        found[label] = sum(values) / len(values)
        record_property(label, f"{found[label]:.2f} dB")
    assert found["gptq"] > found["rows"] + 0.5 > found["free"] + 1.0, found


def custom(model, guider, steps=6, sampler="heun"):
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    noise = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(2))
    sampler = comfy.samplers.sampler_object(sampler)
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=2)


@pytest.mark.parametrize("kind", ["cfg", "dual", "cached before", "cached after", "other wrapper"])
def test_every_guider_and_company(lab, kind):
    """A guider of the host, a cache in either order, another pack's wrapper: measured once, by plain euler steps."""
    from comfy.patcher_extension import WrappersMP
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    runs = []

    def other(executor, *args, **kwargs):
        runs.append(len(args[3]) - 1)
        return executor(*args, **kwargs)

    base = lab.every(lab.flux, 2) if kind == "cached before" else lab.flux
    if kind == "other wrapper":
        base = base.clone()
        base.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "other", other)
    model = quantise(base, wish(kind))
    model = lab.every(model, 2) if kind == "cached after" else model
    guider = (Guider_DualCFG if kind == "dual" else comfy.samplers.CFGGuider)(model)
    conds = [emoji.conditioning(prompt) for prompt in ("hamburger", "cat face", "")]
    if kind == "dual":
        guider.set_conds(*conds)
        guider.set_cfg(3.0, 2.0)
    else:
        guider.set_conds(*conds[1:])
        guider.set_cfg(3.0)
    with lab.calls(model) as calls:
        result = custom(model, guider)
    assert placed(model) and not hooks(model) and result.isfinite().all()
    assert "measured at 4 evaluations" in summary(model)
    assert len(calls) >= 4 and torch.equal(custom(model, guider), result)
    if kind.startswith("cached"):
        assert lab.report(model)["filled"] and lab.report(model)["evaluations"] == 11
    if kind == "other wrapper":
        assert runs == [4, 6, 6]


def test_a_lora_is_measured_and_is_not_in_the_weights(lab):
    """LoRA before the node, after it, and one of the clones of a model that waits: originals are quantised."""
    model = quantise(with_lora(lab.flux), wish("lora", format="int8_convrot"))
    free = quantise(lab.flux, QuantWish("int8_convrot"))
    result = lab.sample(model)
    assert torch.equal(model.get_model_object(MLP).weight, free.get_model_object(MLP).weight)
    assert torch.equal(result, lab.sample(with_lora(free)))
    assert relative(result, lab.sample(with_lora(lab.flux))) < 0.1


def test_cancelled_or_failed_first_runs_leave_nothing_and_start_over(lab, monkeypatch):
    base = lab.flux
    plain, model = lab.sample(base), quantise(base, wish("cancelled"))
    gc.collect()
    known = len(quantising._MADE[base.model])

    def failing(error, calls: int):
        left = [calls]
        add = first_run.Collector.add

        def counted(self, *args):
            left[0] -= 1
            if not left[0]:
                raise error
            return add(self, *args)

        return counted

    for error, caught in (
        (comfy.model_management.InterruptProcessingException(), comfy.model_management.InterruptProcessingException),
        (MemoryError(), SlipstreamError),
    ):
        with monkeypatch.context() as patch, pytest.raises(caught):
            patch.setattr(first_run.Collector, "add", failing(error, 30))
            lab.sample(model)
        assert not hooks(base) and not placed(model) and quantised(model) is None
        assert len(quantising._MADE[base.model]) == known and torch.equal(lab.sample(base), plain)
    for error in (MemoryError(), torch.cuda.OutOfMemoryError("x"), OSError(5, "Input/output error")):
        with monkeypatch.context() as patch, pytest.raises(SlipstreamError, match=r"^W4A4 Quantize: .*layer .* x "):
            patch.setattr(quant_layers, "quantise_group", lambda *args, error=error: (_ for _ in ()).throw(error))
            lab.sample(model)
        assert not placed(model) and quantised(model) is None
    assert torch.equal(lab.sample(base), plain)
    lab.sample(model)
    assert placed(model)


def test_runs_that_cannot_be_measured(lab, caplog):
    """No steps: nothing happens yet. One step is measured. Steps up and down, or several GPUs: data-free, said once."""
    model = quantise(lab.flux, wish("odd"))
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(emoji.conditioning("hamburger"), emoji.conditioning(""))
    noise = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(2))

    def run(*sigmas):
        with torch.inference_mode():
            sampler = comfy.samplers.sampler_object("euler")
            return guider.sample(noise, 0 * noise, sampler, torch.tensor(sigmas), disable_pbar=True, seed=2)

    run(1.0)
    assert not placed(model)
    one = model.clone()
    lab.sample(one, steps=1)
    assert "measured at 1 evaluation of" in summary(one)
    model = quantise(lab.flux, wish("up and down"))
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(emoji.conditioning("hamburger"), emoji.conditioning(""))
    first = run(1.0, 0.5, 0.7, 0.3, 0.0)
    assert torch.equal(run(1.0, 0.5, 0.7, 0.3, 0.0), first) and caplog.text.count("without data") == 1
    assert "made without data, because its steps" in summary(model)
    free = quantise(lab.flux, QuantWish("convrot_w4a4"))
    assert torch.equal(model.get_model_object(MLP).weight, free.get_model_object(MLP).weight)
    many = quantise(lab.flux, wish("gpus"))
    many.get_additional_models_with_key = lambda key: [None]
    assert not first_run.ShortRun.why_not.fget(_Run(one)) and "GPU" in first_run.ShortRun.why_not.fget(_Run(many))


class _Run:
    """As much of a ShortRun as its reason looks at."""

    def __init__(self, patcher) -> None:
        self.sigmas = (1.0, 0.5, 0.0)
        self._guider = type("Guider", (), {"model_patcher": patcher})()


@pytest.mark.parametrize(
    ("sigmas", "evaluations", "expected"),
    [
        ((), 8, ()),
        ((1.0,), 8, ()),
        ((1.0, 0.0), 8, (1.0, 0.0)),
        ((4.0, 3.0, 2.0, 1.0, 0.0), 2, (4.0, 2.0, 0.0)),
        ((4.0, 3.0, 2.0, 1.0, 0.5), 9, (4.0, 3.0, 2.0, 1.0, 0.5)),
        ((2.0, 2.0, 1.0, 1.0, 0.0), 4, (2.0, 1.0, 0.0)),
    ],
)
def test_the_short_schedule(sigmas, evaluations, expected):
    assert shortened(sigmas, evaluations) == expected


# The quality guard


def damaged():
    """The small Flux with one layer that 4 bits cannot serve: its input sits on an offset a hundred times the signal,
    which the rows of its weight, summing to zero, take out again."""
    model = emoji.load_flux()
    block = model.model.diffusion_model.double_blocks[0]
    feeder, layer = block.img_mlp[0], block.img_mlp[2]
    feeder.bias.data += 40
    layer.weight.data -= layer.weight.data.mean(1, keepdim=True)
    return model


BAD = "double_blocks.0.img_mlp.2"


def test_the_guard_raises_exactly_the_bad_layer_and_the_check_holds(lab, record_property):
    base = damaged()
    plain = lab.sample(base, batch=2, seed=9)
    model = quantise(base, wish("guard", "single_blocks = keep", format="auto", guard_db=10.0))
    free = quantise(base, QuantWish(layers="single_blocks = keep"))
    lab.sample(model)
    found = quantised(model)
    assert [n for n, layer in found.layers.items() if FORMATS[layer.format].weight_bits == 8] == [BAD]
    assert found.sqnr[BAD] < 10 < min(db for name, db in found.sqnr.items() if name != BAD)
    assert found.check.after >= 10 and not found.check.raised and "is below 10 dB" in found.choices[BAD].why
    assert f"guard: {BAD}: " in summary(model) and "check of a short run" in summary(model)
    better, worse = (psnr(lab.sample(m, batch=2, seed=9), plain) for m in (model, free))
    record_property("guarded, free", f"{better:.1f} dB, {worse:.1f} dB")
    assert better > worse + 3


def test_the_check_of_the_whole_run_raises_the_worst_layers_until_it_holds(lab, monkeypatch):
    """Every layer passes by itself, the run as a whole does not: a tenth at a time gets 8 bit, at most three times."""
    monkeypatch.setattr(quant_layers.policy, "protect", lambda *args: {})
    model = quantise(lab.flux, wish("check", guard_db=60.0))
    lab.sample(model)
    found = quantised(model)
    assert found.check.before < found.check.after < 60
    order = sorted(found.sqnr, key=lambda name: (found.sqnr[name], name))
    count, left = 0, len(order)
    for _ in range(3):
        count += math.ceil(left / 10)
        left = len(order) - count
    assert list(found.check.raised) == order[:count]
    assert all(found.layers[name].format == "int8_convrot" for name in found.check.raised)
    size = comfy.model_management.module_size
    assert model.model_size() == lab.flux.model_size() - found.saved
    assert found.saved == sum(size(lab.flux.get_model_object("diffusion_model." + n)) - size(layer)
                              for n, layer in found.layers.items())  # fmt: skip
    # asked for less, the first check is enough
    easy = quantise(lab.flux, wish("check", guard_db=1.0))
    lab.sample(easy)
    assert not quantised(easy).check.raised and quantised(easy).check.after >= 1


def test_time_left_is_told_when_it_is_known(monkeypatch, said):
    clock = [0.0]
    monkeypatch.setattr(telling.time, "monotonic", lambda: clock[0])
    teller = telling.Teller(None, "1")
    teller.begin(10, 100)
    for _ in range(4):
        clock[0] += 5
        teller.done(1, 10)
    assert [text for _, text in said][1:] == [
        "quantising layer 2 of 10", "quantising layer 3 of 10, 35 s left", "quantising layer 4 of 10, 30 s left",
    ]  # fmt: skip


def test_statistics_of_a_group_are_dropped_when_it_is_quantised(lab, monkeypatch):
    left = []
    original = first_run.taken

    def counted(collectors, name):
        left.append(len(collectors))
        return original(collectors, name)

    monkeypatch.setattr(first_run, "taken", counted)
    lab.sample(quantise(lab.flux, wish("dropped", gptq=False)))
    assert left == list(range(left[0], 0, -1)) and len(left) > 10
