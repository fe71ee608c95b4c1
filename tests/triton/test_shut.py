"""The administrative APIs are shut for everybody: also for who reads the command line and writes bytes of their own.

Triton demands a header for them, whose name and value stand in its command line. These tests send it by hand, in every
form that HTTP/1.1 and HTTP/2 have for one. Both protocols answer as they do to a client that sends nothing.
"""

import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.utils import InferenceServerException

from fluxserve.supervisor import TritonServer

PATHS = {
    "/v2/repository/index": b"{}",
    "/v2/repository/models/generate/load": b'{"parameters": {"config": "{}"}}',
    "/v2/repository/models/generate/unload": b"{}",
    "/v2/systemsharedmemory/region/x/register": b'{"key": "/x", "offset": 0, "byte_size": 1}',
    "/v2/systemsharedmemory/unregister": b"{}",
    "/v2/cudasharedmemory/unregister": b"{}",
    "/v2/trace/setting": b'{"trace_file": "/tmp/x"}',
    "/v2/models/flux/trace/setting": b'{"trace_level": ["TIMESTAMPS"]}',
    "/v2/logging": b'{"log_file": "/tmp/x"}',
}
RPCS = ("RepositoryIndex", "RepositoryModelLoad", "SystemSharedMemoryStatus", "TraceSetting", "LogSettings")


def demanded(server: TritonServer, kind: str) -> tuple[bytes, bytes]:
    """The header's name and value, as any user of the machine finds them."""
    line = Path(f"/proc/{server.pid}/cmdline").read_bytes()
    match = re.search(rb"--%s=[^:]+:([^=]+)=([^\0]+)" % kind.encode(), line)
    assert match is not None
    return match[1], match[2]


def http_forms(name: bytes, value: bytes) -> Iterator[bytes]:
    """Header lines that say `name` and `value` to whom they can."""
    for spelled in (name, name.lower(), name.replace(b" ", b"-"), name.split(b":")[0]):
        yield spelled + b": " + value
        yield spelled + b":" + value
        yield spelled + b" : " + value
    first, rest = name.split(b":", 1)
    yield first + b":\r\n" + rest + b": " + value  # folded behind the colon
    yield first + b"\r\n :" + rest + b": " + value  # and before it
    yield b"\r\n " + name + b": " + value
    yield b'"' + name + b'": ' + value
    yield first + b"%3A" + rest.replace(b" ", b"%20") + b": " + value
    yield first + b"\\:" + rest + b": " + value
    yield first + b"\0:" + rest + b": " + value
    yield first + b":" + rest + b"\r\n" + first + b": " + rest + b": " + value


def http_status(port: int, path: str, body: bytes, header: bytes) -> bytes:
    request = b"POST %s HTTP/1.1\r\nHost: here\r\n%s\r\nContent-Length: %d\r\n\r\n" % (path.encode(), header, len(body))
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(request + body)
        try:
            return connection.recv(4096)
        except ConnectionResetError:
            return b""


def test_nobody_is_let_in_over_http(server: TritonServer) -> None:
    forms = list(http_forms(*demanded(server, "http-restricted-api")))
    for path, body in PATHS.items():
        for form in [
            b"X: y",
            *(forms if path in ("/v2/logging", "/v2/repository/models/generate/unload") else forms[:4]),
        ]:
            answer = http_status(server.ports.http, path, body, form)
            assert not answer or answer.split()[1] in (b"403", b"400"), (path, form, answer)
    assert server.is_ready() and server.is_ready("generate")


HUFFMAN = {
    **{" ": "010100", ":": "1011100", "-": "010110", "A": "100001", "D": "1011111", "E": "1100000", "H": "1100011"},
    **{"I": "1100100", "M": "1101000", "N": "1101001", "O": "1101010", "R": "1101101", "S": "1101110"},
    **{"T": "1101111", "a": "00011", "b": "100011", "c": "00100", "d": "100100", "e": "00101", "f": "100101"},
    **{"g": "100110", "h": "100111", "i": "00110", "l": "101000", "m": "101001", "n": "101010", "o": "00111"},
    **{"p": "101011", "r": "101100", "s": "01000", "t": "01001", "u": "101101", "v": "1110111", "x": "1111001"},
}
"""RFC 7541, appendix B, of the letters that are needed."""


def huffman(text: bytes) -> bytes:
    bits = "".join(HUFFMAN[chr(c)] for c in text)
    bits += "1" * (-len(bits) % 8)
    packed = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    return bytes([0x80 | len(packed)]) + packed


def literal(text: bytes) -> bytes:
    assert len(text) < 127
    return bytes([len(text)]) + text


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def grpc_answer(port: int, rpc: str, extra: bytes) -> bytes:
    """What comes back for an empty message to `rpc`, with header fields of ours behind the usual ones."""
    path = b"/inference.GRPCInferenceService/" + rpc.encode()
    usual = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"here"))
    fields = (*usual, (b"te", b"trailers"), (b"content-type", b"application/grpc"))
    block = b"".join(b"\0" + literal(k) + literal(v) for k, v in fields) + extra
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        connection.sendall(frame(1, 4, 1, block) + frame(0, 1, 1, bytes(5)))
        answer = b""
        connection.settimeout(0.5)
        try:
            while part := connection.recv(4096):
                answer += part
        except (TimeoutError, ConnectionResetError):
            pass
        return answer


def grpc_forms(name: bytes, value: bytes) -> Iterator[bytes]:
    full = b"triton-grpc-protocol-" + name
    for spelled in (full, full.lower(), full.replace(b" ", b"-").lower().replace(b":", b"-")):
        for kind in (b"\0", b"\x10", b"\x40"):  # not indexed, never indexed, indexed
            yield kind + literal(spelled) + literal(value)
        yield b"\0" + huffman(spelled) + huffman(value)
    yield b"\x40" + literal(full) + literal(value) + b"\xbe"  # and once more, from the table
    yield b"\0" + literal(b":" + full) + literal(value)


def test_nobody_is_let_in_over_grpc(server: TritonServer) -> None:
    forms = list(grpc_forms(*demanded(server, "grpc-restricted-protocol")))
    for rpc in RPCS:
        for form in forms if rpc == "LogSettings" else forms[:1]:
            answer = grpc_answer(server.ports.grpc, rpc, form)
            assert b"grpc-status\x010" not in answer, (rpc, form, answer)
    with triton_grpc.InferenceServerClient(server.grpc_url) as client:
        for call in (client.get_log_settings, client.get_trace_settings, client.get_model_repository_index):
            with pytest.raises(InferenceServerException, match="restricted"):
                call()
    assert server.is_ready() and server.is_ready("generate")


def test_what_is_sent_by_hand_is_understood(server: TritonServer) -> None:
    """The same bytes reach an API that is open: what refuses them above is the lock, and no mistake of the test's."""
    answer = http_status(server.ports.http, "/v2/models/flux/stats", b"", b"X: y")
    assert answer.split()[1] in (b"200", b"405")
    for field in (b"\0" + literal(b"x") + literal(b"y"), b"\0" + huffman(b"grpc-x") + huffman(b"shut")):
        assert b"grpc-status\x010" in grpc_answer(server.ports.grpc, "ServerLive", field)
