"""How many pixels may be decoded at once by all threads together."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator

PIXELS_IN_FLIGHT = 128_000_000  # eight readers at pictures of 16 megapixels; Pillow needs 4 to 12 bytes a pixel


class PixelsInFlight:
    """Lets threads decode as long as all of them hold at most `most` pixels; whoever would exceed that waits.

    A picture of more pixels than that is decoded alone. A thread that holds some already gets more without waiting: it
    could wait for itself. Nobody waits for ever, because readers work a bounded number of pictures ahead.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._held: Counter[int] = Counter()  # pixels by thread
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def holding(self, pixels: int) -> Iterator[None]:
        """Hold so many pixels until the context ends."""
        thread = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._fits(pixels, thread))
            self._held[thread] += pixels
        try:
            yield
        finally:
            with self._changed:
                self._held[thread] -= pixels
                if not self._held[thread]:
                    del self._held[thread]
                self._changed.notify_all()

    def _fits(self, pixels: int, thread: int) -> bool:
        held = self._held.total()
        return held == 0 or held + pixels <= self.most or self._held[thread] > 0


in_flight = PixelsInFlight(PIXELS_IN_FLIGHT)
