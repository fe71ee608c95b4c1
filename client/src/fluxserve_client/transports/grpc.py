"""gRPC, over tritonclient's asyncio client."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from fluxserve_client.contract import Tensors
from fluxserve_client.errors import from_status
from fluxserve_client.transports import NO_HEADERS
from fluxserve_client.transports.endpoint import Endpoint

# Eight raw pictures of 16 megapixels are 400 MB; gRPC's own default is 4 MB.
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class _Library:
    """Whether this process can use gRPC, whose threads and locks a fork leaves half-way in the child."""

    used = False
    lost = False

    @classmethod
    def use(cls) -> None:
        if cls.lost:
            raise RuntimeError(
                "gRPC was used before this process was forked, and cannot be used after that: start processes with "
                "multiprocessing's 'spawn' or 'forkserver', use gRPC in the children alone, or use http://"
            )
        cls.used = True

    @classmethod
    def after_fork(cls) -> None:
        cls.lost = cls.used


os.register_at_fork(after_in_child=_Library.after_fork)


class GrpcTransport:
    """See `Transport`. `headers` become gRPC metadata, whose keys are lower-case."""

    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str], keepalive: float | None = None) -> None:
        self._endpoint = endpoint
        self._options = [*_OPTIONS, *_pings(keepalive)]
        if endpoint.is_loopback:  # gRPC would ask a proxy of the environment for this machine
            self._options.append(("grpc.enable_http_proxy", 0))
        self._headers = {key.lower(): value for key, value in headers.items()}

    @cached_property
    def _client(self) -> Any:
        # at the first call and not before: a channel belongs to the event loop it is made on
        _Library.use()
        tls = self._endpoint.tls
        return aio.InferenceServerClient(
            self._endpoint.address,
            ssl=tls is not None,
            root_certificates=tls and tls.ca,
            private_key=tls and tls.key,
            certificate_chain=tls and tls.cert,
            channel_args=self._options,
        )

    async def infer(
        self, model: str, inputs: Tensors, request_id: str, headers: Mapping[str, str] = NO_HEADERS
    ) -> Tensors:
        with _border(self._endpoint, request_id):
            answer = await self._client.infer(
                model,
                [_input(name, tensor) for name, tensor in inputs.items()],
                request_id=request_id,
                headers={**self._headers, **headers},
            )
            return {output.name: answer.as_numpy(output.name) for output in answer.get_response().outputs}

    async def ready(self, model: str) -> bool:
        with _border(self._endpoint):
            headers = dict(self._headers)
            server = await self._client.is_server_ready(headers=headers)
            return bool(server and await self._client.is_model_ready(model, headers=headers))

    async def close(self) -> None:
        if "_client" in self.__dict__:
            await self._client.close()


def _pings(keepalive: float | None) -> list[tuple[str, int]]:
    """Options for a ping every `keepalive` seconds while a call runs, however long no data passes."""
    if keepalive is None:
        return []
    return [("grpc.keepalive_time_ms", round(1000 * keepalive)), ("grpc.http2.max_pings_without_data", 0)]


def _input(name: str, tensor: Any) -> Any:
    return aio.InferInput(name, tensor.shape, np_to_triton_dtype(tensor.dtype)).set_data_from_numpy(tensor)


@contextmanager
def _border(endpoint: Endpoint, request_id: str = "") -> Iterator[None]:
    try:
        yield
    except InferenceServerException as error:
        raise from_status(error.status(), endpoint.explain(error.message()), request_id) from error
