"""Hazard H18: queues and threads at work at the same time. What each of them gets is what it gets alone."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace

import comfy.sampler_helpers
import pytest
import torch
from sampling import Lab, relative
from slipstream.demo import emoji
from slipstream.engine.run.plan import ORIGINAL, CompensatorConfig
from slipstream.host.canvas import events
from slipstream.host.canvas.strip import EVENT, FINISHED, KEPT_NODES, Strips
from slipstream.host.compensate.reference import BetterWeights
from slipstream.host.model import add_compensator
from slipstream.host.parts import QUANTISED
from slipstream.host.quantise import first_run
from slipstream.host.quantise.choose import FIRST_RUN, QuantWish
from slipstream.host.quantise.placed import Quantised
from slipstream.host.quantise.quantise import quantise, quantised
from slipstream.host.switch.segments import SwitchConfig
from slipstream.host.switch.switch import add_switch
from slipstream.kernels import derived, dispatch
from slipstream.kernels.choices import Choices
from slipstream.kernels.files import write_whole
from slipstream.quant.layer import quantise_linear

from lab.methods import METHODS

STEPS = 10
THREADS = 8


def together(*jobs):
    """What each job returns, all started at once in threads of their own; the first error is raised."""
    barrier, results, errors = threading.Barrier(len(jobs)), [None] * len(jobs), []

    def work(i: int) -> None:
        try:
            barrier.wait()
            results[i] = jobs[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
    return results


@pytest.fixture(autouse=True)
def one_loads_at_a_time(monkeypatch):
    """The host keeps its list of loaded models for one thread; what samplings do after that is ours to answer for."""
    true, lock = comfy.sampler_helpers.prepare_sampling, threading.Lock()

    def prepare(*args, **kwargs):
        with lock:
            return true(*args, **kwargs)

    monkeypatch.setattr(comfy.sampler_helpers, "prepare_sampling", prepare)


@pytest.fixture(scope="module")
def other() -> Lab:
    """A second queue's models."""
    return Lab()


def trace(lab, model) -> list[tuple]:
    return [(e["action"], e["order"], e["anchor"]) for e in lab.report(model)["trace"]]


def same_as_alone(lab, models, **options):
    """Every model sampled by itself, then all at once: equal pictures and accounts."""
    alone = [(lab.sample(m, steps=STEPS, cfg=3.0, **options), trace(lab, m)) for m in models]
    results = together(*(lambda m=m: lab.sample(m, steps=STEPS, cfg=3.0, **options) for m in models))
    for (expected, told), result, model in zip(alone, results, models, strict=True):
        assert torch.equal(result, expected)
        assert trace(lab, model) == told
    return alone


def test_h18_two_queues_with_models_of_their_own(lab, other):
    """A transformer and a U-Net, sites met through wrappers, replacement patches and object patches."""
    models = [
        lab.every(lab.flux, node="1"),
        other.every(other.flux, site="block stack", node="2"),
        lab.every(lab.unet, site="U-Net depth", node="3"),
    ]
    for _, told in same_as_alone(lab, models):
        assert sum(action != "computed" for action, *_ in told) >= 2


def test_h18_one_model_object_in_two_threads(lab):
    """The host ends a sampling by taking its patcher off the network, so of one network one is sampled at a time; but
    each time in another thread, as a server's workers do, and with other settings in between."""
    lock = threading.Lock()
    model, elsewhere = lab.every(lab.flux, node="1"), lab.every(lab.flux, 2, site="last block", node="2")
    jobs = [(model, 1), (elsewhere, 1), (model, 2), (elsewhere, 2)]
    alone = [lab.sample(m, steps=STEPS, cfg=3.0, seed=seed) for m, seed in jobs]

    def sample(m, seed):
        with lock:
            return lab.sample(m, steps=STEPS, cfg=3.0, seed=seed)

    results = together(*(lambda m=m, seed=seed: sample(m, seed) for m, seed in jobs))
    assert all(torch.equal(result, expected) for result, expected in zip(results, alone, strict=True))


def test_h18_better_weights_serve_the_thread_that_asks_for_them_alone(lab):
    """Two runs ask the same quantised layers at overlapping times, a third computes with them meanwhile."""
    model = quantise(lab.flux, QuantWish(rank=4, layers="single_blocks = keep"))
    lab.sample(model, steps=1)  # loads it
    references = [BetterWeights(model), BetterWeights(model, ORIGINAL)]
    layer, _ = next(iter(references[0].layers.values()))
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))

    def asked(reference):
        with torch.inference_mode():
            return reference.asked(lambda: layer(x))

    with torch.inference_mode():
        own = layer(x)
    alone = [asked(reference) for reference in references]
    assert relative(alone[0], own) > 1e-3 < relative(alone[1], own) and not torch.equal(*alone)

    def plain():
        with torch.inference_mode():
            return [layer(x) for _ in range(60)]

    def many(reference):
        return [asked(reference) for _ in range(20)]

    first, second, third = together(lambda: many(references[0]), lambda: many(references[1]), plain)
    assert all(torch.equal(y, alone[0]) for y in first)
    assert all(torch.equal(y, alone[1]) for y in second)
    assert all(torch.equal(y, own) for y in third)
    assert not [m for m in quantised(model).layers.values() if "forward" in vars(m)]


