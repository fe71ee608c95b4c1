"""media/provenance.py: what files say about themselves. ElementTree, Pillow and zlib are the judges."""

import io
import time
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fluxserve import __version__
from fluxserve.families import registry
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.media.images import read_image, write_image
from fluxserve.media.png import strips
from fluxserve.media.provenance import MAX_PROMPT_BYTES, Provenance, System
from fluxserve.spec import Limits, ModelSpec
from tests.unit.test_png import chunks, photo

IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
OURS = "{urn:fluxserve:picture#}"
DESCRIPTION = ".//{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
FORMATS = ["png", "jpeg", "webp"]

OWN = {"task": "text-to-image", "guidance": "3.5"}
MADE = Provenance(System("flux.1-dev", "fused", "fp8"), 7, 28, 48, 64, OWN)
PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)

PROMPTS = {
    "a section's end": "a fox ]]> & <b>bold</b>",
    "quotes": "\"a\" 'fox'",
    "emoji": "a 🦊 in the snow, 狐, é",
    "lines": "first\nsecond\r\nthird\tand \r more",
    "a document type": '<!DOCTYPE x [<!ENTITY e "boom">]>&e;',
    "the packet's end": '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>',
    "what Pillow looks for": 'tiff:Orientation="6" tiff:Orientation>6',
    "another source type": "<Iptc4xmpExt:DigitalSourceType>digitalCapture",
}


def properties(packet: bytes) -> dict[str, str]:
    (description,) = ElementTree.fromstring(packet).iterfind(DESCRIPTION)
    assert len({each.tag for each in description}) == len(description), "each once"
    return {each.tag: each.text or "" for each in description}


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_file_says_what_made_it(kind: str) -> None:
    found = properties(opened(write_image(PICTURE, kind, 90, MADE)).info["xmp"])
    assert found[f"{IPTC}DigitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert (found[f"{IPTC}AISystemUsed"], found[f"{IPTC}AISystemVersionUsed"]) == (
        "flux.1-dev",
        f"fluxserve {__version__}",
    )
    ours = {tag.removeprefix(OURS): value for tag, value in found.items() if tag.startswith(OURS)}
    assert ours == {
        **{"task": "text-to-image", "seed": "7", "steps": "28", "guidance": "3.5"},
        **{"height": "48", "width": "64", "engine": "fused", "precision": "fp8"},
    }
    assert f"{IPTC}AIPromptInformation" not in found


@pytest.mark.parametrize("kind", FORMATS)
def test_pixels_are_untouched(kind: str) -> None:
    plain, marked = (opened(write_image(PICTURE, kind, 90, made)) for made in (None, MADE))
    assert np.array_equal(np.asarray(plain), np.asarray(marked))


def test_raw_pixels_stay_bare() -> None:
    assert write_image(PICTURE, "raw", 90, MADE) == PICTURE.tobytes()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_any_prompt_comes_back_as_it_was(kind: str, prompt: str) -> None:
    picture = opened(write_image(PICTURE, kind, 90, replace(MADE, prompt=prompt)))
    found = properties(picture.info["xmp"])
    assert found[f"{IPTC}AIPromptInformation"] == prompt
    assert found[f"{IPTC}DigitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert picture.getexif().get(0x0112, 1) == 1, "a prompt turns no picture"


@pytest.mark.parametrize("letter", ["\x01", "\x0b", "\x1b", "\x1f", "\ufffe", "\uffff"])
def test_what_xml_can_not_hold_is_replaced(letter: str) -> None:
    made = replace(MADE, prompt=f"a{letter}fox")
    assert properties(made.xmp())[f"{IPTC}AIPromptInformation"] == "a\ufffdfox"
    assert made.parameters().startswith("a\ufffdfox\n")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_longest_prompt_has_room(kind: str) -> None:
    """Every letter of it is escaped. A JPEG's segment ends at 64 KiB."""
    longest = '"' * MAX_PROMPT_BYTES
    found = properties(opened(write_image(PICTURE, kind, 90, replace(MADE, prompt=longest))).info["xmp"])
    assert found[f"{IPTC}AIPromptInformation"] == longest


def test_a_png_is_whole_and_has_its_texts_before_the_pixels() -> None:
    kinds = [kind for kind, _ in chunks(write_image(PICTURE, "png", 90, replace(MADE, prompt="狐")))]
    assert kinds == [b"IHDR", b"iTXt", b"iTXt", b"IDAT", b"IDAT", b"IDAT", b"IEND"]


def test_programs_around_diffusion_find_their_text() -> None:
    line = "Steps: 28, Distilled CFG Scale: 3.5, Seed: 7, Size: 64x48, Model: flux.1-dev, Version: "
    line += f"fluxserve {__version__}"
    for prompt, expected in (("", line), ("a fox", f"a fox\n{line}"), ("狐", f"狐\n{line}")):
        assert opened(write_image(PICTURE, "png", 90, replace(MADE, prompt=prompt))).text["parameters"] == expected
    assert "CFG" not in replace(MADE, own={}).parameters()


@pytest.mark.parametrize("spec", tuple(registry.members()), ids=lambda spec: spec.name)
def test_every_model_says_how_a_picture_was_drawn(spec: ModelSpec) -> None:
    family = registry.of(spec)
    alone, with_image = (family.parameters(family.nothing(spec, 64, image), spec) for image in (False, True))
    assert alone["task"] == "text-to-image"
    if isinstance(spec, FluxSpec):
        assert with_image["task"] == ("references" if spec.takes_references else "image-to-image")
    scale = f"{spec.defaults.guidance_scale:g}"
    if not isinstance(spec, FluxSpec) or spec.classifier_free:
        assert alone == {"task": "text-to-image", "cfg_scale": scale}
        assert f", CFG scale: {scale}, Seed" in replace(MADE, own=alone).parameters()
    else:
        assert alone == {"task": "text-to-image", **({"guidance": scale} if spec.takes_guidance else {})}
    assert properties(replace(MADE, own=alone).xmp())[f"{OURS}task"] == "text-to-image"


@pytest.mark.parametrize("kind", FORMATS)
def test_equal_pictures_have_equal_files(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_image(PICTURE, kind, 90, MADE)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert write_image(PICTURE, kind, 90, replace(MADE)) == first
    assert write_image(PICTURE, kind, 90, replace(MADE, seed=8)) != first


@pytest.mark.parametrize("kind", FORMATS)
def test_our_own_files_are_inputs_again(kind: str) -> None:
    limits = Limits(min_side=16, max_side=64, max_pixels=4096)
    image = read_image(write_image(PICTURE, kind, 90, replace(MADE, prompt=PROMPTS["what Pillow looks for"])), limits)
    assert (image.height, image.width) == (48, 64)


def test_what_a_file_says_costs_next_to_nothing() -> None:
    """The longest prompt there is, beside the writing of one megapixel: less than a fifth of it, on any machine."""
    megapixel, worst = photo(1024), replace(MADE, prompt='"' * MAX_PROMPT_BYTES)

    def seconds(run: Callable[[], object]) -> float:
        spent = []
        for _ in range(5):
            begin = time.process_time()
            run()
            spent.append(time.process_time() - begin)
        return min(spent)

    assert seconds(worst.png_chunks) < seconds(lambda: strips.encode(megapixel)) / 5
