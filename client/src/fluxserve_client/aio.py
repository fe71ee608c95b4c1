"""The client. `AsyncClient` is the whole implementation; `Client` (sync.py) runs it on a thread.

A request that its caller gives up must not go on eating the GPU. Hanging up doesn't stop it: an ensemble can't
cancel the step that runs, and over HTTP Triton doesn't notice at all. So whenever a call of ours is left before
its answer is here (its task is cancelled, its time is up, Ctrl-C, an exception out of the progress callback), the
client first asks `control` to cancel that request, and only then hangs up.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

from fluxserve_client.contract import (
    CONTROL,
    FLUX,
    Request,
    Tensors,
    control_tensors,
    parse_progress,
    parse_result,
)
from fluxserve_client.errors import DeadlineExceeded, FluxserveError
from fluxserve_client.follow import Callbacks, Follower, PreviewCallback, ProgressCallback
from fluxserve_client.forks import begin_anew_in_children
from fluxserve_client.images import ImageInput
from fluxserve_client.result import ImageFormat, Progress, Result, State
from fluxserve_client.retry import Retry, RetryingTransport
from fluxserve_client.transports import Transport, checked_headers, opener
from fluxserve_client.transports.endpoint import Endpoint, Tls
from fluxserve_client.transports.per_loop import PerLoop

log = logging.getLogger("fluxserve_client")

_MAX_ID_BYTES = 128
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_RETRY_S = 0.05  # between two tries to cancel a request that has not reached the server's table yet


class AsyncClient:
    """A client of one fluxserve server, for asyncio.

    ```python
    async with AsyncClient("grpc://localhost:8001") as client:
        result = await client.generate("a red fox in the snow", seed=7)
        result.save("fox.png")
    ```

    It connects at its first call, and may run any number of calls at the same time.

    Args:
        url: "host", "host:port", or "scheme://host[:port]" with scheme grpc, grpcs, http or https. Without a port:
            443 under TLS, else Triton's own, 8001 for gRPC and 8000 for HTTP.
        protocol: "grpc" (the default) or "http", for a `url` without a scheme.
        tls: certificates, for grpcs and https; given with a bare `url`, it turns TLS on.
        headers: sent with every call, as HTTP headers or gRPC metadata, e.g. {"Authorization": "Bearer …"}.
        poll_interval: seconds between two looks at a request whose progress is followed.
        cancel_timeout: seconds that the message which stops an abandoned request may take.
        keepalive: seconds between two pings while a call runs, over gRPC, for a network that drops silent connections.
            A server ends connections that ping more often than it allows: by Triton's default every 300 s, which its
            option `--grpc-http2-min-recv-ping-interval-without-data` changes. None sends none.
        retry: how often a call is sent again that the server can't take now; None, the default: never.
        transport: another wire, e.g. a `MockTransport`; then `url`, `protocol`, `tls`, `headers` and `keepalive` are
            not used.

    Raises:
        ValueError: an address, or options, that contradict each other.
        OSError: a certificate that cannot be read.
    """

    def __init__(
        self,
        url: str = "localhost",
        *,
        protocol: str | None = None,
        tls: Tls | None = None,
        headers: Mapping[str, str] | None = None,
        poll_interval: float = 0.1,
        cancel_timeout: float = 2.0,
        keepalive: float | None = None,
        retry: Retry | None = None,
        transport: Transport | None = None,
    ) -> None:
        wire = transport or PerLoop(opener(Endpoint.parse(url, protocol, tls), dict(headers or {}), keepalive))
        self._transport = RetryingTransport(wire, retry) if retry else wire
        self._poll_interval = poll_interval
        self._cancel_timeout = cancel_timeout
        self._closed = False
        self._deadlines: set[tuple[asyncio.AbstractEventLoop, asyncio.Timeout]] = set()
        self._requests: set[asyncio.Future[None]] = set()
        self._stopping: set[asyncio.Task[str | None]] = set()
        begin_anew_in_children(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the calls that run, stop their requests on the server, and close the connections.

        Those calls, and later ones, raise `RuntimeError`. A request that was sent from another event loop is
        stopped by that loop, which this method does not wait for.
        """
        self._closed = True
        here = asyncio.get_running_loop()
        for loop, deadline in list(self._deadlines):
            if loop is here:
                self._expire(loop, deadline)
            elif not loop.is_closed():
                loop.call_soon_threadsafe(self._expire, loop, deadline)
        running: list[asyncio.Future[Any]] = [*self._requests, *self._stopping]
        ending = [future for future in running if future.get_loop() is here]
        if ending:
            await asyncio.wait(ending)
        await self._transport.close()

    def _expire(self, loop: asyncio.AbstractEventLoop, deadline: asyncio.Timeout) -> None:
        if (loop, deadline) in self._deadlines and not deadline.expired():
            deadline.reschedule(0)  # a time long past

    def after_fork(self) -> Iterable[object]:
        """Forget the calls of the parent process; see `forks`."""
        state: list[object] = [*self._deadlines, *self._requests, *self._stopping]
        self._deadlines, self._requests, self._stopping = set(), set(), set()
        return state

    async def generate(
        self,
        prompt: str,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        true_cfg_scale: float | None = None,
        seed: int | None = None,
        num_images: int | None = None,
        image: ImageInput | Sequence[ImageInput] | None = None,
        strength: float | None = None,
        output_format: ImageFormat | str | None = None,
        quality: int | None = None,
        embed_prompt: bool | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        progress: ProgressCallback | None = None,
        on_preview: PreviewCallback | None = None,
        partial_images: int = 0,
    ) -> Result:
        """Draw what `prompt` says. Everything else is optional; what isn't given, the server's model decides.

        Args:
            prompt: text, at most 4,096 bytes of UTF-8.
            height, width: pixels, multiples of 16 within the model's limits.
            num_inference_steps: denoising steps, 1 to the model's limit.
            guidance_scale: how closely to follow the prompt.
            negative_prompt: what not to draw, at most 4,096 bytes of UTF-8. It takes a second pass in every step, and
                so twice the time. With FLUX.1 give a `true_cfg_scale` beside it; else FLUX.2-klein Base alone takes it.
            true_cfg_scale: with FLUX.1, how far to keep from `negative_prompt`: above 1; 1 switches it off.
            seed: -1 draws one; the ones used are in the result. Image k of several has seed + k.
            num_images: 1 to 8.
            image: a picture to start from: the bytes of a PNG, JPEG or WebP file, its path, a Pillow image, or a data
                URI or base64 text. With FLUX.2 one to four of them, to draw after. It is sent as a viewer shows it;
                see `fluxserve_client.images`.
            strength: how far to leave `image` behind, above 0 (nearly the same) up to 1 (a new picture); not of FLUX.2.
            output_format: "png" (the server's default), "jpeg", "webp" or "raw" (uint8 RGB, height × width × 3); also
                as "JPEG", "jpg" or ".jpg".
            quality: of jpeg and webp.
            embed_prompt: write the prompt into the files, beside the parameters that they have anyway.
            request_id: the name of this request for `status` and `cancel`, 1 to 128 bytes of UTF-8 without control
                characters, unique among the requests in flight; a random one if not given.
            headers: sent with this request alone, beside the client's own, e.g. a `traceparent`.
            timeout: seconds for the whole call; None waits for ever.
            progress: called, and awaited if it is asynchronous, on the event loop with a `Progress` at every change
                that is seen. What it raises leaves this call, after the request is cancelled: raise from it to
                stop. If the *server* can't tell the progress, that is logged as a warning and the call goes on
                without.
            on_preview: called likewise with a `Preview`, a glimpse of the picture, whenever a newer one is seen.
            partial_images: 1 to 3: `on_preview` gets that many previews of full size in place of glimpses, spread over
                the steps; fewer if the steps are few or quick. Each costs the server a pass of the VAE's decoder.

        Raises:
            TypeError, ValueError, OSError: an argument that cannot be sent; nothing was sent.
            InvalidRequest: a value the server does not accept.
            QueueFull, Unavailable: the server can't take it now.
            RequestIdInUse, Cancelled, AccessDenied, ServerError: see `fluxserve_client.errors`.
            DeadlineExceeded: `timeout` passed; the server was told to stop.
            ConnectionFailed: nothing answered, or the connection broke.
            RuntimeError: the client is closed, or was closed before the answer came.

        Whichever way the call is left early, a note on the exception (and a logged warning) says so if the server
        could not be told to stop.
        """
        request = Request(
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            true_cfg_scale=true_cfg_scale,
            seed=seed,
            num_images=num_images,
            image=image,
            strength=strength,
            output_format=output_format,
            quality=quality,
            embed_prompt=embed_prompt,
        )
        self._check(timeout)
        callbacks = Callbacks(progress, on_preview, partial_images)
        inputs = request.tensors()
        name = uuid.uuid4().hex if request_id is None else _checked(request_id)
        sent = checked_headers(headers or {})
        async with self._in_flight(name, inputs, sent) as answer, self._within(timeout, name):
            outputs = await self._attend(answer, name, callbacks)
        return parse_result(outputs, name, output_format)

    async def status(self, request_id: str, *, timeout: float | None = None) -> Progress:
        """How far the request `request_id` is; state UNKNOWN before it arrived and after it was answered.

        Raises `DeadlineExceeded` after `timeout` seconds, and what `generate` raises for the server's answers.
        """
        return await self._control(request_id, "status", timeout)

    async def cancel(self, request_id: str, *, timeout: float | None = None) -> State:
        """Stop the request `request_id`, whoever sent it: its caller gets `Cancelled`.

        Returns CANCELLING, or UNKNOWN if no such request is in flight. Raises as `status` does.
        """
        return (await self._control(request_id, "cancel", timeout)).state

    async def ready(self, *, timeout: float | None = None) -> bool:
        """Whether the server and its models can take requests.

        Raises `ConnectionFailed` if nothing answers and `DeadlineExceeded` after `timeout` seconds.
        """
        self._check(timeout)
        async with self._within(timeout):
            return all([await self._transport.ready(model) for model in (FLUX, CONTROL)])

    async def _control(self, request_id: str, action: str, timeout: float | None) -> Progress:
        self._check(timeout)
        async with self._within(timeout, _checked(request_id)):
            return await self._ask(request_id, action)

    async def _ask(self, request_id: str, action: str) -> Progress:
        return parse_progress(await self._transport.infer(CONTROL, control_tensors(request_id, action), ""))

    def _check(self, timeout: float | None) -> None:
        if self._closed:
            raise RuntimeError("this client is closed")
        if timeout is not None and math.isnan(timeout):
            raise ValueError(f"timeout: got {timeout}, expected seconds, or None to wait for ever")

    @asynccontextmanager
    async def _within(self, timeout: float | None, request_id: str = "") -> AsyncIterator[None]:
        """Bound the block as `asyncio.timeout` does.

        Raises `DeadlineExceeded`, or `RuntimeError` where `close` ended the block; a TimeoutError of the block's own
        passes untouched.
        """
        try:
            async with asyncio.timeout(timeout) as deadline:
                entry = asyncio.get_running_loop(), deadline
                self._deadlines.add(entry)
                try:
                    yield
                finally:
                    self._deadlines.discard(entry)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            if self._closed:
                raise RuntimeError("this client was closed before the answer came") from error
            message = f"no answer within {timeout:g} s"
            raise DeadlineExceeded(message, status="DEADLINE_EXCEEDED", request_id=request_id) from error

    @asynccontextmanager
    async def _in_flight(
        self, request_id: str, inputs: Tensors, headers: Mapping[str, str]
    ) -> AsyncIterator[asyncio.Task[Tensors]]:
        """Send the request; if the block is left before the answer is here, stop it on the server."""
        answer = asyncio.create_task(_infer(self._transport, inputs, request_id, headers))
        left = asyncio.get_running_loop().create_future()
        self._requests.add(left)
        try:
            yield answer
        except GeneratorExit:  # this call is dropped together with its event loop: nothing can be awaited here
            log.warning("request %s may still run on the server: its event loop ended", request_id)
            raise
        except BaseException as error:  # CancelledError above all
            if _answered(answer):
                answer.exception()  # nobody is left to hear it
            else:
                stopping = asyncio.create_task(self._stop(request_id, answer))
                self._stopping.add(stopping)
                stopping.add_done_callback(self._stopping.discard)
                # shielded: a caller that is cancelled once more leaves, and the message still goes out
                if problem := await asyncio.shield(stopping):
                    error.add_note(problem)
            raise
        finally:
            self._requests.discard(left)
            left.cancel()

    async def _stop(self, request_id: str, answer: asyncio.Task[Tensors]) -> str | None:
        """Cancel on the server, then hang up; return what went wrong.

        The request may still be on its way when the cancel arrives, so an unknown id is asked for again until the
        answer shows that there is nothing left to stop.
        """
        problem = None
        try:
            async with asyncio.timeout(self._cancel_timeout):
                while (await self._ask(request_id, "cancel")).state is State.UNKNOWN and not _answered(answer):
                    await asyncio.sleep(_RETRY_S) if answer.done() else await asyncio.wait({answer}, timeout=_RETRY_S)
        except (FluxserveError, TimeoutError) as error:
            reason = str(error) or f"no confirmation within {self._cancel_timeout:g} s"
            problem = f"request {request_id} may still run on the server: it could not be cancelled: {reason}"
            log.warning("%s", problem)
        finally:
            answer.cancel()
            await asyncio.wait({answer})
            _ = answer.cancelled() or answer.exception()  # nobody is left to hear it
        return problem

    async def _attend(self, answer: asyncio.Task[Tensors], request_id: str, callbacks: Callbacks) -> Tensors:
        """Wait for the answer, following the progress meanwhile.

        Never awaits `answer` itself: cancelling the awaiting task would hang up before the server is told.
        """
        if not callbacks.wanted:
            await asyncio.wait({answer})
            return answer.result()
        follower = asyncio.create_task(Follower(self._transport, request_id, callbacks, self._poll_interval).run())
        try:
            await asyncio.wait({answer, follower}, return_when=asyncio.FIRST_COMPLETED)
            if follower.done() and (error := follower.result()):
                raise error
            await asyncio.wait({answer})
            return answer.result()
        finally:
            follower.cancel()
            await asyncio.wait({follower}, timeout=self._cancel_timeout)


async def _infer(transport: Transport, inputs: Tensors, request_id: str, headers: Mapping[str, str]) -> Tensors:
    return await transport.infer(FLUX, inputs, request_id, headers)


def _checked(request_id: str) -> str:
    if not isinstance(request_id, str):
        raise TypeError(f"request_id: got {type(request_id).__name__}, expected str")
    size = len(request_id.encode(errors="replace"))
    if not 1 <= size <= _MAX_ID_BYTES or _NO_TEXT.search(request_id):
        expected = f"1 to {_MAX_ID_BYTES} bytes of UTF-8 without control characters"
        raise ValueError(f"request_id: got {request_id!r}, expected {expected}")
    return request_id


def _answered(answer: asyncio.Task[Tensors]) -> bool:
    """Whether the server's last word is here. A wait that was cancelled, by the end of an event loop, has none."""
    return answer.done() and not answer.cancelled()
