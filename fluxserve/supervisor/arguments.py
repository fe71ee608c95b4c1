"""Arguments of tritonserver that a user chooses: tracing, and whatever else is passed through."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from fluxserve.errors import ServerError

TRACE_RATE = 100
"""One request of a hundred is traced by default."""


def tracing(url: str, rate: int = TRACE_RATE) -> list[str]:
    """Arguments that send one request of `rate` to an OpenTelemetry collector, over OTLP/HTTP.

    Raises:
        ServerError: no http:// or https:// address, or a rate below 1.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ServerError(f"--trace: got {url!r}; expected an OTLP/HTTP address like http://localhost:4318/v1/traces")
    if rate < 1:
        raise ServerError(f"--trace-rate: got {rate}; expected 1 or more, to trace one request of so many")
    settings = ("mode=opentelemetry", f"rate={rate}", "level=TIMESTAMPS", f"opentelemetry,url={url}")
    return [f"--trace-config={setting}" for setting in settings]


def passed_through(given: Sequence[str], own: Iterable[str]) -> list[str]:
    """Arguments of the user's, if none of them contradicts one of `own`.

    Triton takes any beginning of a name that is unambiguous, so `--model-control` is `--model-control-mode`.

    Raises:
        ServerError: one that is not of the form --name=value, or that sets what the supervisor sets.
    """
    taken = {_name(argument) for argument in own}
    seen: set[str] = set()
    for argument in given:
        if not argument.startswith("--") or len(argument) < 3:
            raise ServerError(f"--triton-arg: got {argument!r}; expected --name=value")
        name = _name(argument)
        if any(other.startswith(name) for other in taken):
            raise ServerError(f"--triton-arg: got {argument!r}; expected one that fluxserve does not set itself")
        if name.startswith(_GROUPS) and name in seen:
            raise ServerError(f"--triton-arg: got {argument!r} twice; expected each setting once")
        seen.add(name)
    return [_from_here(argument) for argument in given]


def _from_here(argument: str) -> str:
    """The same argument with the path of a file made absolute: Triton runs in a folder of its own."""
    name, equals, value = argument.partition("=")
    if equals and value and any(file.startswith(name) for file in _FILES):
        return f"{name}={Path(value).absolute()}"
    kind, comma, file = value.partition(",file=")
    return f"{name}={kind}{comma}{Path(file).absolute()}" if comma and name == "--trace-config" else argument


_FILES = (
    "--log-file",
    "--grpc-server-cert",
    "--grpc-server-key",
    "--grpc-root-cert",
    "--cache-directory",
    "--repoagent-directory",
)
"""Arguments whose value is a path."""


_GROUPS = ("--backend-config", "--trace-config")
"""Arguments that may stand many times, each for a setting of its own."""


def _name(argument: str) -> str:
    """What an argument sets: its name, or its name and the setting's."""
    name, _, value = argument.partition("=")
    return f"{name}={value.partition('=')[0]}" if name in _GROUPS else name
