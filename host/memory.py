"""Where a run's snapshots may lie: on the card while they fit the budget, else in RAM, else in 8 bits, else nowhere."""

from __future__ import annotations

from dataclasses import dataclass, field

import comfy.model_management
import torch

from ..engine.forecast.history import Storage
from ..engine.run.plan import DEVICES

# Without a budget of the user's own the history may take this share of what is free on the card. Chosen, not measured:
# the next forward's activations and the VAE have to find room in the rest.
AUTOMATIC_SHARE = 0.25

# 8-bit snapshots: one byte for two or four, and a scale per row.
INT8_SHARE = 0.55


@dataclass(slots=True)
class Memory:
    """The budget of one run. choice: a key of DEVICES; budget_mb: 0 means automatic.

    Whatever the choice, the budget holds: what does not fit goes to RAM (with a card) or into 8 bits (without one).
    """

    choice: str = "auto"
    budget_mb: int = 0
    planned: int = 0
    full: bool = False
    places: set[str] = field(default_factory=set)

    def limit(self, device: torch.device) -> float:
        """Bytes that the history may take on `device`."""
        if self.budget_mb:
            return self.budget_mb * 1e6
        if device.type == "cpu":
            return float("inf")
        return AUTOMATIC_SHARE * comfy.model_management.get_free_memory(device)

    def place(self, nbytes: int, device: torch.device) -> Storage | None:
        """Where a new stream of `nbytes` goes; None where there is no room. Counts it, and tells the host's manager."""
        wanted = DEVICES[self.choice]
        compact = int(nbytes * INT8_SHARE)
        order = {
            None: (Storage.DEVICE, Storage.RAM, Storage.INT8),
            Storage.DEVICE: (Storage.DEVICE, Storage.RAM, Storage.INT8),
            Storage.INT8: (Storage.INT8, Storage.RAM),
            Storage.RAM: (Storage.RAM, Storage.INT8),
        }[wanted]
        left = self.limit(device) - self.planned
        for storage in order:
            on_device = storage is not Storage.RAM or device.type == "cpu"
            size = compact if storage is Storage.INT8 else nbytes
            if on_device:
                if size > left or not _make_room(size, device):
                    continue
                self.planned += size
            self.places.add(storage.value if storage is not Storage.DEVICE else str(device.type))
            return storage
        self.full = True
        return None


def _make_room(size: int, device: torch.device) -> bool:
    """Let the host free `size` bytes of a card; whether they are free. Models in use stay: this is asked for in the
    middle of a forward, and left to itself the host would unload the network that is running."""
    if device.type == "cpu":
        return True
    running = [loaded for loaded in comfy.model_management.current_loaded_models if loaded.currently_used]
    comfy.model_management.free_memory(size, device, keep_loaded=running)
    return comfy.model_management.get_free_memory(device) >= size
