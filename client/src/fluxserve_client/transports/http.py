"""HTTP, over tritonclient's asyncio client, with every tensor in Triton's binary form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import aiohttp
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from fluxserve_client.contract import Tensors
from fluxserve_client.errors import ConnectionFailed, FluxserveError, from_status
from fluxserve_client.transports import NO_HEADERS
from fluxserve_client.transports.endpoint import Endpoint

# aiohttp would accept gzip, and Triton then compress files that are compressed: 30 ms for a picture of 1024 × 1024.
_HEADERS = {"accept-encoding": "identity"}


class HttpTransport:
    """See `Transport`. `headers` are HTTP headers, which go before ours."""

    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str]) -> None:
        self._endpoint = endpoint
        self._headers = _HEADERS | {key.lower(): value for key, value in headers.items()}

    @cached_property
    def _client(self) -> Any:
        # at the first call and not before: a session belongs to the event loop it is made on
        tls = self._endpoint.tls
        return aio.InferenceServerClient(
            self._endpoint.address,
            ssl=tls is not None,
            ssl_context=tls.context() if tls else None,
            conn_limit=0,  # a `cancel` must never wait for the connections of the requests it is to stop
            conn_timeout=None,  # tritonclient gives it to the whole request, and 60 s by default; ours is `timeout`
        )

    async def infer(
        self, model: str, inputs: Tensors, request_id: str, headers: Mapping[str, str] = NO_HEADERS
    ) -> Tensors:
        with _border(self._endpoint, request_id):
            answer = await self._client.infer(
                model,
                [_input(name, tensor) for name, tensor in inputs.items()],
                request_id=request_id,
                headers={**self._headers, **headers},  # a copy: tritonclient writes into it
            )
            names = [output["name"] for output in answer.get_response()["outputs"]]
            return {name: answer.as_numpy(name) for name in names}

    async def ready(self, model: str) -> bool:
        with _border(self._endpoint):
            headers = dict(self._headers)
            server = await self._client.is_server_ready(headers=headers)
            return bool(server and await self._client.is_model_ready(model, headers=headers))

    async def close(self) -> None:
        if "_client" in self.__dict__:
            await self._client.close()


def _input(name: str, tensor: Any) -> Any:
    shape = list(tensor.shape)
    return aio.InferInput(name, shape, np_to_triton_dtype(tensor.dtype)).set_data_from_numpy(tensor)


@contextmanager
def _border(endpoint: Endpoint, request_id: str = "") -> Iterator[None]:
    try:
        yield
    except InferenceServerException as error:
        raise _translate(error, request_id) from error
    except (aiohttp.ClientError, OSError) as error:
        message = str(error) or type(error).__name__
        if "Bad status line" in message:  # with a dump of the bytes that came
            message = f"the answer from {endpoint.address} is not HTTP/1.1"
        raise ConnectionFailed(endpoint.explain(message), request_id=request_id) from error


def _translate(error: InferenceServerException, request_id: str) -> FluxserveError:
    # debug_details is the body of an answer that isn't Triton's JSON: a proxy's page
    body = error.debug_details()
    message = error.message() if body is None else (body.strip()[:500] or "an empty answer")
    return from_status(error.status(), message, request_id)
