"""Sends a soak's requests as clients do, and judges each answer by itself."""

import asyncio
import contextlib
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc.aio as triton
from fluxserve_client import AsyncClient, Result
from fluxserve_client.errors import Cancelled, DeadlineExceeded, InvalidRequest, RequestIdInUse
from PIL import Image
from tritonclient.grpc import InferInput

from benchmarks.soak.cases import IN_USE, Case
from fluxserve import contract

LOST_S = 120.0
"""A request without an answer for this long is lost."""


@dataclass(frozen=True)
class Outcome:
    """How one request ended. wrong: "" if that is as it must be; ms: what its caller waited."""

    case: Case
    ended: str
    ms: float
    wrong: str = ""


class Callers:
    """Callers of one server over both protocols; they share a sequence of requests."""

    def __init__(self, urls: Mapping[str, str], known: Mapping[str, tuple[bytes, ...]] | None = None) -> None:
        """
        Args:
            urls: host:port by protocol.
            known: bytes of the reference requests, by their number, if they were drawn before.
        """
        self._urls = urls
        self._clients = {name: AsyncClient(f"{name}://{url}") for name, url in urls.items()}
        self.known = dict(known or {})
        self.outcomes: list[Outcome] = []
        self.sent = 0

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()

    async def run(self, cases: Iterator[Case], at_once: int, until: float) -> None:
        """Send requests, `at_once` at a time, until the monotonic clock reads `until`; return when all are answered."""

        async def call() -> None:
            while time.monotonic() < until:
                case = next(cases)
                self.sent += 1
                self.outcomes.append(await self._judged(case))

        await asyncio.gather(*(call() for _ in range(at_once)))

    async def draw_references(self, references: Sequence[Case]) -> list[str]:
        """Draw each reference request alone; return what differs from before. The first time nothing can differ."""
        different = []
        for case in references:
            images = (await self._draw(case)).images
            if self.known.setdefault(case.what, images) != images:
                different.append(f"reference {case.what} over {case.protocol}")
        return different

    # --- one request -----------------------------------------------------------------------------------------------

    async def _judged(self, case: Case) -> Outcome:
        call = {"good": self._good, "abandoned": self._abandoned, "bad": self._bad}[case.kind]
        begin = time.monotonic()
        try:
            ended, wrong = await asyncio.wait_for(call(case), LOST_S)
        except TimeoutError:
            ended, wrong = "lost", f"no answer within {LOST_S:.0f} s"
        except Exception as error:  # noqa: BLE001 (each error that is not the due one is a finding)
            ended, wrong = type(error).__name__, f"{type(error).__name__}: {error}"
        return Outcome(case, ended, 1000 * (time.monotonic() - begin), wrong)

    async def _draw(self, case: Case, **options: Any) -> Result:
        return await self._clients[case.protocol].generate(**case.fields, **options)

    async def _good(self, case: Case) -> tuple[str, str]:
        result = await self._draw(case)
        if case.what and result.images != self.known[case.what]:
            return "answered", f"other bytes than reference {case.what} had"
        return "answered", flaw(result, case.fields)

    async def _bad(self, case: Case) -> tuple[str, str]:
        if case.what == IN_USE:
            return await self._in_use(case)
        try:
            await self._draw(case)
        except InvalidRequest as error:
            return "refused", "" if case.what in str(error) else f"{case.what} is not named: {error}"
        return "answered", f"{case.what} is wrong, and it was answered"

    async def _in_use(self, case: Case) -> tuple[str, str]:
        """Send a request whose id another one has, which is at its beginning, and is cancelled afterwards."""
        name, client = f"soak-{case.number}", self._clients[case.protocol]
        first = asyncio.create_task(self._draw(case, request_id=name))
        try:
            while (progress := await client.status(name)).state == "unknown" and not first.done():
                await asyncio.sleep(0.01)
            if first.done() or 2 * progress.step > progress.steps:
                return "too late", ""
            await self._draw(case, request_id=name)
        except RequestIdInUse:
            return "refused", ""
        finally:
            first.cancel()
            await asyncio.wait([first])
        return "answered", "two requests had one id"

    # --- giving up -------------------------------------------------------------------------------------------------

    async def _abandoned(self, case: Case) -> tuple[str, str]:
        """Give a request up. One that was answered before is counted as such, and as right."""
        if case.what == "hung up":
            await (self._hang_up if case.protocol == "http" else self._cancel_rpc)(case)
            return "gave up", ""
        name = f"soak-{case.number}"
        options = {"timeout": case.delay} if case.what == "deadline" else {"request_id": name}
        task = asyncio.create_task(self._draw(case, **options))
        try:
            if case.what == "control":
                await self._cancel_by_id(name, case, task)
            elif case.what == "task cancelled":
                await asyncio.wait([task], timeout=case.delay)
                task.cancel()
            await asyncio.wait([task])
        finally:
            task.cancel()
            await asyncio.wait([task])
        if task.cancelled() or isinstance(task.exception(), Cancelled | DeadlineExceeded):
            return "gave up", ""
        task.result()  # any other error
        return "answered", ""

    async def _cancel_by_id(self, name: str, case: Case, task: "asyncio.Task[Result]") -> None:
        """Cancel as another caller would: over the other protocol, by the request's id."""
        await asyncio.wait([task], timeout=case.delay)
        other = self._clients["http" if case.protocol == "grpc" else "grpc"]
        while not task.done() and (await other.cancel(name)) == "unknown":
            await asyncio.sleep(0.01)

    async def _hang_up(self, case: Case) -> None:
        """Send a request over a connection of its own, and close that without a word."""
        host, _, port = self._urls["http"].rpartition(":")
        _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        body = json.dumps({"inputs": [_as_json(*item) for item in _plain(case).items()]}).encode()
        head = f"POST /v2/models/flux/infer HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        await asyncio.sleep(case.delay)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def _cancel_rpc(self, case: Case) -> None:
        """Cancel the call itself, as a gRPC client does that knows nothing of `control`."""
        async with triton.InferenceServerClient(self._urls["grpc"]) as client:
            inputs = []
            for name, value in _plain(case).items():
                dtype = contract.FLUX.dtype_of(name)
                tensor = InferInput(name, [1], dtype)
                tensor.set_data_from_numpy(_array(value, dtype))
                inputs.append(tensor)
            task = asyncio.create_task(client.infer("flux", inputs))
            try:
                await asyncio.wait([task], timeout=case.delay)
            finally:
                task.cancel()
                await asyncio.wait([task])
            if not task.cancelled():
                task.result()


