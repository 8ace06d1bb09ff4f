"""Whatever a user does in whatever order: plain runs stay bit-identical, and nothing is left behind.

The short versions of `python dev.py bench abuse` and `bench soak`, in this process; with `--all` also the real server.
"""

from __future__ import annotations

import asyncio
import gc

import comfy.model_management
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from slipstream.engine.errors import SlipstreamError
from slipstream.engine.forecast.history import History
from slipstream.engine.forecast.predictors import KINDS
from slipstream.engine.run.plan import METHODS, PRESETS, CacheConfig, CompensatorConfig, PredictorConfig
from slipstream.engine.run.run import Run
from slipstream.host.model import add_cache, add_compensator, add_predictor
from slipstream.host.quantise.choose import QuantWish
from slipstream.host.quantise.quantise import quantise
from slipstream.host.switch.segments import SwitchConfig
from slipstream.host.switch.switch import add_switch

SMALL = (8, 8)
STEPS = (2, 5, 7)
SAMPLERS = ("euler", "dpmpp_2m", "heun")


class Stopped(Exception):
    pass


ERRORS = (Stopped, comfy.model_management.InterruptProcessingException, comfy.model_management.OOM_EXCEPTION)


class Canvas(RuleBasedStateMachine):
    """One model wire. Every rule is something a user does; `queue` samples what is there, then the bare model."""

    lab = other = four = plain = None

    def __init__(self):
        super().__init__()
        self.cache = self.predictor = self.compensator = self.switch = None
        self.quantised = False
        self.steps, self.sampler, self.cfg = 5, "euler", 1.0
        self.known: dict = {}

    def model(self):
        """The wire as the nodes build it."""
        model = self.four if self.quantised else self.lab.flux
        if self.cache is not None:
            model = add_cache(model, CacheConfig(node_id="1", **self.cache))
        if self.predictor is not None:
            model = add_predictor(model, PredictorConfig(*self.predictor, node_id="2"))
        if self.compensator is not None:
            model = add_compensator(model, CompensatorConfig("none", self.compensator, node_id="3"))
        if self.switch is not None:
            model = add_switch(model, self.other, SwitchConfig(self.switch, node_id="4"))
        return model

    def sample(self, model, **options):
        return self.lab.sample(model, steps=self.steps, sampler=self.sampler, cfg=self.cfg, size=SMALL, **options)

    @rule(
        preset=st.sampled_from([*PRESETS, "Custom", "Custom"]), method=st.sampled_from(METHODS),
        site=st.sampled_from(["auto", "model output", "block stack", "last block", "U-Net depth"]),
        drift_budget=st.sampled_from([0.0, 0.1, 1.0]), max_skip=st.integers(0, 4),
        cache_device=st.sampled_from(["auto", "int8", "RAM"]),
    )  # fmt: skip
    def cache_loader(self, **values):
        self.cache = values

    @rule(kind=st.sampled_from(list(KINDS)), order=st.integers(-1, 3))
    def taylor(self, kind, order):
        self.predictor = (kind, order)

    @rule(anchors=st.integers(-1, 2))
    def compensate(self, anchors):
        self.compensator = anchors

    @rule(at=st.sampled_from([0.0, 0.4, 1.0]))
    def hybrid(self, at):
        self.switch = at

    @rule()
    def quantise(self):
        self.quantised = not self.quantised

    @rule(node=st.sampled_from(["cache", "predictor", "compensator", "switch"]))
    def remove(self, node):
        setattr(self, node, None)

    @rule(steps=st.sampled_from(STEPS), sampler=st.sampled_from(SAMPLERS), cfg=st.sampled_from([1.0, 3.0]))
    def settings(self, steps, sampler, cfg):
        self.steps, self.sampler, self.cfg = steps, sampler, cfg

    @rule()
    def free(self):
        comfy.model_management.unload_all_models()
        self.check_plain()

    @rule(at=st.integers(0, 3), error=st.sampled_from(ERRORS))
    def stop(self, at, error):
        """Cancelled or failed at a step."""

        def callback(step, *rest):
            if step >= at:
                raise error("on purpose")

        try:
            self.sample(self.model(), callback=callback)
        except (error, SlipstreamError):
            pass
        self.check_plain()

    @rule()
    def queue(self):
        key = (str(self.cache), self.predictor, self.compensator, self.switch, self.quantised, self.steps, self.sampler,
               self.cfg)  # fmt: skip
        try:
            found = self.sample(self.model())
        except SlipstreamError as error:
            found = str(error)
            assert "\n" not in found and len(found) < 400
        else:
            assert found.isfinite().all()
        before = self.known.setdefault(key, found)
        assert before == found if isinstance(found, str) else torch.equal(before, found)
        self.check_plain()

    def check_plain(self):
        """A plain run is what it was before any of our nodes was used."""
        key = self.steps, self.sampler, self.cfg
        assert torch.equal(self.sample(self.lab.flux), self.plain[key])

    def teardown(self):
        gc.collect()
        assert not [o for o in gc.get_objects() if type(o) in (Run, History)]


@pytest.fixture(scope="module")
def wires(lab):
    """What the canvas needs, with every plain result made before any of our nodes was used."""
    from slipstream.demo import emoji

    Canvas.lab, Canvas.other = lab, emoji.load_small_flux()
    canvas = Canvas()
    Canvas.plain = {}
    for canvas.steps in STEPS:
        for canvas.sampler in SAMPLERS:
            for canvas.cfg in (1.0, 3.0):
                Canvas.plain[canvas.steps, canvas.sampler, canvas.cfg] = canvas.sample(lab.flux)
    Canvas.four = quantise(lab.flux, QuantWish(rank=16))
    yield Canvas
    Canvas.lab = Canvas.other = Canvas.four = Canvas.plain = None


def test_any_sequence_of_actions_leaves_plain_runs_bit_identical(wires):
    wires.TestCase.settings = settings(
        max_examples=4, stateful_step_count=20, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    wires.TestCase("runTest").runTest()


def test_runs_leave_no_tensor_and_no_object_behind(wires, lab):
    """A soak in small: the same chains again and again, and from the third time on the counts do not move."""
    pytest.importorskip("aiohttp")
    from bench.stress.nodes import census

    def cycle():
        for model in (
            lab.every(lab.flux), lab.every(wires.four, site="block stack"), lab.fast(lab.flux, predictor="Per token"),
            add_switch(lab.every(lab.flux), wires.other, SwitchConfig(0.4, node_id="4")),
            add_compensator(wires.four, CompensatorConfig("none", 2, node_id="3")),
        ):  # fmt: skip
            lab.sample(model, steps=6, size=SMALL)
        lab.sample(lab.flux, steps=2, size=SMALL)
        del model
        return census()

    counts = [cycle() for _ in range(5)]
    assert len({count["tensors"] for count in counts[2:]}) == 1
    assert len({count["tensor_bytes"] for count in counts[2:]}) == 1
    assert counts[4]["objects"] - counts[2]["objects"] < 60  # 5 runs a cycle; a leaked one has hundreds


@pytest.mark.long
def test_abuse_of_the_real_server(tmp_path):
    from bench.stress import abuse

    row = asyncio.run(abuse.run(tmp_path, 60, seed=5))
    assert not row["broken"] and row["plain_checks"] > 20


@pytest.mark.long
def test_soak_of_the_real_server(tmp_path):
    from bench.stress import soak

    rows = asyncio.run(soak.run(tmp_path, 7, 3))
    assert not [row for row in rows if row["grows"] and row["name"] != "resident_bytes"]
