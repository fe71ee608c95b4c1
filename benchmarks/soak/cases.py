"""Which requests a soak sends: an endless sequence, the same for the same seed. No I/O."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.pictures import photograph
from fluxserve.media.images import write_image
from fluxserve.request import DEFAULT_QUALITY

ABANDONED, BAD = 1 / 5, 1 / 20
"""Shares of the requests."""

REPEATED = 1 / 10
"""Share of the good requests that repeat a reference request, whose bytes are known."""

WITH_PICTURE = 1 / 5
"""Share of the good requests that bring a picture."""

FORMATS = ("png", "jpeg", "webp", "raw")
PROTOCOLS = ("grpc", "http")
WAYS = ("deadline", "task cancelled", "control", "hung up")
"""How a caller gives up: by its deadline, by cancelling its task, through another caller's `cancel`, or unannounced."""

IN_USE = "id in use"
_COLOURS = ("red", "green", "blue", "yellow", "purple")
_THINGS = ("apple", "fox", "fire truck", "house", "umbrella")
_PICTURE = write_image(photograph((160, 128)), "png", DEFAULT_QUALITY)

_WRONG: tuple[tuple[str, dict[str, Any]], ...] = (
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": "a" * 5000}),
    ("prompt", {"prompt": "a\x00b"}),
    ("height", {"height": 17}),
    ("width", {"width": 100_000}),
    ("num_inference_steps", {"num_inference_steps": 0}),
    ("num_images", {"num_images": 9}),
    ("seed", {"seed": -2}),
    ("guidance_scale", {"guidance_scale": float("nan")}),
    ("strength", {"image": _PICTURE, "strength": 2.0}),
    ("output_format", {"output_format": "bmp"}),
    ("quality", {"quality": 0}),
    ("image", {"image": b"what is this"}),
    ("image", {"image": _PICTURE[:-300]}),
    (IN_USE, {}),
)
"""The field at fault, and what is wrong with it."""


@dataclass(frozen=True)
class Shape:
    """Bounds of the requests. steps: of a good one; long_steps: of one that is given up while it is drawn."""

    sides: tuple[int, ...] = (64, 96, 128, 192, 256)
    steps: int = 4
    long_steps: int = 50
    strength: bool = True
    """Whether the model redraws a picture (FLUX.1); False: it takes references (FLUX.2)."""


@dataclass(frozen=True)
class Case:
    """One request.

    what: "" for a good request, or the number of the reference request that it repeats; how an abandoned one is given
    up; the field at fault of a bad one. delay: seconds until an abandoned request is given up.
    """

    number: int
    kind: str
    what: str
    protocol: str
    fields: Mapping[str, Any] = field(repr=False)
    delay: float = 0.0


def references(shape: Shape) -> list[Case]:
    """Return the requests whose bytes must not change: each format, several images, a picture, the largest size."""
    small, large = shape.sides[0], shape.sides[-1]
    picture = {"image": _PICTURE} | ({"strength": 0.7} if shape.strength else {})
    variants: list[dict[str, Any]] = [
        *({"output_format": name, "height": small, "width": large} for name in FORMATS),
        {"output_format": "png", "height": small, "width": small, "num_images": 2},
        {"output_format": "png", "height": small, "width": small, **picture},
        {"output_format": "raw", "height": large, "width": large},
    ]
    common = {"prompt": "a red apple on a white background", "seed": 7, "num_inference_steps": shape.steps}
    return [Case(k, "reference", str(k), PROTOCOLS[k % 2], common | variant) for k, variant in enumerate(variants)]


def cases(seed: int, shape: Shape) -> Iterator[Case]:
    """Yield requests for ever. The sequence depends on the seed and the shape alone."""
    rng, known = random.Random(seed), references(shape)  # noqa: S311 (load, no secrets)
    number = 0
    while True:
        number += 1
        draw, protocol = rng.random(), rng.choice(PROTOCOLS)
        fields = _good(rng, shape)
        if draw < BAD:
            what, wrong = rng.choice(_WRONG)
            long = {"num_inference_steps": shape.long_steps} if what == IN_USE else {}
            yield Case(number, "bad", what, protocol, fields | long | wrong)
        elif draw < BAD + ABANDONED:
            long = fields | {"num_inference_steps": shape.long_steps}
            yield Case(number, "abandoned", rng.choice(WAYS), protocol, long, rng.uniform(0.02, 0.5))
        elif rng.random() < REPEATED:
            again = rng.choice(known)
            yield Case(number, "good", again.what, protocol, again.fields)
        else:
            yield Case(number, "good", "", protocol, fields)


def _good(rng: random.Random, shape: Shape) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "prompt": f"a {rng.choice(_COLOURS)} {rng.choice(_THINGS)} on a {rng.choice(_COLOURS)} background",
        "height": rng.choice(shape.sides),
        "width": rng.choice(shape.sides),
        "num_inference_steps": rng.randint(1, shape.steps),
        "num_images": rng.choice((1, 1, 1, 2)),
        "seed": rng.randrange(2**32),
        "output_format": rng.choice(FORMATS),
    }
    if rng.random() < WITH_PICTURE:
        fields |= {"image": _PICTURE} | ({"strength": round(rng.uniform(0.2, 1.0), 2)} if shape.strength else {})
    return fields