def _plain(case: Case) -> dict[str, Any]:
    """The fields without a picture, whose bytes JSON can't hold."""
    return {name: value for name, value in case.fields.items() if name not in ("image", "strength")}


def _array(value: Any, dtype: str) -> Any:
    numpy_dtype = {"BYTES": np.object_, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}[dtype]
    return np.array([value.encode() if isinstance(value, str) else value], dtype=numpy_dtype)


def _as_json(name: str, value: Any) -> dict[str, Any]:
    return {"name": name, "shape": [1], "datatype": contract.FLUX.dtype_of(name), "data": [value]}


def flaw(result: Result, fields: Mapping[str, Any]) -> str:
    """What is wrong with an answer; "" if nothing is: its number of files, their format and size, its seeds."""
    count, size = fields.get("num_images", 1), (fields["width"], fields["height"])
    if len(result.images) != count:
        return f"{len(result.images)} images; expected {count}"
    if result.seeds != tuple(fields["seed"] + k for k in range(count)):
        return f"seeds {result.seeds}; expected to begin with {fields['seed']}"
    for image in result.images:
        if fields["output_format"] == "raw":
            if len(image) != 3 * size[0] * size[1]:
                return f"{len(image)} bytes of RGB for {size[0]} x {size[1]}"
            continue
        with Image.open(io.BytesIO(image)) as opened:
            opened.load()
            if (opened.format or "").lower() != fields["output_format"] or opened.size != size:
                return f"a {opened.format} of {opened.size}; expected {fields['output_format']} of {size}"
    return ""
