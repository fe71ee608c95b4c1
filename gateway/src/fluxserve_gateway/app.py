"""Make the application: its routes, and what is opened and closed with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from fluxserve_gateway.access import Access
from fluxserve_gateway.border import Border, Record
from fluxserve_gateway.config import Config
from fluxserve_gateway.documents import EDIT, GENERATION, MODEL, PICTURES, refusals
from fluxserve_gateway.errors import ModelNotFound, NoSuchRoute
from fluxserve_gateway.fleet import Fleet
from fluxserve_gateway.images import Images
from fluxserve_gateway.jobs.settings import JobSettings
from fluxserve_gateway.keys import Keys
from fluxserve_gateway.metrics import Metrics
from fluxserve_gateway.version import __version__

if TYPE_CHECKING:
    from fluxserve_gateway.jobs.service import Service


def create_app(
    fleet: Fleet,
    *,
    config: Config | None = None,
    keys: Keys | None = None,
    jobs: JobSettings | None = None,
    page: bool = False,
) -> FastAPI:
    """Make the gateway.

    Args:
        fleet: the servers behind it, closed when the application ends.
        config: its bounds.
        keys: who may call; None lets this machine's own programs, by a loopback name, and no web pages.
        jobs: where jobs are kept; None takes none.
        page: whether there is a web page at `/`.

    Raises:
        ValueError, OSError, DatabaseError: the place for jobs cannot be used, or a page without Gradio.
    """
    config = config or Config()
    metrics = Metrics(fleet)
    access = Access(keys, config)
    images = Images(config, fleet, access, metrics)

    service = _service(jobs, config, fleet, images, metrics) if jobs else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await fleet.probe()
        watching = asyncio.create_task(fleet.watch(config.probe_interval))
        try:
            async with open_page(), service.running() if service else nullcontext():
                yield
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            await fleet.close()
            await asyncio.to_thread(fleet.tracer.close)

    app = FastAPI(
        title="fluxserve gateway",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        # our tracer makes the spans; FastAPI's telemetry has the messages of errors, which may quote prompts
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST", "DELETE"] if jobs else ["GET", "POST"],
            allow_headers=["authorization", "content-type", *(["idempotency-key"] if jobs else [])],
            expose_headers=["x-request-id", "retry-after"],
        )

    def ended(record: Record, seconds: float) -> None:
        if record.operation:
            metrics.ended(record.model, record.operation, record.outcome, seconds)

    app.add_middleware(Border, ended=ended, tracer=fleet.tracer, send_timeout=config.send_timeout, https=config.https)
    app.add_exception_handler(HTTPException, _no_such_route)
    _add_routes(app, images)
    _add_models(app, fleet, access)
    if service:
        service.add_routes(app, access)
    _add_operations(app, fleet, metrics, access)
    open_page: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
    if page:
        from fluxserve_gateway.page import add_page

        open_page = add_page(
            app, fleet=fleet, config=config, access=access, images=images, ended=ended, keyed=keys is not None
        )
    return app


def _service(jobs: JobSettings, config: Config, fleet: Fleet, images: Images, metrics: Metrics) -> Service:
    try:
        from fluxserve_gateway.jobs.service import Service  # what it imports is an extra of the distribution
    except ImportError as error:
        raise ValueError(f"jobs: {error}; install it with: pip install 'fluxserve-gateway[jobs]'") from error
    return Service(jobs, config, fleet, images, metrics)


def _add_routes(app: FastAPI, images: Images) -> None:
    """Add the routes that draw. They read their own bodies: FastAPI would, before a key is looked at."""

    @app.post("/v1/images/generations", openapi_extra=GENERATION, responses=PICTURES)
    async def generations(request: Request) -> Response:
        """Draw pictures from words."""
        return await images.generations(request)

    @app.post("/v1/images/edits", openapi_extra=EDIT, responses=PICTURES)
    async def edits(request: Request) -> Response:
        """Draw pictures from words and pictures."""
        return await images.edits(request)


def _add_models(app: FastAPI, fleet: Fleet, access: Access) -> None:
    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "fluxserve"}

    @app.get("/v1/models", responses=refusals(401, 403))
    async def models(request: Request) -> JSONResponse:
        """List the models that are served."""
        access.key_of(request)
        return JSONResponse({"object": "list", "data": [described(name) for name in fleet.models]})

    @app.get("/v1/models/{model:path}", openapi_extra=MODEL, responses=refusals(401, 403, 404))
    async def model(request: Request) -> JSONResponse:
        """Describe one model."""
        access.key_of(request)
        model = request.path_params["model"]
        if model not in fleet.models:
            raise ModelNotFound(f"model: got {model[:60]!r}; allowed: {', '.join(fleet.models)}", param="model")
        return JSONResponse(described(model))


def _add_operations(app: FastAPI, fleet: Fleet, metrics: Metrics, access: Access) -> None:
    @app.head("/health/live", include_in_schema=False)
    @app.get("/health/live")
    async def live() -> JSONResponse:
        """Report that the gateway runs."""
        return JSONResponse({"live": True})

    @app.head("/health/ready", include_in_schema=False)
    @app.get("/health/ready", responses={503: {"description": "no model can be drawn now"}})
    async def ready() -> JSONResponse:
        """Report how many servers of each model take requests."""
        models = {
            name: {"servers": len(servers), "ready": sum(server.ready for server in servers)}
            for name, servers in fleet.models.items()
        }
        return JSONResponse({"ready": fleet.ready, "models": models}, 200 if fleet.ready else 503)

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", response_class=PlainTextResponse, responses=refusals(401, 403))
    async def read_metrics(request: Request) -> Response:
        """Write the metrics for Prometheus; where there are keys, any of them is needed."""
        access.key_of(request)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _no_such_route(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    raise NoSuchRoute(error.status_code, str(error.detail), (error.headers or {}).get("Allow")) from error
