"""The form: its fields, which of them a model has, and the request that their values are."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import gradio as gr

from fluxserve_gateway.errors import GatewayError
from fluxserve_gateway.page import fragments, parts
from fluxserve_gateway.page.gallery import Entry
from fluxserve_gateway.page.models import Takes, takes

_SEEDS = 2**32  # short enough to read out and to type again, as the server's own
DICE = f"() => Math.floor(Math.random() * {_SEEDS})"
_MAX_SEED = 2**53 - 1  # a browser's numbers are exact up to here
_MAX_PICTURES = 8
_MAX_GUIDANCE = 20

FIELDS = ("model", "prompt", "size", "num_inference_steps", "guidance_scale", "seed", "n", "image", "strength")
"""The fields, as the API names them, in the order of the form."""

Updates = dict[Any, Any]


class Form:
    """The components of the form, laid out in two pieces where the two methods are called.

    Attributes:
        fields: by the API's names; those that the model does not take are hidden.
        lock: whether the seed stays for the next picture.
        refusals: what is wrong with a field, beside it; "" is for what concerns no field.
    """

    def __init__(self, models: Sequence[str]) -> None:
        """`models`: the names that are served; the form begins with the first."""
        self._models = list(models)
        self.fields: dict[str, Any] = {}
        self.refusals: dict[str, Any] = {}
        self.lock: Any = None

    def lay_out_words(self) -> None:
        """Lay out what every picture needs."""
        models = self._models
        self.fields["model"] = gr.Dropdown(models, value=models[0], label="Model", visible=len(models) > 1)
        self._refusal("model")
        self.fields["prompt"] = gr.Textbox(label="Prompt", lines=3, max_lines=8, placeholder="a red fox in the snow")
        self._refusal("prompt")

    def lay_out_settings(self) -> None:
        """Lay out the rest."""
        has = takes(self._models[0])
        self.fields["size"] = gr.Dropdown(_sizes(has), value="auto", label="Size", allow_custom_value=True)
        self._refusal("size")
        self.fields["num_inference_steps"] = gr.Slider(1, step=1, label="Steps", buttons=[], **_steps(has))
        self._refusal("num_inference_steps")
        self.fields["guidance_scale"] = gr.Slider(0, step=0.1, label="Guidance", buttons=[], **_guidance(has))
        self._refusal("guidance_scale")
        self._lay_out_seed()
        self.fields["n"] = gr.Slider(1, _MAX_PICTURES, value=1, step=1, label="Pictures", buttons=[])
        self._refusal("n")
        with gr.Accordion("Start from a picture", open=False):
            self.fields["image"] = parts.input_images(_image_label(has), has.images)
            self._refusal("image")
            self.fields["strength"] = gr.Slider(
                0.05, 1, value=0.6, step=0.05, label="Strength: 1 keeps nothing of it", visible=has.strength, buttons=[]
            )
            self._refusal("strength")
        self._refusal("")

    def _lay_out_seed(self) -> None:
        with gr.Row(elem_id="seed"):
            self.fields["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=_MAX_SEED, min_width=120)
            self.lock = gr.Checkbox(False, label="Lock", container=False, min_width=60)
            roll = gr.Button("Roll", size="sm", min_width=60)
        self._refusal("seed")
        roll.click(None, None, self.fields["seed"], js=DICE, api_visibility="private", show_progress="hidden")

    def _refusal(self, name: str) -> None:
        self.refusals[name] = gr.HTML(visible=False, elem_id=f"refused-{name or 'other'}")

    @property
    def inputs(self) -> list[Any]:
        """What a click on Draw sends."""
        return [*(self.fields[name] for name in FIELDS), self.lock]

    def cleared(self) -> Updates:
        """Take all refusals away."""
        return {place: gr.update(value="", visible=False) for place in self.refusals.values()}

    def refused(self, error: GatewayError) -> Updates:
        """Put an error beside its field."""
        place = self.refusals.get(error.param or "", self.refusals[""])
        return {place: gr.update(value=fragments.refusal(error), visible=True)}

    def fitted(self, model: str) -> Updates:
        """Show what a model takes, with its defaults."""
        has = takes(model)
        steps, guidance = _steps(has), _guidance(has)
        image = {"value": [], "label": _image_label(has), "most": has.images}
        return {
            self.fields["size"]: gr.update(choices=_sizes(has), value="auto"),
            self.fields["num_inference_steps"]: gr.update(**steps),
            self.fields["guidance_scale"]: gr.update(**guidance),
            self.fields["image"]: gr.update(**image),
            self.fields["strength"]: gr.update(visible=has.strength),
        }

    def rolled(self, lock: object) -> Updates:
        """Give the next picture another seed, unless the seed stays."""
        return {} if lock else {self.fields["seed"]: secrets.randbelow(_SEEDS)}

    def filled(self, entry: Entry) -> Updates:
        """Put the settings of a picture back into the form, its seed locked."""
        has = takes(str(entry.body["model"]))
        kept = {name: entry.body[name] for name in FIELDS if name in entry.body and name != "n"}
        updates = self.fitted(str(entry.body["model"])) | self.cleared()
        updates = {place: update for place, update in updates.items() if place is not self.fields["image"]}
        for name, value in kept.items():
            shown = {"visible": has.strength} if name == "strength" else {}
            updates[self.fields[name]] = gr.update(value=value, **shown)
        return {**updates, self.fields["n"]: gr.update(value=1), self.lock: gr.update(value=True)}


def request_of(values: Sequence[Any]) -> tuple[dict[str, Any], list[str]]:
    """Read the values of `Form.inputs`: the API's body, and the names of the images."""
    given = dict(zip((*FIELDS, "lock"), values, strict=True))
    images = given.pop("image") or []
    del given["lock"]
    has = takes(str(given["model"]))
    if not (has.strength and images):
        del given["strength"]
    for name, kept in (("num_inference_steps", has.steps), ("guidance_scale", has.guidance)):
        if kept is None:
            del given[name]
    for name in ("num_inference_steps", "seed", "n"):
        if isinstance(given.get(name), float) and given[name].is_integer():
            given[name] = int(given[name])  # a browser has one kind of number
    return given, [name for name in images if isinstance(name, str)]


def _sizes(has: Takes) -> list[tuple[str, str]]:
    own = f"Auto: {has.side} × {has.side}, or the image's" if has.side else "Auto"
    return [(own, "auto"), *((size.replace("x", " × "), size) for size in has.sizes)]


def _steps(has: Takes) -> dict[str, Any]:
    return {"maximum": has.max_steps, "value": has.steps or 1, "visible": has.steps is not None}


def _guidance(has: Takes) -> dict[str, Any]:
    return {"maximum": _MAX_GUIDANCE, "value": has.guidance or 0, "visible": has.guidance is not None}


def _image_label(has: Takes) -> str:
    if has.references:
        return f"Up to {has.references} images to draw after: PNG, JPEG or WebP"
    return "An image to redraw: PNG, JPEG or WebP"
