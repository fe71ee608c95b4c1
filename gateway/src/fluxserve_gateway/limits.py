"""Count what each key uses: requests and pixels in the last minute (token buckets), and requests at the same time.

Counted in memory, by each gateway for itself: with N gateways behind a balancer a key may use up to N times its limits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fluxserve_gateway.errors import RateLimited
from fluxserve_gateway.keys import Key

_MINUTE_S = 60.0


@dataclass
class Bucket:
    """Holds a minute's allowance, and is refilled evenly. What was spent beyond it is owed."""

    per_minute: int
    now: Callable[[], float]
    level: float = field(init=False)
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self.level = self.per_minute
        self._at = self.now()

    def wait(self, amount: float) -> float:
        """Return the seconds until `amount` is there; 0 if it is."""
        now = self.now()
        self.level = min(self.per_minute, self.level + (now - self._at) * self.per_minute / _MINUTE_S)
        self._at = now
        return max(0.0, (amount - self.level) * _MINUTE_S / self.per_minute)

    def take(self, amount: float) -> None:
        """Spend `amount`, perhaps more than is there; a negative one gives back."""
        self.level -= amount


@dataclass
class _Usage:
    requests: Bucket | None
    pixels: Bucket | None
    running: int = 0


class Usage:
    """Counts the usage of all keys at one gateway."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._of: dict[str, _Usage] = {}

    def enter(self, key: Key) -> Callable[[], None]:
        """Count a request that begins, before its body is read.

        Returns:
            A function to call once, at the request's end.

        Raises:
            RateLimited: the key has as many requests at a time, or in the last minute, as it may, or owes pixels;
                nothing was counted.
        """
        usage, limits = self._usage(key), key.limits
        if limits.at_a_time and usage.running >= limits.at_a_time:
            message = f"this key has {usage.running} requests at a time; allowed: {limits.at_a_time}"
            raise RateLimited(message, retry_after=1.0)
        if usage.requests and (wait := usage.requests.wait(1)):
            message = f"this key may send {limits.requests_per_minute} requests a minute; try again in {wait:.1f} s"
            raise RateLimited(message, retry_after=wait)
        self._check_pixels(key, usage, 1)
        if usage.requests:
            usage.requests.take(1)
        usage.running += 1

        def leave() -> None:
            usage.running -= 1

        return leave

    def admit(self, key: Key, pixels: int) -> Callable[[int], None]:
        """Count the pixels that a request asks for.

        Returns:
            A function to call once, at the request's end, with the pixels that were drawn.

        Raises:
            RateLimited: beyond a limit of the key; no pixel was counted.
        """
        usage = self._usage(key)
        most = key.limits.pixels_per_minute
        if most and pixels > most:
            message = f"size: got {pixels} pixels in all; allowed for this key: {most} a minute"
            raise RateLimited(message, param="size", should_retry=False)
        self._check_pixels(key, usage, pixels)
        if usage.pixels:
            usage.pixels.take(pixels)

        def end(drawn: int) -> None:
            if usage.pixels:
                usage.pixels.take(drawn - pixels)

        return end

    def _usage(self, key: Key) -> _Usage:
        limits = key.limits
        if key.id not in self._of:
            self._of[key.id] = _Usage(self._bucket(limits.requests_per_minute), self._bucket(limits.pixels_per_minute))
        return self._of[key.id]

    def _bucket(self, per_minute: int | None) -> Bucket | None:
        return None if per_minute is None else Bucket(per_minute, self._now)

    @staticmethod
    def _check_pixels(key: Key, usage: _Usage, pixels: int) -> None:
        if usage.pixels and (wait := usage.pixels.wait(pixels)):
            most = key.limits.pixels_per_minute
            message = f"this key may draw {most} pixels a minute; try again in {wait:.1f} s"
            raise RateLimited(message, retry_after=wait)
