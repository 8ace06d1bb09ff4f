"""One segment of a sampling run on another, unmodified ComfyUI server.

Remote work is done by the segment, never by the step. A job has an id of ours and saves under that id, so that after a
lost answer the job is looked for and not sent again; when the server has lost it (a restart), it is sent once more
under a new id, which a server that still has the samples answers from its cache with a full result.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...engine.errors import SlipstreamError
from ...engine.run.samplers import sampler_traits
from . import graph as job
from .dialects import Gateway, Native, State, connect, patiently, pause, understood
from .graph import Part, RemoteModel
from .http import NODE, Connection, NoAnswer, RemoteUnavailable, locate

log = logging.getLogger("slipstream")

# Seconds without any answer after which a server counts as gone: at the start, and while it works for us. These and the
# next are chosen: a loading model can keep a server silent for half a minute, and a user waits no longer than that.
ABSENT, PATIENCE = 5.0, 45.0
# After a lost answer to a submission the server may still be reading it.
GRACE = 3.0
SUBMISSIONS = 2
# Between two questions, growing; a local answer takes 2 ms.
POLL, POLL_MOST = 0.1, 1.0
FOLDER = "slipstream"
# Bytes of a result: its header holds the job's graph; a blank may come back with 32 times the channels (FLUX.2).
HEADER, WIDER = 1 << 20, 32

Shown = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class RemoteReport:
    """What a remote segment cost. waited: seconds in the server's queue; sent, received: bytes of latents."""

    place: str
    model: str
    steps: int
    seconds: float
    waited: float
    sent: int
    received: int
    submissions: int

    def sentence(self) -> str:
        waited = f", {self.waited:.1f} s of them queued" if self.waited >= 0.5 else ""
        again = f"; the server lost the job {self.submissions - 1} time" if self.submissions > 1 else ""
        return (
            f"{self.steps} steps of {self.model} on {self.place} in {self.seconds:.1f} s{waited}; "
            f"{self.sent / 1e6:.2f} MB sent, {self.received / 1e6:.2f} MB received{again}"
        )


@dataclass(frozen=True, slots=True)
class RemoteSegment:
    """A runner for one span of steps. server: a name in the settings file or an address; timeout: seconds for all."""

    server: str
    model: RemoteModel
    timeout: float = 900.0

    def sample(self, samples: Tensor, part: Part, local=None, tell: Shown | None = None) -> tuple[Tensor, RemoteReport]:
        """Sample `part` from a LATENT's samples [B, C, ...]; return what the host's SamplerCustom would.

        local: the model whose schedule the sigmas are of; only servers of before December 2025 need it. Raises
        RemoteUnavailable where another place may do the work, SlipstreamError where the user must act, and the host's
        interruption after the job there was cancelled.
        """
        session = _Session(self, part, local, tell or (lambda text, share: None))
        try:
            return session.run(samples)
        except SlipstreamError as error:  # what a server says may repeat the token; nothing else is shown of it
            raise type(error)(session.connection.without_token(str(error))) from None


