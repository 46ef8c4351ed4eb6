"""How large the live view's pictures are and when the next one is due, so that training hardly notices."""

from __future__ import annotations

BLOCK_SECONDS = 0.050
"""No picture is planned to hold up training for longer."""
STILL_SHARE = 0.2
"""Most of the time that pictures take while nobody moves."""
_MOVING_SHARE = 0.5  # while somebody does
# What a picture is planned to take. Where the smallest takes nearly as long already, half as much again, up to
# _MOST_SECONDS; the rest of BLOCK_SECONDS is for a scene that costs more from elsewhere.
_MOVING_SECONDS, _STILL_SECONDS, _PAUSED_SECONDS = 0.020, 0.035, 0.080
_MOST_SECONDS = 0.038
_SETTLE_SECONDS = 0.25  # after the last change until the camera counts as still
_REFRESH_SECONDS = 0.25  # between complete pictures of a scene that trains
_SELDOM_SECONDS = 2.0  # between pictures when even the smallest breaks the bound
_FIRST_PIXELS, _LEAST_PIXELS = 10_000, 2_500
_GROWTH = 4.0  # in pixels, from one picture to the next


class Pace:
    """One client's pictures. Used by the training thread alone; every `now` is in seconds of one steady clock.

    Every primitive costs time, however small the picture, and so does every pixel: the plan is a line, through the time
    that the smallest pictures took and the seconds a pixel by which larger ones took longer.
    """

    def __init__(self) -> None:
        self._smallest: float | None = None  # seconds of a picture of _FIRST_PIXELS or less
        self._rate = 0.0  # seconds a pixel beyond _FIRST_PIXELS
        self._limit = _FIRST_PIXELS  # for the next picture
        self._cost = 0.0  # of the last picture, encoding included, seconds
        self._changed = float("-inf")
        self._drawn = float("-inf")
        self._pending = True  # a change has not been drawn yet
        self._complete = False  # the last picture had all the pixels there are

    @property
    def drawn_at(self) -> float:
        """When the last picture was drawn."""
        return self._drawn

    def changed(self, now: float, *, jump: bool) -> None:
        """The client wants another picture; `jump`: of something else, which may take far longer or shorter to draw."""
        self._changed, self._pending, self._complete = now, True, False
        if jump:
            self._limit = min(self._limit, _FIRST_PIXELS)

    def due(self, now: float, *, paused: bool = False, clients: int = 1) -> bool:
        """Whether to draw now; `clients` share the time that pictures may take."""
        moving = now - self._changed < _SETTLE_SECONDS
        if paused:
            return self._pending or not (moving or self._complete)
        if moving and not self._pending:
            return False
        share = _MOVING_SHARE if self._pending else STILL_SHARE
        rest = self._cost * (clients / share - 1)
        if self._complete:
            rest = max(rest, _REFRESH_SECONDS)
        if self._smallest is not None and self._smallest > BLOCK_SECONDS:
            rest = max(rest, _SELDOM_SECONDS)
        return now - self._drawn >= rest

    def pixels(self, now: float, full: int, *, paused: bool = False) -> int:
        """How many of the `full` pixels to draw now."""
        moving = now - self._changed < _SETTLE_SECONDS
        if paused and not moving:
            return full
        if self._smallest is None:
            return min(self._limit, full)
        if self._smallest > _MOST_SECONDS and not paused:
            return min(_LEAST_PIXELS, full)
        wished = _PAUSED_SECONDS if paused else _MOVING_SECONDS if moving else _STILL_SECONDS
        seconds = max(wished, min(1.5 * self._smallest, _MOST_SECONDS))
        more = (seconds - self._smallest) / max(self._rate, 1e-12)
        return max(min(int(_FIRST_PIXELS + more), self._limit, full), min(_FIRST_PIXELS, full))

    def drawn(self, now: float, pixels: int, seconds: float, *, complete: bool, encoding: float = 0.0) -> None:
        """A picture of `pixels` was drawn in `seconds`, ending now; encoding one takes `encoding` seconds elsewhere."""
        # What slows a single picture is often another program: it counts half, unless it broke the bound.
        weight = 0.5 if seconds <= BLOCK_SECONDS else 1.0
        if self._smallest is None:
            self._smallest = seconds
        elif pixels <= 1.5 * _FIRST_PIXELS:
            self._smallest += (0.5 if seconds > self._smallest else 1.0) * (seconds - self._smallest)
        else:
            rate = max(0.0, seconds - self._smallest) / (pixels - _FIRST_PIXELS)
            self._rate += weight * (rate - self._rate)
            self._smallest = min(self._smallest, seconds)
        self._limit = max(int(_GROWTH * pixels), _FIRST_PIXELS)
        self._cost = seconds + encoding
        self._drawn, self._pending, self._complete = now, False, complete