def test_h18_two_switched_runs(lab, other):
    def hybrid(bench, node):
        return add_switch(bench.every(bench.flux, node=node), emoji.load_small_flux(), SwitchConfig(0.5, node_id=node))

    models = [hybrid(lab, "1"), hybrid(other, "2")]
    alone = [lab.sample(m, steps=STEPS) for m in models]
    results = together(*(lambda m=m: lab.sample(m, steps=STEPS) for m in models))
    assert all(torch.equal(a, b) for a, b in zip(alone, results, strict=True))


class Executor:
    """What a wrapper of the host's sampling is given."""

    def __init__(self, patcher):
        self.class_obj = SimpleNamespace(model_patcher=patcher)

    def __call__(self, *args, **kwargs):
        return quantised(self.class_obj.model_patcher)


def test_h18_a_first_run_that_eight_threads_wait_for_happens_once(lab, monkeypatch):
    """Clones of one model, sampled at once: one measures, all get its layers."""
    made, found = [], Quantised({}, {})

    def make(*args):
        made.append(threading.get_ident())
        time.sleep(0.2)
        return found

    monkeypatch.setattr(first_run.Pending, "_make", make)
    waiting = quantise(lab.flux, QuantWish(layers="# eight threads", calibration=FIRST_RUN))
    pending = waiting.get_attachment(QUANTISED)
    clones = [waiting.clone() for _ in range(THREADS)]
    results = together(*(lambda c=c: pending.sample(Executor(c)) for c in clones))
    assert len(made) == 1 and all(result is found for result in results)


# What runs and nodes share


def globals_of_the_pack() -> dict[str, object]:
    """What every module-level name of the pack holds now: values, sizes of containers, fields of our own objects."""
    found = {}
    for name, module in list(sys.modules.items()):
        if not re.match(r"slipstream\.(engine|quant|kernels|host|nodes)\.", name):
            continue
        for key, value in vars(module).items():
            imported = callable(value) and getattr(value, "__module__", name) != name
            if not key.startswith("__") and not imported:
                found[f"{name.removeprefix('slipstream.')}.{key}"] = _content(value)
    return found


def _content(value: object) -> object:
    if isinstance(value, type | ModuleType):
        return id(value)
    if isinstance(value, Mapping | list | set):
        return len(value)
    if isinstance(value, int | float | str | bytes | None):
        return value
    if hasattr(type(value), "cache_info"):
        return value.cache_info().currsize
    if type(value).__module__.startswith("slipstream"):
        return {key: _content(held) for key, held in getattr(value, "__dict__", {}).items()}
    return id(value)


def test_h18_the_module_globals_that_runs_change_are_these(lab):
    """Each is bounded or goes with what it describes, and is behind a lock or made anew without harm."""
    known = {
        "host.canvas.events._reports",  # the last runs' numbers: 64 at most
        "host.canvas.strip.STRIPS",  # the last runs' strips: 64 nodes at most
        "host.quantise.quantise._MADE",  # goes with the network
        "host.compensate.reference._COPIES",  # go with the layers
        "kernels.dispatch._devices",  # one per card
        "kernels.dispatch._folder",  # where their choices are kept
        "kernels.derived._kept",  # goes with a weight's memory
        "kernels.reference.regular_hadamard",  # constants: eight at most
        "engine.calibration.statistics._weights_by_distance",  # constants
        "host.profiles.folder._read", "host.profiles.embedding._read",  # files as they are: bounded
        "kernels.implementations.triton_version", "kernels.implementations.kitchen",  # looked up once
    }  # fmt: skip
    before = globals_of_the_pack()
    model = add_compensator(lab.every(quantise(lab.flux, QuantWish(rank=4)), node="g"), CompensatorConfig(anchors=1))
    lab.sample(add_switch(model, emoji.load_small_flux(), SwitchConfig(0.5)), steps=STEPS)
    lab.sample(lab.every(lab.unet, site="U-Net encoder", node="h"), steps=STEPS)
    after = globals_of_the_pack()
    changed = {name for name, value in after.items() if name in before and before[name] != value}
    assert changed <= known, changed - known


class Loop:
    """The server's event loop: called from samplers' threads, runs in one of its own."""

    def __init__(self):
        self.calls: list[tuple] = []
        self.lock = threading.Lock()

    def call_soon_threadsafe(self, call, *arguments):
        with self.lock:
            self.calls.append((call, arguments))

    def call_later(self, seconds, call, *arguments):
        self.call_soon_threadsafe(call, *arguments)

    def turn(self):
        with self.lock:
            calls, self.calls = self.calls, []
        for call, arguments in calls:
            call(*arguments)


