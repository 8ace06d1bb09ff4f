"""A table of blocks (ECAD): exactly the blocks it names run, the others add what they last added, and nothing stays."""

from __future__ import annotations

import contextlib
import gc

import comfy.model_management
import comfy.samplers
import families
import folder_paths
import pytest
import torch
from sampling import SIZE, relative
from scenes import controlled, guided, outliving, scheduled
from slipstream.demo import emoji
from slipstream.engine.calibration.profile import Profile
from slipstream.engine.calibration.statistics import TrajectoryStatistics
from slipstream.engine.errors import SlipstreamError
from slipstream.engine.families import architecture_of
from slipstream.engine.forecast.history import History
from slipstream.engine.run.plan import CacheConfig, PredictorConfig
from slipstream.engine.run.run import Run
from slipstream.engine.sites.each_block import EachCall, EachSite
from slipstream.engine.sites.levels import EACH
from slipstream.engine.sites.stack import Blocks, block_sizes
from slipstream.host import model as patcher
from slipstream.host.canvas import events
from slipstream.host.memory import Memory
from slipstream.host.profiles import folder as profiles

STEPS = 16
MODELS = ["flux", "sd3", "lumina", "wan21"]  # two stacks, two streams, patched forwards, video with text read only
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty profile folder of our own."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, profiles.FOLDER, ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def model_of(lab, name: str):
    return getattr(lab, name) if hasattr(lab, name) else lab._model(name, lambda: families.make(name))


def sample(lab, model, **options) -> torch.Tensor:
    if model.model.latent_format.latent_dimensions == 3:
        shape = (1, model.model.latent_format.latent_channels, 3, 8, 8)
        options = {"latent": torch.zeros(shape), "prompts": emoji.PROMPTS[:1], **options}
    return lab.sample(model, **{"steps": STEPS, **options})


def blocks_of(model) -> list[torch.nn.Module]:
    network = model.model.diffusion_model
    stacks = architecture_of(network).stacks
    return [block for stack in stacks for block in network.get_submodule(stack.path).children()]


def table(model, seed: int = 1, steps: int = STEPS) -> torch.Tensor:
    """A random table in which half of the blocks run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (steps, len(blocks_of(model))), generator=generator, dtype=torch.uint8)


def in_effect(rows: torch.Tensor) -> list[list[int]]:
    """The table with its first and last step in full."""
    return [[1] * rows.shape[1] if i in (0, len(rows) - 1) else row for i, row in enumerate(rows.tolist())]


def profile_of(model, rows: torch.Tensor | None, keys=(0,), site: str = EACH, steps: int = STEPS) -> Profile:
    sampling = model.get_model_object("model_sampling")
    sigmas = tuple(float(s) for s in comfy.samplers.calculate_sigmas(sampling, "simple", steps))
    statistics = TrajectoryStatistics.of([torch.ones(1)] * steps, [float(i) for i in range(steps)])
    extras = {} if rows is None else {"blocks": rows}
    return Profile(keys, sigmas, statistics, "", site, extras=extras)


def masked(model, rows: torch.Tensor, node: str = "1", file: str = "mask", **cache):
    """The model through a Cache Loader with a profile of this table."""
    profiles.save(file, profile_of(model, rows, steps=len(rows)))
    return patcher.add_cache(model, CacheConfig(node_id=node, profile=f"{file}.safetensors", **cache))


def test_h07_a_run_ends_when_the_sampler_does(lab, folder, monkeypatch):
    assert not outliving(lab, masked(lab.flux, table(lab.flux)), monkeypatch)


class Ran:
    """Which blocks really run, in every call of the network: a leaf with parameters below them does."""

    def __init__(self, model):
        self.calls: list[set[int]] = []
        self._hooks = [model.model.diffusion_model.register_forward_pre_hook(lambda *_: self.calls.append(set()))]
        for number, block in enumerate(blocks_of(model)):
            leaves = [m for m in block.modules() if not list(m.children()) and list(m.parameters(recurse=False))]
            self._hooks += [leaf.register_forward_pre_hook(self._seen(number)) for leaf in leaves]

    def _seen(self, number: int):
        return lambda *_: self.calls[-1].add(number)

    def __enter__(self) -> list[set[int]]:
        return self.calls

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()


def by_hand(model, rows: torch.Tensor, inner=lambda number, args, extra: extra["original_block"](args)):
    """The same by the host's own block replacement, or forwards: a dict of what every block last added, no more."""
    model, rows, added, step = model.clone(), in_effect(rows), {}, [-1]

    def run(number: int, streams: dict, compute):
        step[0] += number == 0
        if not rows[step[0]][number]:
            return {k: t + added[number][k] if k in added[number] else t for k, t in streams.items()}
        before = {k: t.clone() for k, t in streams.items()}
        out = compute()
        added[number] = {k: out[k] - before[k] for k in out if torch.is_tensor(out[k])}
        return out

    def replacement(number):
        def block(args, extra):
            streams = {k: args[k] for k in ("img", "txt") if k in args}
            return run(number, streams, lambda: inner(number, args, extra))

        return block

    def forward(number, original):
        return lambda x, *a, **k: run(number, {"x": x}, lambda: {"x": original(x, *a, **k)})["x"]

    stacks = Blocks(model.model.diffusion_model, architecture_of(model.model.diffusion_model))
    for (path, index), number in stacks.order.items():
        key = stacks.stacks[number].key
        if key is None:
            where = f"diffusion_model.{path}.{index}.forward"
            model.add_object_patch(where, forward(number, model.get_model_object(where)))
        else:
            model.set_model_patch_replace(replacement(number), "dit", key, index)
    return model


