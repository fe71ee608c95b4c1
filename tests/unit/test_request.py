"""request.parse: defaults, edges, and refusals that name the field, what came and what is allowed."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxserve.errors import InvalidRequest
from fluxserve.families.flux.models import (
    FLUX1_DEV,
    FLUX1_SCHNELL,
    FLUX2_DEV,
    FLUX2_DEV_TURBO,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    FLUX2_KLEIN_BASE_4B,
    FLUX2_KLEIN_BASE_9B,
    MEMBERS,
    TINY,
)
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.families.flux.request import FluxRequest
from fluxserve.media.images import decode, write_image
from fluxserve.request import DRAWN_SEEDS, MAX_SEED, fit
from tests.support.jobs import parse

PNG = write_image(np.zeros((96, 160, 3), np.uint8), "png", 90)


def ask(spec: FluxSpec = TINY, **fields: Any) -> FluxRequest:
    request = parse({"prompt": b"a fox", **fields}, spec)
    assert isinstance(request, FluxRequest)
    return request


def refusal(spec: FluxSpec = TINY, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        ask(spec, **fields)
    return caught.value


@pytest.mark.parametrize(
    ("spec", "side", "steps", "guidance"),
    [(FLUX1_DEV, 1024, 28, 3.5), (FLUX1_SCHNELL, 1024, 4, 0.0), (FLUX2_KLEIN_4B, 1024, 4, 1.0), (TINY, 128, 20, 3.0)],
)
def test_defaults(spec: FluxSpec, side: int, steps: int, guidance: float) -> None:
    r = ask(spec)
    assert (r.height, r.width, r.num_inference_steps, r.guidance_scale) == (side, side, steps, guidance)
    assert (r.num_images, r.output_format, r.quality) == (1, "png", 90)
    assert r.images == () and r.strength is None


EDGES = [
    ("height", [64, 80, 512]),
    ("width", [64, 496, 512]),
    ("num_inference_steps", [1, 100]),
    ("guidance_scale", [0.0, 1e-6, 100.0]),
    ("seed", [0, 1, MAX_SEED]),
    ("num_images", [1, 8]),
    ("quality", [1, 100]),
]


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in EDGES for v in values])
def test_edges_are_taken(field: str, value: float) -> None:
    assert getattr(ask(**{field: value}), field) == value


@pytest.mark.parametrize("spec", [FLUX2_KLEIN_4B, FLUX2_KLEIN_9B], ids=lambda m: m.name)
def test_what_makes_no_sense_for_a_klein(spec: FluxSpec) -> None:
    for scale in (0.0, 1.0):
        assert ask(spec, guidance_scale=scale).guidance_scale == scale, "both say: none"
    allowed = f"1, or nothing: {spec.name} is distilled to be drawn without"
    for scale in (3.5, 0.5, -1.0, math.nan, math.inf):
        assert str(refusal(spec, guidance_scale=scale)) == f"guidance_scale: got {scale}; allowed: {allowed}"
    assert ask(spec, num_inference_steps=8).num_inference_steps == 8
    assert str(refusal(spec, num_inference_steps=50)) == "num_inference_steps: got 50; allowed: 1 to 8"
    for fields in ({}, {"image": [PNG]}):
        allowed = f"nothing: {spec.name} draws after its images and redraws none of them"
        assert str(refusal(spec, strength=0.5, **fields)) == f"strength: got 0.5; allowed: {allowed}"


def test_a_negative_prompt_is_for_a_second_pass() -> None:
    """With the scale that diffusers calls true_cfg_scale; of 1, it is off."""
    for spec in (FLUX1_DEV, FLUX1_SCHNELL, TINY):
        assert (ask(spec).negative_prompt, ask(spec, true_cfg_scale=1.0).negative_prompt) == (None, None)
        for words in (b"", b" ", "übermäßig".encode()):
            r = ask(spec, negative_prompt=words, true_cfg_scale=4.5)
            assert (r.negative_prompt, r.cfg_scale) == (words.decode(), 4.5)
        assert ask(spec, negative_prompt=b"x", true_cfg_scale=1.0).negative_prompt is None
        got = "true_cfg_scale: got 4.5; allowed: 1, or more beside a negative_prompt, which may be empty"
        assert str(refusal(spec, true_cfg_scale=4.5)) == got
        got = "negative_prompt: got 3 bytes; allowed: only beside a true_cfg_scale, above 1"
        assert str(refusal(spec, negative_prompt=b"cat")) == got
        for scale in (0.0, 0.99, -1.0, 100.1, math.nan, math.inf):
            error = refusal(spec, negative_prompt=b"cat", true_cfg_scale=scale)
            assert str(error) == f"true_cfg_scale: got {scale}; allowed: a finite number from 1 to 100"
        for words, why in ((b"a\xff", "not UTF-8"), (b"a\x00", "NUL"), (b"x" * 4097, "4097 bytes")):
            error = refusal(spec, negative_prompt=words, true_cfg_scale=2.0)
            assert error.field == "negative_prompt" and why in error.got


@pytest.mark.parametrize("spec", [FLUX2_KLEIN_4B, FLUX2_DEV, FLUX2_DEV_TURBO], ids=lambda m: m.name)
def test_models_of_one_pass(spec: FluxSpec) -> None:
    allowed = f"nothing: {spec.name} does not take it, it is drawn in one pass a step"
    assert str(refusal(spec, negative_prompt=b"cat")) == f"negative_prompt: got 3 bytes; allowed: {allowed}"
    assert str(refusal(spec, true_cfg_scale=2.0)) == f"true_cfg_scale: got 2.0; allowed: {allowed}"


@pytest.mark.parametrize("spec", [FLUX2_KLEIN_BASE_4B, FLUX2_KLEIN_BASE_9B], ids=lambda m: m.name)
def test_a_base_is_guided_by_a_second_pass(spec: FluxSpec) -> None:
    """Against no words unless others are given; with a guidance of 1 in one pass."""
    r = ask(spec)
    assert (r.num_inference_steps, r.guidance_scale, r.negative_prompt, r.cfg_scale) == (50, 4.0, "", 4.0)
    r = ask(spec, guidance_scale=2.5, negative_prompt=b"cat")
    assert (r.negative_prompt, r.cfg_scale) == ("cat", 2.5)
    assert ask(spec, guidance_scale=1.0).negative_prompt is None
    allowed = f"nothing: {spec.name} does not take it, its guidance_scale is that scale"
    assert str(refusal(spec, true_cfg_scale=2.0)) == f"true_cfg_scale: got 2.0; allowed: {allowed}"


def test_turbo_is_drawn_in_its_own_steps() -> None:
    """Its noise levels are those that it was distilled to: fewer or more of them would be others."""
    assert (
        ask(FLUX2_DEV_TURBO).num_inference_steps == ask(FLUX2_DEV_TURBO, num_inference_steps=8).num_inference_steps == 8
    )
    assert ask(FLUX2_DEV_TURBO).guidance_scale == 2.5
    for steps in (0, 1, 4, 7, 9, 28, 101, -8):
        allowed = "8, or nothing: flux.2-dev-turbo is distilled to 8 steps"
        error = str(refusal(FLUX2_DEV_TURBO, num_inference_steps=steps))
        assert error == f"num_inference_steps: got {steps}; allowed: {allowed}"


BAD: list[tuple[str, list[Any], str]] = [
    ("height", [0, -16, 17, 48, 63, 528, 100_000, 2**31 - 1, -(2**31)], "a multiple of 16 from 64 to 512"),
    ("width", [0, 17, 48, 528, 100_000], "a multiple of 16 from 64 to 512"),
    ("num_inference_steps", [0, -1, 101, 2**31 - 1], "1 to 100"),
    ("guidance_scale", [math.nan, math.inf, -math.inf, -0.001, 100.001], "a finite number from 0 to 100"),
    ("seed", [-2, -(2**63)], "0 to"),
    ("num_images", [0, -1, 9, 2**31 - 1], "1 to 8"),
    ("quality", [0, 101, -1], "1 to 100"),
    ("output_format", [b"", b"gif", b"png ", b"\xff\xfe", b"PNG\x00", b"x" * 10_000], "png, jpeg, webp, raw"),
    ("strength", [0.5], "only beside an image"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), [(f, v, a) for f, values, a in BAD for v in values])
def test_refusals(field: str, value: Any, allowed: str) -> None:
    error = refusal(**{field: value})
    assert error.field == field
    assert allowed in error.allowed
    assert str(error) == f"{field}: got {error.got}; allowed: {error.allowed}"
    if isinstance(value, int | float):
        assert error.got == str(value)
    assert len(str(error)) < 300


@pytest.mark.parametrize(
    ("raw", "got"),
    [
        (None, "nothing"),
        (b"", "0 bytes"),
        (b" \t\n", "no text"),
        ("\u3000".encode(), "no text"),
        (b"x" * 4097, "4097 bytes"),
        (b"x" * 100_000, "100000 bytes"),
        (b"ab\xff", "bytes that are not UTF-8 (at byte 2)"),
        (b"\xed\xa0\x80", "bytes that are not UTF-8 (at byte 0)"),
        (b"a\x00b", "a NUL character"),
    ],
)
def test_prompts_that_are_refused(raw: bytes | None, got: str) -> None:
    fields = {} if raw is None else {"prompt": raw}
    with pytest.raises(InvalidRequest) as caught:
        parse(fields, TINY)
    assert (caught.value.field, caught.value.got) == ("prompt", got)
    assert caught.value.allowed == "1 to 4096 bytes of UTF-8 text"


@pytest.mark.parametrize("text", ["x", "x" * 4096, "é" * 2048, "🦊", "line\nline", "\u202egnp", " a fox "])
def test_prompts_that_are_taken(text: str) -> None:
    assert parse({"prompt": text.encode()}, TINY).prompt == text


@pytest.mark.parametrize("name", [b"PNG", b"Jpeg", b"webp", b"RAW"])
def test_formats_in_any_case(name: bytes) -> None:
    assert ask(output_format=name).output_format == name.decode().lower()


def test_seeds_of_several_images() -> None:
    assert ask(seed=40, num_images=3).seeds == (40, 41, 42)
    assert ask(seed=MAX_SEED - 7, num_images=8).seeds[-1] == MAX_SEED
    error = refusal(seed=MAX_SEED - 6, num_images=8)
    assert (error.field, error.got) == ("seed", str(MAX_SEED - 6))
    assert str(MAX_SEED - 7) in error.allowed


@pytest.mark.parametrize("fields", [{}, {"seed": -1}])
def test_a_seed_is_drawn(fields: dict[str, int]) -> None:
    seeds = {ask(**fields).seed for _ in range(20)}
    assert len(seeds) > 15
    assert all(0 <= s < DRAWN_SEEDS for s in seeds)


def test_the_area_is_limited() -> None:
    assert ask(FLUX1_DEV, height=2048, width=2048).height == 2048
    small = replace(TINY, limits=replace(TINY.limits, max_pixels=256 * 512))
    error = refusal(small, height=512, width=272)
    assert (error.got, error.allowed) == ("512 x 272", "at most 131072 pixels in all")
    assert "height" in error.field and "width" in error.field


def test_an_input_image_gives_the_size() -> None:
    r = ask(image=[PNG])
    assert (r.height, r.width, r.strength) == (96, 160, 0.6)
    r = ask(image=[PNG], height=64, width=160, strength=1.0)
    assert (r.height, r.width, r.strength) == (64, 160, 1.0)


@pytest.mark.parametrize("spec", [TINY, FLUX2_KLEIN_4B], ids=lambda spec: spec.name)
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"height": 192}, (192, 320)),
        ({"width": 320}, (192, 320)),
        ({"height": 128}, (128, 208)),
        ({"width": 64}, (64, 64)),  # the least side, as beside an image that is as narrow
        ({"height": 64, "width": 64}, (64, 64)),
    ],
    ids=str,
)
def test_one_side_beside_an_image_keeps_its_proportions(
    spec: FluxSpec, asked: dict[str, int], expected: tuple[int, int]
) -> None:
    r = ask(spec, image=[PNG], **asked)
    assert (r.height, r.width) == expected


def test_a_side_that_the_proportions_make_too_long() -> None:
    most = TINY.limits.max_side
    error = refusal(image=[PNG], height=most)
    assert (error.field, error.got) == ("width", f"{round(most * 160 / 96 / 16) * 16}, to keep the image's proportions")
    for height in (most + 16, 17, -5, 0, 2**31 - 1):
        error = refusal(image=[PNG], height=height)
        assert (error.field, error.got) == ("height", str(height)), "what was asked for is judged first"


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_strengths_that_are_refused(strength: float) -> None:
    error = refusal(image=[PNG], strength=strength)
    assert (error.field, error.got, error.allowed) == ("strength", str(strength), "0 < strength <= 1")


@pytest.mark.parametrize("image", [b"", b"GIF89a", PNG[:20]])
def test_an_image_that_is_no_image(image: bytes) -> None:
    assert refusal(image=[image]).field == "image"


SIDES = (1, 2, 15, 16, 17, 63, 64, 65, 100, 511, 512, 513, 2047, 2048, 2049, 3333, 7919, 30_000)


@pytest.mark.parametrize("spec", MEMBERS, ids=lambda m: m.name)
def test_every_input_size_gives_a_valid_one(spec: FluxSpec) -> None:
    """Whatever the aspect ratio: what `_fit` proposes is accepted when it is asked for by name."""
    limits = spec.limits
    sizes = [s for s in itertools.product(SIDES, SIDES) if s[0] * s[1] <= limits.max_image_pixels]
    sizes += [(1, limits.max_image_pixels), (limits.max_image_pixels, 1)]
    for height, width in sizes:
        h, w = fit(height, width, spec)
        assert (ask(spec, height=h, width=w).height, ask(spec, height=h, width=w).width) == (h, w), (height, width)


def test_a_size_within_the_limits_is_kept() -> None:
    for height, width in itertools.product(range(64, 513, 16), repeat=2):
        assert fit(height, width, TINY) == (height, width)


def test_a_longer_side_becomes_the_longest_allowed() -> None:
    for side in range(2049, 6000):
        assert fit(side, side // 2, FLUX1_DEV)[0] == 2048, side


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (3, 5)])
def test_a_strange_aspect_ratio_end_to_end(size: tuple[int, int]) -> None:
    r = ask(image=[write_image(np.zeros((*size, 3), np.uint8), "png", 90)])
    fit = r.images[0].resized(r.height, r.width)
    assert decode(r.images[0].data, fit).shape == (r.height, r.width, 3)


def test_resizing_is_lanczos() -> None:
    """As diffusers' VaeImageProcessor does it."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 70, 3), dtype=np.uint8)
    r = ask(image=[write_image(pixels, "png", 90)])
    (image,) = r.images
    assert np.array_equal(decode(image.data, image.resized(100, 70)), pixels), "nothing to do"
    want = Image.fromarray(pixels).resize((64, 96), Image.Resampling.LANCZOS)
    assert np.array_equal(decode(image.data, image.resized(96, 64)), np.asarray(want))


