"""What pictures exist and what they are called: colours, sizes, captions, and the held-out pairs.

A picture is an object, a background colour and a size. Some object–colour pairs are never drawn for
training, so that drawing one shows that the model composes and does not only recall.
"""

import random
from dataclasses import dataclass

from training.objects import OBJECTS, Thing

COLOURS: dict[str, tuple[int, int, int]] = {  # sRGB, 0-255
    "white": (248, 248, 248),
    "black": (22, 22, 26),
    "grey": (146, 150, 156),
    "red": (214, 44, 44),
    "orange": (244, 138, 32),
    "yellow": (250, 212, 58),
    "green": (62, 168, 78),
    "teal": (24, 156, 156),
    "blue": (52, 112, 220),
    "purple": (132, 74, 190),
    "pink": (246, 158, 196),
    "brown": (122, 78, 48),
}
COLOUR_NAMES = tuple(COLOURS)
_SPELLINGS = {"grey": ("grey", "gray"), "purple": ("purple", "violet")}

# Side of the icon over the shorter side of the picture. An unsaid size is a medium one.
SIZES: dict[str, tuple[float, ...]] = {
    "small": (0.41, 0.44, 0.47),
    "medium": (0.66, 0.69, 0.72, 0.75, 0.78, 0.81, 0.84),
    "big": (0.90, 0.925, 0.95),
}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "big": ("big", "big", "large", "huge"), "medium": ("",)}

_COLOURED = (
    *("{phrase} on a {colour} background",) * 5,
    *("{phrase} on {colour}",) * 2,
    "{noun}, {colour} background",
    "{colour} background, {noun}",
    "{phrase} with a {colour} background",
    "{phrase} in front of a {colour} background",
    "an icon of {phrase} on {colour}",
    "an icon of {phrase} on a {colour} background",
    "a picture of {phrase} on a {colour} background",
    "draw {phrase} on a {colour} background",
)
_PLAIN = (
    *("{phrase}",) * 5,
    "{noun}",
    "an icon of {phrase}",
    "an emoji of {phrase}",
    "a picture of {phrase}",
    "draw {phrase}",
)
# Words that say nothing about these pictures: seeing them teaches the encoders to pass over the unknown.
FILLERS = (
    "cute", "nice", "pretty", "happy", "funny", "simple", "flat", "lovely", "beautiful", "shiny", "new", "old",
    "modern", "friendly", "single", "colourful", "cartoon", "minimal", "clean", "fresh", "detailed", "wonderful",
    "good", "my", "the", "one", "great", "little-known", "photorealistic", "fancy",
)  # fmt: skip
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Picture:
    """One picture to draw: indices into ``OBJECTS`` and ``COLOUR_NAMES``, and a key of ``SIZES``."""

    thing: int
    colour: int
    size: str = "medium"


def held_out_pairs(count: int = 240, seed: int = 20) -> frozenset[tuple[int, int]]:
    """Object–colour pairs never drawn for training: at most one an object, equally many a colour."""
    things = random.Random(seed).sample(range(len(OBJECTS)), count)  # noqa: S311
    return frozenset((thing, k % len(COLOURS)) for k, thing in enumerate(things))


def training_pairs() -> list[tuple[int, int]]:
    """All object–colour pairs that training may draw, in a fixed order."""
    held_out = held_out_pairs()
    every = ((thing, colour) for thing in range(len(OBJECTS)) for colour in range(len(COLOURS)))
    return [pair for pair in every if pair not in held_out]


def with_article(words: str) -> str:
    """Put "a" or "an" in front, by the first letter."""
    return ("an " if words[0] in "aeio" else "a ") + words


def _noise_word(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(FILLERS)
    return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 8)))


def caption(picture: Picture, rng: random.Random, say_colour: float = 0.8, noise: float = 0.0) -> str:
    """Describe a picture in one of the ways the grammar knows.

    Args:
        say_colour: probability that the colour is named; the size is always named unless medium.
        noise: probability of a word that means nothing here, such as "cute" or "qxv".
    """
    thing: Thing = OBJECTS[picture.thing]
    noun = thing.nouns[0] if rng.random() < 0.6 else rng.choice(thing.nouns)
    filler = _noise_word(rng) if rng.random() < noise else ""
    words = " ".join(w for w in (rng.choice(SIZE_WORDS[picture.size]), filler, noun) if w)
    name = COLOUR_NAMES[picture.colour]
    said = rng.random() < say_colour
    template = rng.choice(_COLOURED if said else _PLAIN)
    colour = rng.choice(_SPELLINGS.get(name, (name,)))
    text = template.format(phrase=with_article(words) if thing.countable else words, noun=words, colour=colour)
    return text.replace("a orange b", "an orange b")


def ask(pair: tuple[int, int], size: str = "medium") -> str:
    """The plainest caption of an object–colour pair: "a fox on a blue background"."""
    thing, name = OBJECTS[pair[0]], COLOUR_NAMES[pair[1]]
    words = thing.nouns[0] if size == "medium" else f"{size} {thing.nouns[0]}"
    return f"{with_article(words) if thing.countable else words} on {with_article(name)} background"
