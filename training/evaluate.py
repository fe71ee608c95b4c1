"""Prompts by which the model is watched and judged."""

import random
from typing import TYPE_CHECKING

from torch import Tensor

from training.grammar import COLOUR_NAMES, SIZES, Picture, ask, caption, held_out_pairs, training_pairs
from training.objects import OBJECTS

if TYPE_CHECKING:
    from training.sample import Painter

_SHOWN = (
    ("fox", "blue"),
    ("red-apple", "white"),
    ("owl", "purple"),
    ("rocket", "black"),
    ("cactus", "orange"),
    ("automobile", "teal"),
    ("castle", "pink"),
    ("butterfly", "green"),
    ("cupcake", "yellow"),
    ("guitar", "grey"),
    ("snowman", "brown"),
    ("penguin", "red"),
)


def ask_for(which: str, count: int, seed: int) -> tuple[list[str], list[tuple[int, int]]]:
    """Prompts that name a colour, and the (object, colour) pairs they ask for.

    Args:
        which: "seen" for captions of the training grammar, in every size; "held_out" for pairs never drawn.
    """
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    pool = sorted(held_out_pairs()) if which == "held_out" else training_pairs()
    pairs = rng.sample(pool, count)
    sizes = [rng.choice(("medium", "medium", "medium", *SIZES)) for _ in pairs]
    prompts = [caption(Picture(*pair, size), rng, say_colour=1.0) for pair, size in zip(pairs, sizes, strict=True)]
    return prompts, pairs


def shown_pairs() -> list[tuple[int, int]]:
    """The twelve pairs of the contact sheet."""
    icons = [thing.icon for thing in OBJECTS]
    return [(icons.index(icon), COLOUR_NAMES.index(colour)) for icon, colour in _SHOWN]


def contact_sheet(painter: "Painter", **how: float) -> Tensor:
    """The same twelve prompts in three sizes, with the same seeds every time: uint8 [36, 128, 128, 3]."""
    prompts = [ask(pair, size) for size in ("medium", "small", "big") for pair in shown_pairs()]
    return painter.paint(prompts, list(range(len(prompts))), steps=20, **how)
