"""The web page: Gradio at `/` of the gateway, for a person who wants a picture. It needs the extra `page`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI

from fluxserve_gateway.access import Access
from fluxserve_gateway.border import Record
from fluxserve_gateway.config import Config
from fluxserve_gateway.fleet import Fleet
from fluxserve_gateway.images import Images
from fluxserve_gateway.page.shelf import Shelf

_LOOK_S = 0.02  # between two looks for a click; Gradio's own 0.001 takes 6% of a core from an idle gateway
_MAX_TABS = 1000  # whose values Gradio keeps
_MAX_FILES = 1 << 30  # bytes of pictures and uploads together


def add_page(
    app: FastAPI,
    *,
    fleet: Fleet,
    config: Config,
    access: Access,
    images: Images,
    ended: Callable[[Record, float], None],
    keyed: bool,
) -> Callable[[], AbstractAsyncContextManager[None]]:
    """Add the page to the gateway's application.

    Args:
        app: the application; the page gets the paths that it needs, the last.
        fleet, config, access, images: the gateway's own.
        ended: called with each drawing's record, and the seconds it took.
        keyed: whether callers need a key.

    Returns:
        A context in which the page works; its files are removed at the end.

    Raises:
        ValueError: Gradio is not installed.
    """
    shelf = Shelf(_MAX_FILES)
    # Gradio reads these when it is imported, or at every use, and takes them from nowhere else.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(shelf.folder), HF_HUB_OFFLINE="1")
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        shelf.close()
        raise ValueError(
            f"page: {error.name} is not installed; expected pip install 'fluxserve-gateway[page]'"
        ) from error
    from fluxserve_gateway.page.door import Door
    from fluxserve_gateway.page.drawing import Drawings
    from fluxserve_gateway.page.gallery import Galleries
    from fluxserve_gateway.page.view import STYLE, THEME, View

    drawings = Drawings(images, ended)
    blocks = View(fleet, drawings, Galleries(shelf), shelf, keyed=keyed).blocks()
    blocks.state_session_capacity = _MAX_TABS
    blocks.queue(max_size=config.max_requests, api_open=False)
    blocks._queue.sleep_when_free = _LOOK_S
    shell = FastAPI(openapi_url=None)
    gr.mount_gradio_app(
        shell, blocks, "/", footer_links=[], run_history=False, allowed_paths=[], max_file_size=1, ssr_mode=False,
        mcp_server=False, enable_monitoring=False, pwa=False, show_error=False, theme=THEME, css=STYLE,
    )  # fmt: skip
    app.router.routes.append(Door(shell, access, config, images.bodies, shelf, drawings))

    @asynccontextmanager
    async def open_page() -> AsyncIterator[None]:
        try:
            before = asyncio.all_tasks()
            async with shell.router.lifespan_context(shell):
                gradios = asyncio.all_tasks() - before
                yield
                blocks.close(verbose=False)
                for task in gradios:  # it leaves them to the end of the process
                    task.cancel()
                await asyncio.wait(gradios)
        finally:
            shelf.close()

    return open_page