@every_model
def test_h01_a_table_of_ones_is_bit_identical_and_leaves_nothing(lab, folder, name):
    base = model_of(lab, name)
    plain = sample(lab, base, cfg=3.0)
    model = masked(base, torch.ones_like(table(base)))
    assert torch.equal(sample(lab, model, cfg=3.0), plain)
    report = lab.report(model)
    assert (report["computed"], report["computed_share"], report["cache_bytes"]) == (STEPS, STEPS, 0)
    model = masked(base, table(base))
    assert not torch.equal(sample(lab, model, cfg=3.0), plain)
    assert torch.equal(sample(lab, base, cfg=3.0), plain)


@every_model
@pytest.mark.parametrize("kind", ["half", "none"])
def test_exactly_the_named_blocks_run_and_the_result_is_that_by_hand(lab, folder, name, kind):
    base = model_of(lab, name)
    rows = table(base) if kind == "half" else torch.zeros_like(table(base))
    model = masked(base, rows)
    with Ran(base) as calls:
        result = sample(lab, model)
    assert [[int(b in call) for b in range(rows.shape[1])] for call in calls] == in_effect(rows)
    assert torch.equal(result, sample(lab, by_hand(base, rows)))
    report = lab.report(model)
    shares = [sum(row) / len(row) for row in in_effect(rows)]
    assert [e["share"] for e in report["trace"]] == pytest.approx(shares)
    assert report["computed_share"] == pytest.approx(sum(shares)) and report["site"] == EACH
    assert report["computed"] == sum(share == 1 for share in shares) == STEPS - report["filled"]
    assert report["drift_mean"] is None and all(e["drift"] is None for e in report["trace"])
    text = f"computed {report['computed']} of {STEPS}"
    if kind == "half":
        text += f" in full, {sum(shares):.1f} worth of blocks"
    assert events.node_text(report).splitlines()[0] == text
    assert events.node_text(report).splitlines()[2] == "each block, profile mask, reuse"


@every_model
def test_h08_split_equals_batched(lab, folder, split, name):
    base = model_of(lab, name)
    model = masked(base, table(base))
    options = {} if name == "wan21" else {"batch": 2, "size": (8, 24)}
    batched, together = sample(lab, model, cfg=3.0, **options), lab.report(model)
    split()
    separate, apart = sample(lab, model, cfg=3.0, **options), lab.report(model)
    assert relative(separate, batched) < 1e-5
    assert [e["share"] for e in together["trace"]] == [e["share"] for e in apart["trace"]]
    assert together["filled"] >= 8 and together["cache_bytes"] == apart["cache_bytes"]


def test_h12_h15_runs_of_any_size_and_two_clones_in_turns_are_each_as_if_alone(lab, folder):
    used, other = masked(lab.flux, table(lab.flux)), masked(lab.flux, table(lab.flux, 2), "2", "other")
    alone = sample(lab, other, cfg=3.0)
    for options in ({"size": (8, 24)}, {"batch": 3}, {"steps": 9}, {"cfg": 3.0}, {}):
        assert torch.equal(sample(lab, used, **options), sample(lab, masked(lab.flux, table(lab.flux)), **options))
        assert torch.equal(sample(lab, other, cfg=3.0), alone)


def test_h28_controls_and_blocks_that_write_in_place_do_not_reach_what_is_kept(lab, folder):
    """A ControlNet adds into a block's output, another pack's replacement writes into its input."""
    base, rows = lab.flux, table(lab.flux)
    positive = controlled("flux")
    result = sample(lab, masked(base, rows), positive=positive)
    assert torch.equal(result, sample(lab, by_hand(base, rows), positive=positive))
    assert not torch.equal(result, sample(lab, masked(base, rows)))

    def writes(number, args, extra):
        args["img"].mul_(0.9)
        return extra["original_block"](args)

    theirs = base.clone()
    for key in ("double_block", "single_block"):
        theirs.set_model_patch_replace(lambda args, extra: writes(0, args, extra), "dit", key, 1)
    inner = {1: writes, len(list(base.model.diffusion_model.double_blocks)) + 1: writes}
    hand = by_hand(
        base, rows, lambda n, args, extra: inner.get(n, lambda _, a, e: e["original_block"](a))(n, args, extra)
    )
    assert torch.equal(sample(lab, masked(theirs, rows)), sample(lab, hand))


