"""What of the conditioning is in force at a noise level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def active_conditioning(conds: Sequence[Sequence[dict] | None], sigma: float) -> tuple:
    """What is switched on at this sigma: (cond index, uuid, controls in range, hooks) of every conditioning in range.

    conds: the lists the host evaluates together (positive, negative, ...). When this changes between two evaluations
    (prompt schedules, ControlNet ranges, LoRA hooks, a negative that appears) a forecast from before it is void.
    """
    active = []
    for index, group in enumerate(conds):
        for cond in group or ():
            start, end = cond.get("timestep_start"), cond.get("timestep_end")
            if (start is not None and sigma > float(start)) or (end is not None and sigma < float(end)):
                continue
            controls = []
            control = cond.get("control")
            while control is not None:
                reach = getattr(control, "timestep_range", None)
                controls.append(reach is None or reach[0] >= sigma >= reach[1])
                control = getattr(control, "previous_controlnet", None)
            active.append((index, cond.get("uuid"), tuple(controls), _hooked(cond.get("hooks"), sigma)))
    return tuple(active)


def _hooked(hooks: Any, sigma: float) -> tuple:
    """What the hooks of a conditioning do at sigma: (keyframes reached, strength in force) of each."""
    found = []
    for hook in getattr(hooks, "hooks", ()):
        group = getattr(hook, "hook_keyframe", None)
        reached = sum(frame.start_t >= sigma for frame in getattr(group, "keyframes", ()))
        found.append((reached, getattr(group, "strength", 1.0)))
    return tuple(found)
