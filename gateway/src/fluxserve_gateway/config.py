"""Hold what an operator decides, in one frozen place. `cli` fills it."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Config:
    """Bounds a gateway. Every bound on a body is enforced while the body arrives, not after.

    Attributes:
        max_body: bytes of one form, or of one JSON body with its data URLs.
        max_bodies: bytes of all bodies that are held at the same time.
        max_requests: pictures' requests at the same time; one more is answered 503.
        max_images: input images of one edit.
        max_image_pixels: pixels of one input image, by its header.
        body_timeout: seconds for a body to arrive.
        request_timeout: seconds from the body's end to the answer.
        send_timeout: seconds for which a caller may leave a part of the answer unread.
        probe_interval: seconds between two questions to a server whether it is ready.
        log_prompts: whether prompts are logged.
        cors_origins: web pages of other origins that may call; none by default.
        https: whether answers require TLS of browsers from now on (HSTS).
    """

    max_body: int = 64 * MIB
    max_bodies: int = 512 * MIB
    max_requests: int = 256
    max_images: int = 16
    max_image_pixels: int = 32 * MIB
    body_timeout: float = 60.0
    request_timeout: float = 300.0
    send_timeout: float = 60.0
    probe_interval: float = 2.0
    log_prompts: bool = False
    cors_origins: tuple[str, ...] = ()
    https: bool = False
