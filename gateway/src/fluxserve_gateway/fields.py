"""Read OpenAI's fields of an images request, and ours: honoured, accepted without effect, or refused by name.

The README's table lists all of them; a test holds both against the fields that OpenAI's SDK sends. A field that is
null, or empty in a form, counts as not given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from fluxserve_gateway.errors import GatewayError, InvalidField

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_INT32 = 2**31 - 1
_INT64 = 2**63 - 1
_MAX_PROMPT = 32_000
_FLOAT32 = 3.4e38
_SHOWN = 60  # characters of a value in an error


def _encodable(text: str) -> str:
    """Refuse half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("text", "Unicode text without lone surrogates") from error
    return text


def _size(text: str) -> str:
    if text != "auto" and not _SIZE.fullmatch(text):
        raise PydanticCustomError("size", "'auto' or WIDTHxHEIGHT in pixels, e.g. 1024x1024")
    return text


def refuse(reason: str) -> BeforeValidator:
    """Mark a field of OpenAI's that no server here can honour; `reason` says what is allowed instead."""

    def check(value: object) -> None:
        if value is not None:
            raise PydanticCustomError("refused", reason)

    return BeforeValidator(check)


Text = Annotated[str, AfterValidator(_encodable)]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=_MAX_PROMPT), AfterValidator(_encodable)]
Negative = Annotated[str, StringConstraints(max_length=_MAX_PROMPT), AfterValidator(_encodable)]
Size = Annotated[str, AfterValidator(_size), Field(json_schema_extra={"pattern": f"^(auto|{_SIZE.pattern})$"})]


class Generation(BaseModel):
    """The body of `POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # honoured
    prompt: Prompt
    model: Text | None = None
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    size: Size | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    response_format: Literal["b64_json", "url"] | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    safety_identifier: Text | None = None
    user: Text | None = None
    # accepted: the one value, or those, that say what happens anyway
    background: Literal["opaque", "auto"] | None = None
    quality: Literal["auto", "standard"] | None = None
    # refused
    complexity: Annotated[None, refuse("nothing: no model here plans a picture")] = None
    frame_count: Annotated[None, refuse("nothing: no model here draws animations")] = None
    frame_duration_ms: Annotated[None, refuse("nothing: no model here draws animations")] = None
    svg: Annotated[None, refuse("nothing: no model here draws SVG")] = None
    # ours
    seed: Annotated[int, Field(ge=-1, le=_INT64)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=_FLOAT32, allow_inf_nan=False)] | None = None
    negative_prompt: Negative | None = None
    true_cfg_scale: Annotated[float, Field(ge=1, le=_FLOAT32, allow_inf_nan=False)] | None = None
    embed_prompt: bool | None = None
    # of generations alone
    moderation: Literal["low", "auto"] | None = None
    style: Annotated[None, refuse("nothing: say it in the prompt")] = None

    @model_validator(mode="after")
    def _compression_of_what(self) -> Self:
        if self.output_compression not in (None, 100) and self.output_format in (None, "png"):
            raise PydanticCustomError(
                "output_compression", "100, or nothing, with output_format png, which is compressed without loss"
            )
        return self

    @property
    def count(self) -> int:
        """Return the number of pictures to draw."""
        return self.n or 1

    @property
    def previews(self) -> int:
        """Return the number of partial images: of one picture only, because no event says which one it is of."""
        return (self.partial_images or 0) if self.count == 1 else 0

    @property
    def height_width(self) -> tuple[int, int] | None:
        """Return the size in pixels; None where the model decides."""
        if self.size in (None, "auto"):
            return None
        width, height = str(self.size).split("x")
        return int(height), int(width)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `AsyncClient.generate` that this body names."""
        height, width = self.height_width or (None, None)
        quality = None
        if self.output_compression is not None and self.output_format in ("jpeg", "webp"):
            quality = max(1, self.output_compression)
        arguments = {
            "prompt": self.prompt,
            "height": height,
            "width": width,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.negative_prompt,
            "true_cfg_scale": self.true_cfg_scale,
            "seed": self.seed,
            "num_images": self.n,
            "output_format": self.output_format,
            "quality": quality,
            "embed_prompt": self.embed_prompt,
        }
        return {name: value for name, value in arguments.items() if value is not None}


class Edit(Generation):
    """The fields of `POST /v1/images/edits` beside its pictures. JSON may have `moderation`, as OpenAI allows."""

    input_fidelity: Literal["low"] | None = None
    mask: Annotated[None, refuse("nothing: no server here takes a mask yet")] = None
    markup: Annotated[None, refuse("nothing: no server here takes a mask yet")] = None
    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `AsyncClient.generate` that this body names, without `image`."""
        strength = {} if self.strength is None else {"strength": self.strength}
        return {**super().arguments(), **strength}


RENAMED: Mapping[str, str] = {
    "num_images": "n",
    "height": "size",
    "width": "size",
    "height, width": "size",
    "quality": "output_compression",
}
"""The server's names of fields whose values come from a field of OpenAI's with another name."""

Body = TypeVar("Body", bound=Generation)


def parse(kind: type[Body], given: Mapping[str, Any], *, text: bool) -> Body:
    """Read a body.

    Args:
        kind: which one.
        given: its fields.
        text: whether all values are text, as in a form; in JSON a number in quotes is no number.

    Raises:
        InvalidField: the first wrong field, with what came and what is allowed.
    """
    present = {name: value for name, value in given.items() if not (text and value == "")}
    try:
        return kind.model_validate(present, strict=not text)
    except ValidationError as error:
        raise _named(error.errors(include_url=False)[0], kind) from error


def _named(error: ErrorDetails, kind: type[Generation]) -> GatewayError:
    param = str(error["loc"][0]) if error["loc"] else error["type"]  # a rule on several fields is named after one
    shown = param if len(param) <= _SHOWN else f"{param[:_SHOWN]}…"
    if error["type"] == "missing":
        return InvalidField(f"{shown}: got nothing; it is required", param=shown, code="missing_required_parameter")
    if error["type"] == "extra_forbidden":
        allowed = ", ".join(kind.model_fields)
        message = f"{shown}: no such field here; allowed: {allowed}"
        return InvalidField(message, param=shown, code="unknown_parameter")
    got = repr(error["input"]) if error["loc"] else "another value"
    got = got if len(got) <= _SHOWN else f"{got[:_SHOWN]}…"
    code = "unsupported_parameter" if error["type"] == "refused" else "invalid_value"
    return InvalidField(f"{shown}: got {got}; allowed: {_allowed(error)}", param=shown, code=code)


def _allowed(error: ErrorDetails) -> str:
    """Return Pydantic's words without the grammar around them: "Input should be 'a' or 'b'" → "'a' or 'b'"."""
    return re.sub(r"^(Input|String|Value) should (be|have) ", "", error["msg"])