class _Session:
    """One run of a segment: the connection, the deadline, and the job that is under way."""

    def __init__(self, segment: RemoteSegment, part: Part, local, tell: Shown):
        self.segment, self.part, self.local, self.tell = segment, part, local, tell
        self.address = locate(segment.server)
        self.place = self.address.place
        self.connection = Connection(self.address, self.pulse)
        self.began = time.monotonic()
        self.waited = 0.0
        self.submissions = 0

    def pulse(self) -> None:
        """Called all the time; raises when the user cancels or the time is up."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if time.monotonic() - self.began > self.segment.timeout:
            raise RemoteUnavailable(f"{NODE}: {self.place} was not ready within {self.segment.timeout:g} s.")

    def patiently(self, ask: Callable, seconds: float | None = None):
        return patiently(ask, PATIENCE if seconds is None else seconds, self.pulse, self.place)

    def run(self, samples: Tensor) -> tuple[Tensor, RemoteReport]:
        part, model = self.part, self.segment.model
        self.tell(f"asking {self.place}", 0.02)
        api = self.patiently(lambda: connect(self.connection), ABSENT)
        nodes, source, clip = self.patiently(lambda: job.loaders(api, model, self.place))
        text = job.prompts(model, part, clip)
        plan = self.patiently(lambda: job.schedule(api, part.sigmas, source, self.local, self.place))
        if plan.probed:
            self._probe(api, nodes, source, plan)
        data, start, latent = job.start(samples)
        self.tell(f"sending {len(data) / 1e6:.2f} MB to {self.place}", 0.05)
        start["latent"]["inputs"]["latent"] = self.patiently(lambda: api.upload(job.file_name(data), data))

        def graph(mark: str) -> dict:
            return {**nodes, **start, **job.sampling(source, text, part, plan, latent, f"{FOLDER}/{mark}")}

        outputs, mark = self._execute(api, graph, f"{part.steps} steps")
        self.tell(f"fetching the result from {self.place}", 0.95)
        limit = HEADER + 4 * samples.numel() * (WIDER if job.empty(samples) else 1)
        received = 0

        def fetch() -> Tensor:
            nonlocal received
            file = api.download(outputs, job.SAVE, f"{FOLDER}/{mark}", limit)
            received = len(file)
            return job.unpacked(file)

        done = self._checked(self.patiently(fetch), samples)
        report = RemoteReport(
            self.place, model.name, part.steps, time.monotonic() - self.began, self.waited, len(data), received,
            self.submissions,
        )  # fmt: skip
        log.info("Slipstream: %s", report.sentence())
        return done, report

    def _probe(self, api: Native | Gateway, nodes: dict, source: list, plan: job.Schedule) -> None:
        outputs, _ = self._execute(api, lambda mark: job.probe(nodes, source, plan, mark), "its schedule")
        if not job.agrees(outputs, self.part.sigmas, self.local):
            raise SlipstreamError(
                f"{NODE}: '{self.segment.model.name}' on {self.place} has another schedule than the connected model "
                "(another shift or prediction type), and that ComfyUI takes no list of sigmas; update it."
            )

    def _checked(self, done: Tensor, samples: Tensor) -> Tensor:
        same = done.shape == samples.shape
        if job.empty(samples):  # the server fits a blank's channels, and a picture's frames, to its model
            same = (done.shape[0], *done.shape[-2:]) == (samples.shape[0], *samples.shape[-2:])
        if not same:
            raise SlipstreamError(
                f"{NODE}: {self.place} was given a latent of {list(samples.shape)} and returned {list(done.shape)}; "
                f"'{self.segment.model.name}' is of another kind than this latent."
            )
        if not torch.isfinite(done).all():
            raise RemoteUnavailable(f"{NODE}: {self.place} returned values that are not finite.")
        return done

    def _execute(self, api: Native | Gateway, graph: Callable[[str], dict], what: str) -> tuple[dict, str]:
        """(outputs, id) of a job that ran to its end."""
        for _ in range(SUBMISSIONS):
            mark = str(uuid.uuid4())
            try:
                state = self._follow(api, graph(mark), mark, what)
            except BaseException:
                self._abandon(api, mark)
                raise
            if state.kind == "done":
                return state.outputs, mark
            if state.kind == "failed":
                raise RemoteUnavailable(f"{NODE}: the job on {self.place} failed: {state.message}")
            if state.kind == "cancelled":
                raise RemoteUnavailable(f"{NODE}: the job was cancelled on {self.place}.")
            log.warning("Slipstream: %s does not know the job any more; it is sent again", self.place)
        raise RemoteUnavailable(f"{NODE}: {self.place} lost the job {SUBMISSIONS} times.")

    def _follow(self, api: Native | Gateway, graph: dict, mark: str, what: str) -> State:
        """Submit and ask until the job has ended or is absent."""
        sent, known = time.monotonic(), True
        self.submissions += 1 if job.SAVE in graph else 0
        try:
            understood(lambda: api.submit(graph, mark), self.place)
        except NoAnswer:
            known = False  # whether it arrived is asked below; sending it again would run it twice
        wait = POLL
        while True:
            state = self.patiently(lambda: api.state(mark))
            if state.kind in ("done", "failed", "cancelled"):
                return state
            if state.kind == "absent" and (known or time.monotonic() - sent > GRACE):
                return state
            known = known or state.kind != "absent"
            seconds = time.monotonic() - sent
            if state.kind == "queued":
                self.waited = seconds
                self.tell(f"queued on {self.place}, {state.ahead} before it, {seconds:.0f} s", 0.1)
            else:
                self.tell(f"{what} on {self.place}, {seconds:.0f} s", 0.2)
            pause(wait, self.pulse)
            wait = min(1.5 * wait, POLL_MOST)

    def _abandon(self, api: Native | Gateway, mark: str) -> None:
        """Cancel the job there, as well as it goes; the connection no longer listens for a cancel here."""
        self.connection.pulse = lambda: None
        with contextlib.suppress(NoAnswer, SlipstreamError):
            understood(lambda: api.cancel(mark), self.place)


@dataclass(frozen=True, slots=True)
class Here:
    """What takes over where the server cannot: a local MODEL with its CONDITIONING. Each may be None."""

    model: object | None = None
    positive: list | None = None
    negative: list | None = None

    def ready(self, part: Part) -> bool:
        return None not in (self.model, self.positive) and (self.negative is not None or part.cfg == 1.0)

    def sample(self, samples: Tensor, part: Part, callback=None) -> Tensor:
        """The segment as the host's SamplerCustom does it."""
        samples = comfy.sample.fix_empty_latent_channels(self.model, samples)
        noise = torch.zeros_like(samples, device="cpu")
        if part.add_noise:
            noise = comfy.sample.prepare_noise(samples, part.seed)
        negative = self.positive if self.negative is None else self.negative
        return comfy.sample.sample_custom(
            self.model, noise, part.cfg, comfy.samplers.sampler_object(part.sampler), torch.tensor(part.sigmas),
            self.positive, negative, samples, callback=callback, disable_pbar=True, seed=part.seed,
        )  # fmt: skip