@pytest.mark.parametrize("options", [{"steps": 9}, {"steps": 24}, {"steps": 20, "scheduler": "beta"}], ids=str)
def test_other_schedules_use_the_rows_nearest_in_time(lab, folder, options):
    base, rows = lab.flux, table(lab.flux)
    model = masked(base, rows)
    with Ran(base) as calls:
        sample(lab, model, **options)
    sampling = base.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, options.get("scheduler", "simple"), options["steps"])
    nearest = profile_of(base, rows).rows_for([float(s) for s in sigmas])
    assert [[int(b in call) for b in range(rows.shape[1])] for call in calls] == in_effect(rows[nearest])


def test_h40_h44_h45_every_sampler_a_late_start_and_few_steps(lab, folder):
    base = lab.flux
    model, plain = masked(base, table(base)), lab.sample(base)
    for sampler in ("heun", "dpm_2", "dpmpp_2m", "euler_ancestral"):
        result = sample(lab, model, sampler=sampler)
        assert relative(result, sample(lab, base, sampler=sampler)) < 0.5 and lab.report(model)["filled"] >= 8
    with Ran(base) as calls:
        sample(lab, model, sampler="dpm_2")
    assert calls[4] == calls[5] == {b for b, ran in enumerate(table(base)[2]) if ran}  # both stages of step 2
    sample(lab, model, latent=plain, denoise=0.5)
    trace = lab.report(model)["trace"]
    assert trace[0]["share"] == trace[-1]["share"] == 1.0 and lab.report(model)["filled"] >= 8
    assert torch.equal(sample(lab, model, steps=4), sample(lab, base, steps=4))
    assert "every one of them counts" in lab.report(model)["note"]


def test_h21_h22_a_change_of_conditioning_computes_everything_anew(lab, folder, split):
    model = masked(lab.flux, table(lab.flux))

    def prompts(model):
        return sample(lab, model, positive=scheduled(), cfg=3.0)

    runs, results = (prompts, lambda model: guided(lab, model)), []
    for run in runs:
        results.append(run(model))
        changed = [e for e in lab.report(model)["trace"] if e["reason"] == "the active conditioning changed"]
        assert changed and all(e["share"] == 1.0 for e in changed) and lab.report(model)["filled"] >= 6
    split()
    for run, result in zip(runs, results, strict=True):
        assert relative(run(model), result) < 1e-5


def test_start_and_end_percent_hold(lab, folder):
    model = masked(lab.flux, torch.zeros_like(table(lab.flux)), preset="Custom", start_percent=0.3, end_percent=0.7)
    sample(lab, model)
    trace = lab.report(model)["trace"]
    outside = [e["share"] for e in trace if e["reason"] == "outside start and end percent"]
    assert len(outside) >= 4 and set(outside) == {1.0} and lab.report(model)["filled"] >= 5


@pytest.mark.parametrize("name", ["flux", "lumina"])
@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, RuntimeError])
def test_h04_h07_a_cancelled_run_leaves_nothing(lab, folder, name, error):
    def alive():
        gc.collect()
        return {id(o) for o in gc.get_objects() if type(o) in (Run, History, EachSite, EachCall)}

    base = model_of(lab, name)
    model, plain, before = masked(base, table(base)), sample(lab, base), alive()
    clean = sample(lab, model)
    assert lab.report(model)["cache_bytes"] > 0 and alive() <= before

    def stop(step, *_):
        if step == 6:
            raise error()

    with contextlib.suppress(error):
        sample(lab, model, callback=stop)
        raise AssertionError("not cancelled")
    assert alive() <= before
    assert torch.equal(sample(lab, model), clean) and torch.equal(sample(lab, base), plain)


@pytest.mark.parametrize("kind", ["Taylor", "Per token", "Adams-Bashforth"])
def test_a_predictor_does_nothing_and_that_is_said(lab, folder, kind):
    model = masked(lab.flux, table(lab.flux))
    result = sample(lab, model)
    assert lab.report(model)["remark"] == ""
    both = patcher.add_predictor(model, PredictorConfig(kind, 2, "p"))
    assert torch.equal(sample(lab, both), result)
    assert "blocks are reused, not forecast" in lab.report(both)["remark"]