# --- reference images ------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    return write_image(np.zeros((height, width, 3), np.uint8), "png", 90)


def test_references_are_taken_in_their_order() -> None:
    r = ask(FLUX2_KLEIN_4B, image=[png(96, 64), png(64, 80), png(512, 64), png(64, 64)])
    assert [(i.width, i.height) for i in r.images] == [(96, 64), (64, 80), (512, 64), (64, 64)]
    assert (r.height, r.width, r.strength) == (64, 96, None), "the first gives the size"


@pytest.mark.parametrize(
    ("reference", "size"),
    [((100, 79), (64, 96)), ((2000, 1333), (832, 1248)), ((4096, 512), (240, 2048)), ((1024, 1024), (1024, 1024))],
)
def test_a_reference_gives_the_size(reference: tuple[int, int], size: tuple[int, int]) -> None:
    """As it is drawn after: cut and not stretched, and never beyond what the model draws."""
    r = ask(FLUX2_KLEIN_4B, image=[png(*reference)])
    assert (r.height, r.width) == size
    r = ask(FLUX2_KLEIN_4B, image=[png(*reference)], height=128, width=64)
    assert (r.height, r.width) == (128, 64)


@pytest.mark.parametrize(
    ("spec", "images", "message"),
    [
        (TINY, [PNG, PNG], "got 2 images; allowed: one"),
        (TINY, [], "got 0 images; allowed: one"),
        (FLUX2_KLEIN_4B, [], "got 0 images; allowed: 1 to 4 of them"),
        (FLUX2_KLEIN_4B, [PNG] * 5, "got 5 images; allowed: 1 to 4 of them"),
        (FLUX2_KLEIN_4B, [png(63, 64)], "got an image of 63 x 64 pixels; allowed: sides from 64,"),
        (FLUX2_KLEIN_4B, [PNG, png(64, 513)], "got an image of 64 x 513 pixels as number 2 of 2; allowed: sides from"),
        (FLUX2_KLEIN_4B, [PNG, PNG, b"GIF89a"], "got 6 bytes of a GIF file as number 3 of 3; allowed:"),
    ],
)
def test_images_that_are_refused(spec: FluxSpec, images: list[bytes], message: str) -> None:
    assert str(refusal(spec, image=images)).startswith(f"image: {message}")


def test_flux2_dev_takes_guidance_and_references() -> None:
    r = ask(FLUX2_DEV, image=[PNG], guidance_scale=2.5, num_inference_steps=50)
    assert (r.guidance_scale, r.num_inference_steps, len(r.images)) == (2.5, 50, 1)
    assert (ask(FLUX2_DEV).guidance_scale, ask(FLUX2_DEV).num_inference_steps) == (4.0, 28)


def test_a_picture_that_is_redrawn_may_be_smaller_than_a_reference() -> None:
    assert ask(TINY, image=[png(3, 500)]).height == 496
