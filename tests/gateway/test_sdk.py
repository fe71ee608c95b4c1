"""OpenAI's SDK, as it is installed, against the gateway: what it sends arrives, what it is answered it understands."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from fluxserve_client.errors import Cancelled, FluxserveError, from_status
from fluxserve_gateway.fields import Edit, Generation
from openai.types import image_edit_params, image_generate_params
from PIL import Image

from tests.client.fakes import FakeFlux
from tests.gateway.serving import Gateway, png

NEGATIVE = {"negative_prompt": "a cat", "true_cfg_scale": 4.5}
README = Path(__file__).parents[2] / "gateway" / "README.md"


def value(tensor: Any) -> Any:
    first = tensor.ravel()[0]
    return first.decode() if isinstance(first, bytes) else first.item()


def sent(fake: FakeFlux) -> dict[str, Any]:
    """The inputs of the last request that reached the server, without pictures."""
    return {name: value(tensor) for name, tensor in fake.requests[-1][1].items() if name != "image"}


def test_a_picture(gateway: Gateway, fake: FakeFlux) -> None:
    answer = gateway.sdk().images.generate(
        prompt="a red fox 🦊",
        model="tiny",
        n=2,
        size="64x32",
        output_format="webp",
        output_compression=40,
        user="somebody",
        background="auto",
        moderation="low",
        quality="auto",
        response_format="b64_json",
        extra_body={"seed": 7, "num_inference_steps": 3, "guidance_scale": 2, "embed_prompt": True, **NEGATIVE},
    )
    assert sent(fake) == {
        "prompt": "a red fox 🦊",
        "height": 32,
        "width": 64,
        "num_images": 2,
        "output_format": "webp",
        "quality": 40,
        "seed": 7,
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "embed_prompt": True,
        **NEGATIVE,
    }
    assert answer.data is not None
    pictures = [base64.b64decode(image.b64_json or "") for image in answer.data]
    assert pictures == list(fake.answer(fake.requests[-1][1])["images"])
    assert [image.seed for image in answer.data] == [7, 8]  # type: ignore[attr-defined]
    assert (answer.output_format, answer.size, answer.background) == ("webp", "32x16", "opaque")
    assert answer.safety_identifier == "somebody"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 2 * 32 * 16 // 256
    assert answer._request_id == fake.requests[-1][0]


def test_what_is_not_given_is_left_to_the_server(gateway: Gateway, fake: FakeFlux) -> None:
    gateway.sdk().images.generate(prompt="a", size="auto", n=None)
    assert sent(fake) == {"prompt": "a"}


def test_a_stream(gateway: Gateway, fake: FakeFlux) -> None:
    fake.steps, fake.step_s = 5, 0.05  # long enough for progress, which the SDK must not take for an event
    stream = gateway.sdk().images.generate(prompt="a", stream=True, partial_images=2, n=2)
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    for event, picture in zip(events, fake.answer(fake.requests[-1][1])["images"], strict=True):
        assert isinstance(event, openai.types.ImageGenCompletedEvent)
        assert base64.b64decode(event.b64_json) == picture
        assert (event.size, event.output_format, event.background, event.quality) == ("32x16", "png", "opaque", "auto")
        assert event.usage.total_tokens == 2
        assert event.created_at > 1_700_000_000


@pytest.mark.parametrize("count", [1, 3])
def test_partial_images(gateway: Gateway, fake: FakeFlux, count: int) -> None:
    fake.steps, fake.step_s = 8, 0.06
    events = list(gateway.sdk().images.generate(prompt="a", stream=True, partial_images=count))
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image"] * count + ["completed"]
    for index, event in enumerate(events[:-1]):
        assert isinstance(event, openai.types.ImageGenPartialImageEvent)
        assert event.partial_image_index == index
        assert Image.open(io.BytesIO(base64.b64decode(event.b64_json))).size == (64, 32)
        assert (event.size, event.output_format, event.background, event.quality) == ("64x32", "png", "opaque", "auto")
    assert {kind for kind, _ in fake.previews} == {"partial"}


def test_partial_images_of_an_edit(gateway: Gateway, fake: FakeFlux) -> None:
    fake.steps, fake.step_s = 8, 0.06
    stream = gateway.sdk().images.edit(image=("a.png", png(), "image/png"), prompt="b", stream=True, partial_images=2)
    kinds = [event.type for event in stream]
    assert kinds == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]


@pytest.mark.parametrize("asked", [{}, {"partial_images": 0}, {"partial_images": 3, "n": 2}])
def test_nobody_asks_for_a_preview(gateway: Gateway, fake: FakeFlux, asked: dict[str, int]) -> None:
    """No event says which of several pictures a partial image is of: none is drawn."""
    fake.steps, fake.step_s = 5, 0.03
    events = list(gateway.sdk().images.generate(prompt="a", stream=True, **asked))  # type: ignore[call-overload]
    assert {event.type for event in events} == {"image_generation.completed"}
    assert fake.previews == [] and fake.actions


def test_an_edit(gateway: Gateway, fake: FakeFlux) -> None:
    picture = png()
    answer = gateway.sdk().images.edit(
        image=("a.png", picture, "image/png"), prompt="b", size="64x64", n=1, extra_body={"strength": 0.5}
    )
    assert answer.data
    assert list(fake.requests[-1][1]["image"]) == [picture]
    assert sent(fake) == {"prompt": "b", "height": 64, "width": 64, "num_images": 1, "strength": 0.5}
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.image_tokens == 1


def test_an_edit_of_several(gateway: Gateway, fake: FakeFlux) -> None:
    pictures = [png(), png(32, "blue")]
    stream = gateway.sdk().images.edit(image=[io.BytesIO(each) for each in pictures], prompt="b", stream=True)
    assert [event.type for event in stream] == ["image_edit.completed"]
    assert list(fake.requests[-1][1]["image"]) == pictures


async def test_asyncio(gateway: Gateway, fake: FakeFlux) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        answer = await client.images.generate(prompt="a")
        assert answer.data
        stream = await client.images.edit(prompt="a", image=png(), stream=True)
        assert [event.type async for event in stream] == ["image_edit.completed"]


def test_models(gateway: Gateway) -> None:
    assert gateway.sdk().models.retrieve("tiny").owned_by == "fluxserve"
    with pytest.raises(openai.NotFoundError):
        gateway.sdk().models.retrieve("dall-e-3")


TRITON = {
    "refused": from_status("StatusCode.INVALID_ARGUMENT", "num_images: got 9; allowed: 1 to 8"),
    "sized": from_status("StatusCode.INVALID_ARGUMENT", "height, width: got 9 x 9; allowed: more"),
    "full": from_status("StatusCode.UNAVAILABLE", "queue: 64 requests are waiting; at most 64 may. Try again later"),
    "draining": from_status("StatusCode.UNAVAILABLE", "server: it is shutting down and takes no new requests"),
    "cancelled": from_status("StatusCode.CANCELLED", "request 'x' was cancelled at step 3 of 20"),
    "broken": from_status("StatusCode.UNAVAILABLE", "Socket closed"),
    "failed": from_status("StatusCode.INTERNAL", "the stub process is not healthy"),
    "denied": from_status("StatusCode.UNAUTHENTICATED", "who are you"),
}


@pytest.mark.parametrize(
    ("name", "kind", "status", "code", "retry"),
    [
        ("refused", openai.BadRequestError, 400, "invalid_value", None),
        ("sized", openai.BadRequestError, 400, "invalid_value", None),
        ("full", openai.InternalServerError, 503, "queue_full", "true"),
        ("draining", openai.InternalServerError, 503, "unavailable", "true"),
        ("cancelled", openai.ConflictError, 409, "cancelled", "false"),
        ("broken", openai.InternalServerError, 502, "upstream_connection_failed", None),
        ("failed", openai.InternalServerError, 500, "upstream_error", None),
        ("denied", openai.InternalServerError, 502, "upstream_denied", "false"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_server(
    gateway: Gateway, fake: FakeFlux, name: str, kind: type[openai.APIStatusError], status: int, code: str,
    retry: str | None, stream: bool,
) -> None:  # fmt: skip
    fake.error = TRITON[name]
    with pytest.raises(kind) as caught:
        gateway.sdk().images.generate(prompt="a", n=3, stream=stream)
    error = caught.value
    assert (error.status_code, error.code) == (status, code)
    assert error.response.headers.get("x-should-retry") == retry
    assert ("retry-after" in error.response.headers) == (status == 503)
    assert error.request_id == fake.requests[0][0]
    assert set(error.body) == {"message", "type", "param", "code"}  # type: ignore[call-overload]
    if status == 400:
        assert error.param == ("n" if name == "refused" else "size")
        assert str(error.message).find("allowed:") > 0


def test_the_sdk_retries_what_was_not_begun(gateway: Gateway, fake: FakeFlux) -> None:
    fake.error = TRITON["full"]
    tries: list[FluxserveError | None] = [TRITON["full"], None]
    original = fake.flux

    async def flux(inputs: Any, request_id: str) -> Any:
        fake.error = tries.pop(0)
        return await original(inputs, request_id)

    fake.flux = flux  # type: ignore[method-assign]
    assert gateway.sdk(max_retries=1).images.generate(prompt="a").data
    assert len(fake.requests) == 2


def test_the_sdk_does_not_draw_again_what_was_cancelled(gateway: Gateway, fake: FakeFlux) -> None:
    fake.error = Cancelled("request 'x' was cancelled at step 3 of 20")
    with pytest.raises(openai.ConflictError):
        gateway.sdk(max_retries=3).images.generate(prompt="a")
    assert len(fake.requests) == 1


def test_a_stream_that_fails_on_the_way(gateway: Gateway, fake: FakeFlux) -> None:
    fake.steps, fake.step_s = 20, 0.02
    stream = gateway.sdk(max_retries=3).images.generate(prompt="a", stream=True)
    (name,) = fake.table
    fake.table[name].cancelling = True
    with pytest.raises(openai.APIError, match="was cancelled at step"):
        list(stream)
    assert len(fake.requests) == 1


def test_no_field_is_ignored(gateway: Gateway, fake: FakeFlux) -> None:
    """Every field that the SDK can send is one of ours, and the README says what becomes of it."""
    generate = image_generate_params.ImageGenerateParamsStreaming.__annotations__
    edit = image_edit_params.ImageEditParamsStreaming.__annotations__
    assert set(generate) <= set(Generation.model_fields)
    assert set(edit) - {"image"} <= set(Edit.model_fields)
    rows = README.read_text(encoding="utf-8").splitlines()
    told = {
        name.strip("` ")
        for row in rows
        if row.startswith("| `") and not row.startswith(("| `GET", "| `POST"))
        for name in row.split("|")[1].split(",")
    }
    assert {*Generation.model_fields, *Edit.model_fields, "image"} == told
    with pytest.raises(openai.BadRequestError) as caught:
        gateway.sdk().images.generate(prompt="a", extra_body={"scheduler": "b"})
    assert (caught.value.param, caught.value.code) == ("scheduler", "unknown_parameter")
    assert fake.requests == []


@pytest.mark.parametrize(
    ("param", "given"),
    [
        ("n", 0),
        ("n", 11),
        ("n", "1"),
        ("n", True),
        ("size", "1024"),
        ("size", "0x16"),
        ("size", "1024×1024"),
        ("output_format", "gif"),
        ("output_compression", 50),
        ("partial_images", 4),
        ("background", "transparent"),
        ("quality", "high"),
        ("response_format", "url"),
        ("style", "vivid"),
        ("svg", {"model": "a"}),
        ("complexity", "low"),
        ("frame_count", 4),
        ("seed", -2),
        ("seed", 2**63),
        ("guidance_scale", -1),
        ("guidance_scale", "x"),
        ("num_inference_steps", 0),
        ("prompt", ""),
        ("prompt", 3),
        ("prompt", "a" * 32_001),
        ("stream", "yes"),
        ("mask", "x"),
        ("strength", 0.5),
        ("true_cfg_scale", 0.5),
        ("negative_prompt", 3),
        ("negative_prompt", "a" * 32_001),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(gateway: Gateway, fake: FakeFlux, param: str, given: Any) -> None:
    answer = gateway.post(json={"prompt": "a", param: given})
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]
    assert len(error["message"]) < 600
    assert fake.requests == []


@pytest.mark.parametrize("param", ["mask", "markup"])
def test_a_mask_is_refused_by_name(gateway: Gateway, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        gateway.sdk().images.edit(image=png(), prompt="a", **{param: png()})  # type: ignore[call-overload]
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")


def test_json_edits(gateway: Gateway, fake: FakeFlux) -> None:
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    body = {"prompt": "a", "images": [{"image_url": url}] * 2}
    assert gateway.post("/v1/images/edits", json=body).status_code == 200
    assert list(fake.requests[-1][1]["image"]) == [png()] * 2
    for images in (
        [],
        [{"file_id": "f"}],
        [{"image_url": "https://example.com/a.png"}],
        [{"image_url": url[:-9]}],
        "a",
        [1],
    ):
        answer = gateway.post("/v1/images/edits", json={"prompt": "a", "images": images})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "images"), images
    answer = gateway.post(
        "/v1/images/edits", json={"prompt": "a", "images": [{"image_url": url}], "mask": {"image_url": url}}
    )
    assert answer.json()["error"]["param"] == "mask"
    assert len(fake.requests) == 1


def test_half_a_character_is_no_text(gateway: Gateway) -> None:
    answer = gateway.post(content=b'{"prompt": "\\ud800"}', headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_text_that_looks_like_the_place_of_a_picture(gateway: Gateway) -> None:
    """The answer is JSON whatever a caller's name for himself is."""
    name = json.dumps({"b64_json": ""}) + '\x00, "b64_json": "", \\'
    answer = gateway.sdk().images.generate(prompt="a", safety_identifier=name)
    assert answer.safety_identifier == name
    assert answer.data is not None
    assert len(answer.data) == 1