def test_what_does_not_fit_is_computed_plainly_and_said(lab, folder):
    flux, unet, sd3 = lab.flux, lab.unet, lab.sd3
    count = len(blocks_of(flux))
    refused = [
        (
            masked(flux, torch.zeros(STEPS, count - 1, dtype=torch.uint8)),
            f"{count - 1} blocks, and this model has {count}",
        ),
        (masked(unet, torch.zeros(STEPS, 4, dtype=torch.uint8), file="unet"), "this is a Stable Diffusion U-Net"),
        (masked(flux, table(flux), file="right", preset="Custom", site="block stack"), "set site to auto"),
        (patcher.add_cache(sd3, CacheConfig(node_id="1", profile="right.safetensors")), "blocks, and this model has 2"),
    ]
    profiles.save("empty", profile_of(flux, None))
    refused.append(
        (patcher.add_cache(flux, CacheConfig(node_id="1", profile="empty.safetensors")), "no table of blocks")
    )
    for model, sentence in refused:
        base = next(m for m in (flux, unet, sd3) if m.model is model.model)
        assert torch.equal(sample(lab, model), sample(lab, base))
        report = lab.report(model)
        assert report["filled"] == 0 and sentence in report["note"], report["note"]
        assert report["note"].startswith("nothing is skipped: ") and report["note"].count(". ") == 0
    with pytest.raises(SlipstreamError, match="there is no profile"):
        patcher.with_plan(flux, patcher.Plan(CacheConfig(profile="nowhere.safetensors")))


def test_h69_the_budget_holds_for_all_blocks_together(lab, folder, monkeypatch):
    base = lab.flux
    rows = torch.zeros_like(table(base))
    full = masked(base, rows)
    reference, need = sample(lab, full), lab.report(full)["cache_bytes"]
    tokens = SIZE[0] * SIZE[1] // 4 + emoji.conditioning("hamburger")[0][0].shape[1]
    assert need == len(blocks_of(base)) * tokens * 256 * 4

    def limited(limit):
        monkeypatch.setattr(Memory, "limit", lambda self, device: limit)
        return sample(lab, full), lab.report(full)

    assert limited(need)[1]["cache_place"] == "cpu"
    result, report = limited(need - 1)
    assert report["cache_place"] == "int8" and report["cache_bytes"] < 0.55 * need and report["filled"] == STEPS - 2
    assert 0 < relative(result, reference) < 0.05
    result, report = limited(0.3 * need)
    assert torch.equal(result, sample(lab, base))
    assert (report["filled"], report["cache_bytes"]) == (0, 0)
    assert f"the cache needs {need / 1e6:.1f} MB per prompt, more than the budget" in events.node_text(report)
    assert report["computed_share"] == STEPS


def test_h69_what_is_not_reused_any_more_is_freed(lab, folder):
    rows = torch.ones_like(table(lab.flux))
    rows[2, 0] = rows[10, 1] = 0  # two blocks, at different times
    model = masked(lab.flux, rows)
    sample(lab, model)
    one = masked(lab.flux, rows.clamp_min(torch.arange(STEPS)[:, None] > 5), "2", "one")
    sample(lab, one)
    assert lab.report(model)["cache_bytes"] == lab.report(one)["cache_bytes"] > 0
    assert (lab.report(model)["filled"], lab.report(one)["filled"]) == (2, 1)


def test_h10_half_precision_stays_near(lab, folder):
    base = lab.flux
    base.set_model_compute_dtype(torch.bfloat16)
    model = masked(base, table(base), cache_device="int8")
    result = sample(lab, model, cfg=3.0)
    assert result.isfinite().all() and relative(result, sample(lab, base, cfg=3.0)) < 0.3


@pytest.mark.parametrize("site", ["block stack", "last-block features"])
def test_a_profile_of_an_inner_site_patches_the_forwards_it_needs(lab, folder, site):
    """The host cannot replace the blocks of Lumina 2, so the file decides what is patched."""
    base = lab.lumina
    profiles.save("inner", profile_of(base, None, (0, 4, 8, 12), site))
    plain = sample(lab, base)
    model = patcher.add_cache(base, CacheConfig(node_id="1", profile="inner.safetensors"))
    with Ran(base) as calls:
        result = sample(lab, model)
    report = lab.report(model)
    assert (report["site"], report["note"]) == (site, "")
    assert [e["index"] for e in report["trace"] if e["action"] == "computed"] == [0, 4, 8, 12, 15]
    assert sum(2 in call for call in calls) == 5
    assert 0 < relative(result, plain) < 0.5 and torch.equal(sample(lab, base), plain)


@every_model
def test_block_sizes_are_those_of_the_blocks_in_running_order(lab, name):
    network = model_of(lab, name).model.diffusion_model
    sizes = block_sizes(network, architecture_of(network))
    assert sizes == [sum(p.numel() for p in block.parameters()) for block in blocks_of(model_of(lab, name))]
    assert len(sizes) == len(Blocks(network, architecture_of(network))) and min(sizes) > 0
