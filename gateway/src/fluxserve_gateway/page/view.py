"""The page: a form, the picture, what was drawn before; and the events between them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr
from fluxserve_client import Preview, Progress, Result

from fluxserve_gateway.errors import GatewayError, InvalidField
from fluxserve_gateway.fields import Generation
from fluxserve_gateway.fleet import Fleet
from fluxserve_gateway.page import form, fragments, parts, snippets
from fluxserve_gateway.page.drawing import Caller, Drawings, body_of
from fluxserve_gateway.page.form import Form, Updates
from fluxserve_gateway.page.gallery import Entry, Galleries
from fluxserve_gateway.page.shelf import Shelf

STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="stone",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
).set(
    block_background_fill="transparent",
    block_background_fill_dark="transparent",
    block_border_width="0px",
    block_padding="0px",
    block_shadow="none",
    body_background_fill="*neutral_50",
    body_text_color_subdued="*neutral_500",
    button_large_radius="10px",
    input_background_fill="white",
    input_border_width="1px",
    input_radius="10px",
    layout_gap="18px",
)
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}


class View:
    """The page of one gateway."""

    def __init__(self, fleet: Fleet, drawings: Drawings, galleries: Galleries, shelf: Shelf, *, keyed: bool) -> None:
        self._fleet = fleet
        self._drawings = drawings
        self._galleries = galleries
        self._shelf = shelf
        self._keyed = keyed
        self._form = Form(list(fleet.models))
        self._busy: set[str] = set()

    def blocks(self) -> gr.Blocks:
        """Lay the page out."""
        with gr.Blocks(title="fluxserve", analytics_enabled=False) as blocks:
            self._secret = gr.BrowserState("", storage_key="fluxserve")
            gr.HTML("<h1>fluxserve</h1>")
            with gr.Row(elem_id="columns"):
                with gr.Column(elem_id="words"):
                    self._form.lay_out_words()
                    with gr.Row():
                        self._draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=100)
                        self._stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=100)
                with gr.Column(elem_id="shown"):
                    self._stage = parts.chooser("stage", fragments.NOTHING_YET)
                    self._lay_out_details()
                with gr.Column(elem_id="settings"):
                    self._form.lay_out_settings()
            self._gallery = parts.chooser("gallery")
            self._connect(blocks)
        return blocks

    def _lay_out_details(self) -> None:
        """Lay out what can be done with the picture that is shown."""
        with gr.Column(visible=False, elem_id="details") as self._details, gr.Accordion("As code", open=False):
            self._codes: list[tuple[Any, Callable[..., str]]] = []
            for label, language, write in (
                ("curl", "shell", snippets.curl),
                ("Python", "python", snippets.python),
                ("OpenAI SDK", "python", snippets.openai_sdk),
            ):
                with gr.Tab(label):
                    shown = gr.Code(language=language, show_label=False, wrap_lines=True, interactive=False)
                    self._codes.append((shown, write))

    def _connect(self, blocks: gr.Blocks) -> None:
        fields = self._form.fields
        shown = [self._stage, self._gallery, self._details, *(place for place, _ in self._codes)]
        fitted = [fields[name] for name in form.FIELDS] + [*self._form.refusals.values(), self._form.lock]
        drawn = [*shown, fields["seed"], self._draw, self._stop, *self._form.refusals.values()]
        inputs = [self._secret, *self._form.inputs]
        blocks.load(self._opened, self._secret, [self._secret, self._gallery], **_QUIET)
        blocks.load(None, None, fields["seed"], js=form.DICE, **_QUIET)
        gr.on(
            [self._draw.click, fields["prompt"].submit], self._drawn, inputs, drawn, trigger_mode="multiple", **_QUIET
        )
        self._stop.click(self._stopped, None, None, **_QUIET)
        self._gallery.click(self._choose, self._secret, shown, **_QUIET)
        self._stage.click(self._use_again, self._secret, fitted, **_QUIET)
        fields["model"].input(self._form.fitted, fields["model"], fitted, **_QUIET)

    # --- events ------------------------------------------------------------------------------------------------------

    def _opened(self, claimed: object) -> tuple[str, str]:
        """Show a browser what it has drawn."""
        secret = self._galleries.secret(claimed)
        return secret, fragments.thumbnails(self._galleries.pictures(secret))

    async def _drawn(self, request: gr.Request, claimed: object, *values: Any) -> AsyncIterator[Updates]:
        """Draw once for a tab at a time: of a double click the second draws nothing."""
        tab = _caller(request).tab
        if tab in self._busy:
            yield {self._stage: gr.skip()}
            return
        self._busy.add(tab)
        try:
            async for updates in self._drawing(request, claimed, *values):
                yield updates
        finally:
            self._busy.discard(tab)

    async def _drawing(self, request: gr.Request, claimed: object, *values: Any) -> AsyncIterator[Updates]:
        """Draw, and show how far it is."""
        ready = {self._draw: gr.update(interactive=True), self._stop: gr.update(interactive=False)}
        try:
            given, names = form.request_of(values)
            body = body_of(given, edit=bool(names))
            files = self._images(names)
        except GatewayError as error:
            yield {**self._form.cleared(), **self._form.refused(error)}
            return
        yield {
            **self._form.cleared(),
            self._stage: fragments.waiting(None, 0),
            self._details: gr.update(visible=False),
            self._draw: gr.update(interactive=False),
            self._stop: gr.update(interactive=True),
        }
        ahead = min(self._in_flight(body))  # it goes to the server with the fewest
        result: Result | None = None
        progress: Progress | None = None
        preview: str | None = None
        try:
            async for event in self._drawings.draw(_caller(request), body, files):
                if isinstance(event, Result):
                    result = event
                    continue
                if isinstance(event, Preview):
                    preview = fragments.inline(event.image, event.format)
                else:
                    progress, ahead = event, min(ahead, max(self._in_flight(body)) - 1)
                yield {self._stage: fragments.waiting(progress, max(ahead, 0), preview)}
        except GatewayError as error:
            yield {**ready, self._stage: fragments.NOTHING_YET, **self._form.refused(error)}
            return
        if result is None:
            yield {**ready, self._stage: fragments.STOPPED}
            return
        secret = self._galleries.secret(claimed)
        entries = self._kept(result, body, edit=bool(files))
        self._galleries.add(secret, entries)
        yield {**ready, **self._form.rolled(values[-1]), **self._shown(entries[0], secret, request)}

    def _stopped(self, request: gr.Request) -> None:
        self._drawings.stop(_caller(request).tab)

    def _choose(self, request: gr.Request, claimed: object, event: gr.EventData) -> Updates:
        """Show a picture of the gallery."""
        secret = self._galleries.secret(claimed)
        entry = self._galleries.find(secret, event.name)
        if entry is None:
            return {self._gallery: fragments.thumbnails(self._galleries.pictures(secret))}
        return self._shown(entry, secret, request)

    def _use_again(self, claimed: object, event: gr.EventData) -> Updates:
        """Put the settings of the picture that is shown into the form."""
        entry = self._galleries.find(self._galleries.secret(claimed), event.name)
        return self._form.filled(entry) if entry else {self._form.lock: gr.skip()}

    # --- what they need ----------------------------------------------------------------------------------------------

    def _images(self, names: list[str]) -> list[bytes]:
        files = [self._shelf.get(name) for name in names]
        if None in files:
            raise InvalidField("image: got one that is not kept any more; allowed: choose it again", param="image")
        return [file for file in files if file is not None]

    def _in_flight(self, body: Generation) -> list[int]:
        """Return how many requests this gateway has at each server that may draw it."""
        servers = self._fleet.models.get(body.model or "", ())
        return [server.in_flight for server in servers if server.ready] or [0]

    def _kept(self, result: Result, body: Generation, *, edit: bool) -> list[Entry]:
        """Put the pictures on the shelf, each with the request that draws it alone."""
        given = body.model_dump(exclude_none=True, exclude={"n"})
        given["size"] = f"{result.width}x{result.height}"
        return [
            Entry(self._shelf.put(data), {**given, "seed": seed}, edit, result.format, result.width, result.height)
            for data, seed in zip(result.images, result.seeds, strict=True)
        ]

    def _shown(self, entry: Entry, secret: str, request: gr.Request) -> Updates:
        """Show a picture, and what can be done with it."""
        url = str(request.request.base_url).rstrip("/")
        return {
            self._stage: fragments.picture(entry),
            self._details: gr.update(visible=True),
            self._gallery: fragments.thumbnails(self._galleries.pictures(secret), entry.name),
            **{place: write(entry, url, keyed=self._keyed) for place, write in self._codes},
        }


def _caller(request: gr.Request) -> Caller:
    assert request.request is not None and request.session_hash is not None
    client = request.request.client
    return Caller(request.session_hash, request.request.scope["fluxserve.key"], client.host if client else "")
