"""fluxserve serve: its options, and the life of a server under its watch. The command line (cli.py) prints."""

import argparse
import contextlib
import signal
from collections.abc import Callable, Mapping

from fluxserve.cli.front import PORT, Front
from fluxserve.supervisor import DRAIN_TIMEOUT_S, LOOPBACK, Ports, TritonServer, Watch, memory
from fluxserve.supervisor.arguments import TRACE_RATE, tracing
from fluxserve.supervisor.installation import Installation


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a server is reached by, and how it is run; what it serves is every command's."""
    parser.add_argument("--http-port", type=_port, default=Ports.http, help="default: %(default)s")
    parser.add_argument("--grpc-port", type=_port, default=Ports.grpc, help="default: %(default)s")
    parser.add_argument("--metrics-port", type=_port, default=Ports.metrics, help="default: %(default)s")
    parser.add_argument(
        "--address", default=LOOPBACK, help="an address or a name of this machine; default: %(default)s"
    )
    parser.add_argument(
        "--drain-timeout", type=float, default=DRAIN_TIMEOUT_S, metavar="S", help="default: %(default)s s"
    )
    parser.add_argument(
        "--memory-limit",
        type=_memory,
        metavar="SIZE",
        help="memory that the server may hold before it is drained and started again, such as 24G; 0: no limit; "
        f"default: {memory.CGROUP_SHARE:.0%}".replace("%", "%%")
        + " of the control group's limit, if it has one",
    )
    parser.add_argument(
        "--page", action="store_true", help="serve OpenAI's images API and a web page, too, on loopback"
    )
    parser.add_argument("--page-port", type=_port, default=PORT, help="default: %(default)s")
    parser.add_argument("--trace", metavar="URL", help="an OpenTelemetry collector, OTLP over HTTP; default: no traces")
    parser.add_argument(
        "--trace-rate", type=int, default=TRACE_RATE, metavar="N", help="trace one request of N; default: %(default)s"
    )
    parser.add_argument(
        "--triton-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="an argument of tritonserver, such as --triton-arg=--log-verbose=1; may be given many times",
    )


def _memory(text: str) -> int:
    try:
        return memory.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _port(text: str) -> int:
    if not (text.isdigit() and 0 < int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected 1 to 65535")
    return int(text)


def serve(
    options: argparse.Namespace,
    installation: Installation,
    settings: Mapping[str, str],
    say: Callable[[str], None],
    model: str = "",
) -> int:
    """Run a server until SIGINT, SIGTERM, or the end of its terminal (SIGHUP, unless ignored); returns the status.

    Args:
        options: of the command line.
        installation: which Triton.
        settings: of the models.
        say: takes a line for the terminal.
        model: the name for the gateway and its page beside the server; "" starts none.

    Raises:
        ServerError: it did not start, or died too often.
    """
    signals: list[int] = []
    hang_up = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)  # ignored: by nohup
    for number in (signal.SIGINT, signal.SIGTERM, *hang_up):
        signal.signal(number, lambda number, _: signals.append(number))
    ports = Ports(options.http_port, options.grpc_port, options.metrics_port)
    traced = tracing(options.trace, options.trace_rate) if options.trace else []
    arguments = [*traced, *options.triton_arg]
    limit = memory.default_limit() if options.memory_limit is None else options.memory_limit
    with TritonServer(
        options.repository, ports, installation, options=settings, address=options.address, arguments=arguments
    ) as server:
        server.start()
        spent = server.wait_ready(stopping=lambda: bool(signals))
        beside = Front(model, server.grpc_url, options.page_port) if model else None
        with beside or contextlib.nullcontext():
            if beside and not signals:
                beside.start(lambda: bool(signals))
            if signals:
                return 128 + signals[0]
            _announce(server, beside, spent, say)
            stopping = (lambda: bool(signals) or beside.ended) if beside else (lambda: bool(signals))
            Watch(server, stopping, say, limit, options.drain_timeout).run()
            if not signals:
                say("the gateway has ended by itself; its message is above")
            say("stopping: admitted requests are finished, new ones refused; once more ends the waiting")
            if beside:
                beside.stop(hurry=lambda: len(signals) > 1)
            server.stop(options.drain_timeout, hurry=lambda: len(signals) > 1)
    say("stopped")
    return 0 if signals else 1


def _announce(server: TritonServer, beside: Front | None, spent: float, say: Callable[[str], None]) -> None:
    say(f"ready after {spent:.1f} s; Ctrl-C stops")
    say(f"  gRPC     {server.grpc_url}\n  HTTP     http://{server.http_url}\n  metrics  {server.metrics_url}")
    if beside:
        say(f"  API      {beside.url}/v1\n  page     {beside.url}/")
    if exposed := server.exposed():
        say(f"warning: other users of this machine can read prompts and pictures: {exposed[0]} and its like")