def sample_latent(
    segment: RemoteSegment, latent: dict, part: Part, here: Here, tell: Shown, callback=None
) -> tuple[dict, str]:
    """(LATENT, what was done in one sentence). `here` takes over where the server cannot and it is complete."""
    for key, what in (("noise_mask", "a mask"), ("batch_index", "numbers of its pictures within a batch")):
        if latent.get(key) is not None and (part.add_noise or key == "noise_mask"):
            raise SlipstreamError(
                f"{NODE}: the latent carries {what}, which the file format between servers does not; sample this part "
                "locally or remove it."
            )
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        raise SlipstreamError(
            f"{NODE}: a latent of several tensors (picture with sound) cannot be sent; sample it here."
        )
    if not part.steps:
        return latent, "no step in this part"
    try:
        done, report = segment.sample(samples, part, here.model, tell)
        sentence = report.sentence()
    except RemoteUnavailable as error:
        if not here.ready(part):
            wanted = "model, positive_here and negative_here"
            raise RemoteUnavailable(f"{error} Connect {wanted}, and the part is sampled here instead.") from None
        log.warning("Slipstream: %s The segment is sampled here.", error)
        tell("the server is not available; sampling here", 0.0)
        began = time.monotonic()
        done = here.sample(samples, part, callback)
        sentence = f"{part.steps} steps sampled here in {time.monotonic() - began:.1f} s, because {_because(error)}"
    done_latent = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    return {**done_latent, "samples": done}, sentence + remark(part)


def _because(error: Exception) -> str:
    return str(error).removeprefix(f"{NODE}: ").rstrip(".")


def remark(part: Part) -> str:
    """What a boundary costs with this sampler; empty where it costs nothing."""
    traits = sampler_traits(comfy.samplers.sampler_object(part.sampler))
    if traits.stochastic and not part.add_noise:
        return f"; {traits.name} adds noise, so give this part another noise_seed than the one before"
    whole = part.add_noise and not part.sigmas[-1]
    if not whole and traits.remembers:
        return f"; {traits.name} starts anew at the boundary, euler and heun go on as if there were none"
    return ""
