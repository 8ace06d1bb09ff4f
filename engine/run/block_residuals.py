"""What single blocks have added, for the site that skips blocks one by one."""

from __future__ import annotations

from collections.abc import Callable

from ..forecast.history import History, Storage
from ..forecast.schedules import BlockMask
from ..sites.calls import Key, Keys, Parts
from .evaluation import Open
from .streams import NoRoom, Streams, nbytes


class BlockResiduals:
    """The newest residual of every block of every stream, kept beside the run's other histories.

    opened: gives the open evaluation; refuse: the run's.
    """

    def __init__(self, mask: BlockMask, streams: Streams, opened: Callable[[], Open], refuse: Callable[[str], None]):
        self.mask, self.streams, self.opened, self.refuse = mask, streams, opened, refuse
        self._places: dict[Key, Storage] = {}  # of a stream, all blocks together

    def residuals(self, keys: Keys, block: int) -> list[Parts] | None:
        """What this block added to these streams when it last ran, to be read only; None where it has to run."""
        now = self.opened().now
        if not now.fill or self.mask.computes(self.mask.step(now.u), block):
            return None
        found = self.streams.stored([(*key, block) for key in keys])
        return None if found is None else [history.last for history in found]

    def keeps(self, block: int) -> bool:
        """Whether what this block adds now is reused at the next step."""
        return self.mask.keeps(self.mask.step(self.opened().now.u), block)

    def keep(self, keys: Keys, block: int, chunks: list[Parts] | None) -> None:
        """Store what this block has added, handed over; None drops what it added before, which is out of date.

        Room is found once per stream, for all blocks that the table ever reuses.
        """
        streams = self.streams
        with streams.lock:
            for i, key in enumerate(keys):
                name = (*key, block)
                if chunks is None:
                    streams.histories.pop(name, None)
                    continue
                if key not in self._places:
                    try:
                        self._places[key] = streams.room(nbytes(chunks[i]) * self.mask.reused, chunks[i][0].device)
                    except NoRoom as error:
                        self.refuse(str(error))
                        return
                history = streams.histories.setdefault(name, History(1, self._places[key]))
                history.push(self.opened().now.u, chunks[i], owned=True)

    def count(self, ran: bool) -> None:
        """Count a block of this evaluation as run or reused."""
        opened = self.opened()
        opened.kept = True
        with self.streams.lock:
            opened.ran += ran
            opened.reused += not ran

    def forget(self) -> None:
        """Drop what was planned; the residuals go with the other histories."""
        self._places.clear()
