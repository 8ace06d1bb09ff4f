"""What is fuzzed: every file that is read and every value that is accepted. Needs a booted host."""

from __future__ import annotations

from .fuzz_files import KernelChoices, Layers, Models, Nunchaku, Profiles, Pruned, SampledProfiles
from .fuzz_requests import Answers, Embedded, Plans, Routes, Servers
from .fuzz_widgets import Prompts, Widgets

TARGETS = (
    Profiles, SampledProfiles, Embedded, Routes, Layers, Models, Pruned, Nunchaku, KernelChoices, Servers, Answers,
    Plans, Widgets, Prompts,
)  # fmt: skip
