"""The captions, the palette and the held-out pairs of the tiny model's training."""

import random

import pytest

from training.grammar import COLOUR_NAMES, SIZE_WORDS, SIZES, Picture, ask, caption, held_out_pairs, training_pairs
from training.objects import OBJECTS

FOX = [thing.icon for thing in OBJECTS].index("fox")
BLUE = COLOUR_NAMES.index("blue")


def test_objects_are_many_and_no_noun_names_two_of_them() -> None:
    nouns = [noun for thing in OBJECTS for noun in thing.nouns]
    assert len(OBJECTS) >= 320
    assert len(nouns) == len(set(nouns))
    assert len({thing.icon for thing in OBJECTS}) == len(OBJECTS)


def test_held_out_pairs_are_held_out_evenly() -> None:
    held_out = held_out_pairs()
    assert len(held_out) >= 200
    assert not held_out & set(training_pairs())
    assert len(held_out) + len(training_pairs()) == len(OBJECTS) * len(COLOUR_NAMES)
    assert len({thing for thing, _ in held_out}) == len(held_out)  # eleven other colours of each are seen
    assert {sum(c == k for _, c in held_out) for k in range(len(COLOUR_NAMES))} == {len(held_out) // len(COLOUR_NAMES)}


def test_held_out_pairs_stay_the_same() -> None:
    assert sorted(held_out_pairs())[:3] == sorted(held_out_pairs())[:3]
    assert (FOX, BLUE) not in held_out_pairs()  # the demo's picture is one that training drew


@pytest.mark.parametrize("size", SIZES)
def test_a_caption_says_object_size_and_colour(size: str) -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = caption(Picture(FOX, BLUE, size), rng, say_colour=1.0)
        assert "fox" in text
        assert "blue" in text
        assert any(word in text.split() for word in SIZE_WORDS[size]) or size == "medium"


def test_a_caption_may_leave_the_colour_out() -> None:
    rng = random.Random(0)
    texts = [caption(Picture(FOX, BLUE), rng, say_colour=0.0) for _ in range(50)]
    assert not any(name in text.split() for text in texts for name in COLOUR_NAMES)


def test_articles() -> None:
    icons = [thing.icon for thing in OBJECTS]
    assert ask((FOX, BLUE)) == "a fox on a blue background"
    assert ask((FOX, BLUE), "small") == "a small fox on a blue background"
    assert ask((icons.index("elephant"), COLOUR_NAMES.index("orange"))) == "an elephant on an orange background"
    assert ask((icons.index("scissors"), BLUE)) == "scissors on a blue background"
