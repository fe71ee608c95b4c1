"""The page's own pieces of HTML. Whatever a person wrote is escaped."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence

from fluxserve_client import Progress, State

from fluxserve_gateway.errors import GatewayError
from fluxserve_gateway.page.gallery import Entry

_NO_NAME = re.compile(r"[^a-z0-9]+")
_MAX_NAME = 40

NOTHING_YET = '<div class="stage empty"><p>Your picture will be here.</p></div>'
STOPPED = '<div class="stage empty"><p role="status">Stopped. Nothing was drawn.</p></div>'


def escaped(text: str) -> str:
    """Return text as it is to be read, in an element or an attribute."""
    return html.escape(text)


def inline(file: bytes, kind: str) -> str:
    """Return the URL of a small picture that holds the picture itself."""
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def waiting(progress: Progress | None, ahead: int, preview: str | None = None) -> str:
    """Show how far a picture is.

    Args:
        progress: None until the server has said something.
        ahead: the most requests that can be before it in the queue, as far as this gateway knows.
        preview: the URL of an unfinished picture.
    """
    step, steps = (progress.step, progress.steps) if progress else (0, 0)
    running = progress is not None and progress.state is State.RUNNING and steps
    value = f'value="{step}" max="{steps}"' if running else ""
    words = f"Step {step} of {steps}" if running else _in_the_queue(progress, ahead)
    picture = f'<img src="{escaped(preview)}" alt="The unfinished picture">' if preview else ""
    return (
        f'<div class="stage drawing">{picture}<div class="bar"><progress {value} aria-label="Steps"></progress>'
        f'<p role="status">{words}</p></div></div>'
    )


def _in_the_queue(progress: Progress | None, ahead: int) -> str:
    if progress is None or progress.state is not State.QUEUED:
        return "Stopping" if progress and progress.state is State.CANCELLING else "Sending"
    others = f", after up to {ahead} other request{'s' if ahead > 1 else ''} of this gateway" if ahead else ""
    return f"In the queue{others}"


def picture(entry: Entry) -> str:
    """Show a picture, its settings, and the way to save it."""
    source, name = f"pictures/{entry.name}", f"{_slug(entry.prompt)}-{entry.seed}.{entry.format}"
    return (
        f'<figure class="stage"><a href="{source}" target="_blank" aria-label="Open the picture alone">'
        f'<img src="{source}" width="{entry.width}" height="{entry.height}" alt="{escaped(entry.prompt)}"></a>'
        f'<figcaption><p>{escaped(entry.prompt)}</p><p class="settings">{_settings(entry)}</p>'
        f'<p class="actions"><a href="{source}" download="{name}">Download</a>'
        f'<button type="button" data-name="{entry.name}">Use again</button></p></figcaption></figure>'
    )


def thumbnails(entries: Sequence[Entry], chosen: str = "") -> str:
    """Show a browser's pictures; each is a button with the name of its picture."""
    if not entries:
        return ""
    items = "".join(
        f'<li><button type="button" data-name="{entry.name}" aria-pressed="{str(entry.name == chosen).lower()}"'
        f' title="{escaped(entry.prompt)}" aria-label="{escaped(entry.prompt)}, seed {entry.seed}">'
        f'<img src="pictures/{entry.name}" alt="" loading="lazy"><span>{entry.seed}</span></button></li>'
        for entry in entries
    )
    return f'<h2>Drawn in this browser</h2><ul class="thumbnails">{items}</ul>'


def refusal(error: GatewayError) -> str:
    """Say what is wrong, without the name of the field that the words stand beside."""
    words = error.message
    if error.param:
        words = re.sub(rf"^{re.escape(error.param)}( \([a-z_, ]+\))?: ", "", words)
    return f'<p class="refusal" role="alert">{escaped(words[:1].upper() + words[1:])}</p>'


def _settings(entry: Entry) -> str:
    named = (("num_inference_steps", "steps"), ("guidance_scale", "guidance"), ("strength", "strength"))
    parts = [f"seed {entry.seed}", f"{entry.width} × {entry.height}"]
    parts += [f"{words} {entry.body[name]:g}" for name, words in named if name in entry.body]
    return escaped(" · ".join([*parts, str(entry.body["model"])]))


def _slug(prompt: str) -> str:
    return _NO_NAME.sub("-", prompt.lower()).strip("-")[:_MAX_NAME].strip("-") or "picture"