class Host:
    """As much of the host's server as the live strip needs; keeps what was sent."""

    def __init__(self):
        self.loop, self.client_id, self.last_prompt_id = Loop(), "page", "p"
        self.sent: list[tuple] = []
        item = (0, "p", {}, {"extra_pnginfo": {"workflow": {"id": "w"}}})
        self.prompt_queue = SimpleNamespace(get_current_queue=lambda: ([item], []))

    def send_sync(self, event, data, sid=None):
        json.dumps(data)  # as the host does; a cell that changes meanwhile would show here
        self.sent.append((event, data))


class Watched:
    """What the strip reads of a run."""

    def __init__(self, node: str):
        self.plan = SimpleNamespace(node_ids=(node,))
        self.evaluations: list = []
        self.clock = SimpleNamespace(steps=200)


def test_the_live_strip_loses_no_cell_of_eight_threads():
    """Eight runs send at once while the loop turns, pages come, and old runs are asked for."""
    strips, host, done = Strips(), Host(), threading.Event()

    def sample(number: int):
        run = Watched(f"n{number}")
        for index in range(150):
            drift = 0.1 if index % 3 == 0 else None
            action = "computed" if index % 3 == 0 else "forecast"
            now = SimpleNamespace(
                index=index, u=float(index), action=action, share=1.0, seconds=0.0, reason="", drift=drift, order=0
            )
            if drift is not None:
                for earlier in run.evaluations[-2:]:
                    earlier.drift = 0.05
            run.evaluations.append(now)
            strips.evaluation(host, run, now)
        strips.finished(host, run, {"text": f"{number}"})

    def serve():
        while not done.is_set():
            host.loop.turn()
            strips.open_page(f"page {len(host.sent)}")
            list(strips.of_workflow("w", {"p"}))

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    together(*(lambda i=i: sample(i) for i in range(THREADS)))
    done.set()
    server.join(10)
    seen: dict[int, dict[int, dict]] = {}
    for event, data in host.sent:
        if event == EVENT:
            seen.setdefault(data["run"], {}).update({cell["index"]: cell for cell in data["cells"]})
    assert len(seen) == THREADS and all(sorted(cells) == list(range(150)) for cells in seen.values())
    assert sum(event == FINISHED for event, _ in host.sent) == THREADS
    kept = list(strips.of_workflow("w"))
    assert len(kept) == THREADS and all(len(run["cells"]) == 150 and run["finished"] for run in kept)
    assert len(strips._by_node) <= KEPT_NODES


def test_reports_of_eight_threads_are_all_kept():
    report = dict.fromkeys(("evaluations", "filled", "computed", "seconds"), 0)
    report |= dict.fromkeys(("note", "remark", "chose", "sampler"), "")

    def finish(number: int):
        for again in range(20):
            plan = SimpleNamespace(node_ids=(f"t{number}-{again % 4}",))
            events.finished(SimpleNamespace(plan=plan, evaluations=[]), {**report, "mark": (number, again)})
            assert events.last_report(plan)["mark"] == (number, again)

    together(*(lambda i=i: finish(i) for i in range(THREADS)))


def test_kernels_are_chosen_and_layouts_made_once_for_eight_threads(monkeypatch):
    dispatch.reset()
    decided = []
    true = dispatch._decide
    monkeypatch.setattr(dispatch, "_decide", lambda *a: decided.append(a[1]) or true(*a))
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    layer = quantise_linear(weight, None, METHODS["rtn"]).layer
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    expected = layer(x, kernel="reference")
    results = together(*(lambda: [layer(x) for _ in range(10)] for _ in range(THREADS)))
    assert all(torch.equal(one, expected) for result in results for one in result)
    assert max(Counter(decided).values()) == 1
    values = together(*(lambda: [derived.derived(weight, "t", lambda t: t * 2) for _ in range(20)] for _ in range(8)))
    assert all(torch.equal(value, weight * 2) for made in values for value in made)
    assert len({value.data_ptr() for made in values for value in made}) == 1


def test_two_cards_of_one_kind_lose_none_of_each_others_choices(tmp_path):
    """They share a file, and each keeps what it measured when it measured it."""
    cards = [Choices(tmp_path, "card") for _ in range(THREADS)]
    entry = {"name": "reference", "config": [], "milliseconds": {}}
    together(*(lambda i=i, c=c: [c.keep(f"{i} {k}", entry) for k in range(10)] for i, c in enumerate(cards)))
    assert len(Choices(tmp_path, "card").entries) == 10 * THREADS
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_a_file_written_by_eight_threads_is_always_whole(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"0" * 4096)

    def write(number: int):
        for _ in range(20):
            write_whole(path, str(number).encode() * 4096)
            data = path.read_bytes()
            assert len(data) == 4096 and len(set(data)) == 1

    together(*(lambda i=i: write(i) for i in range(THREADS)))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
