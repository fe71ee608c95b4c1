"""`fluxserve-client`: pictures, progress and health from the command line."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fluxserve_client import console, inspection
from fluxserve_client.errors import FluxserveError
from fluxserve_client.pictures import grid, save
from fluxserve_client.result import FORMAT_OF_SUFFIX, Result, State
from fluxserve_client.retry import Retry
from fluxserve_client.show import CLEAR_LINE, progress_display, report
from fluxserve_client.sync import Client
from fluxserve_client.transports import Transport
from fluxserve_client.transports.endpoint import Tls

OK, FAILED, USAGE = 0, 1, 2

EXAMPLES = """\
examples:
  fluxserve-client generate "a red fox in the snow" -o fox.png
  fluxserve-client generate "a red fox in the snow" -n 4 --seed 7 -o foxes.png     one sheet of four
  fluxserve-client generate "a red fox" -n 4 --separate -o fox.webp                fox-1.webp … fox-4.webp
  fluxserve-client generate "the same fox, at night" --image fox.png --strength 0.6 -o night.png
  echo "a long prompt" | fluxserve-client generate - --json
  fluxserve-client generate "a fox" --url https://flux.example.com --header "Authorization=Bearer TOKEN"
  fluxserve-client generate "a fox" --request-id fox-1 &  fluxserve-client cancel fox-1
  fluxserve-client health --protocol http
  fluxserve-client inspect fox.png                                                 who made it, and how

exit status: 0 done, 1 the server (or the way to it) failed, or a file is not what it says, 2 wrong usage,
  130 stopped by Ctrl-C,
  143 by SIGTERM
"""


def main(argv: Sequence[str] | None = None, transport: Transport | None = None) -> int:
    """Run one command and return its exit status. `transport` replaces the wire, for tests."""
    console.prepare()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its library's log, between our lines
    try:
        with _signals_as_interrupts():
            status = _run(argv, transport)
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        return _complain("stopped", 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT))
    except FluxserveError as error:
        return _complain(f"error: {error}", FAILED)
    except BrokenPipeError as error:  # nobody reads standard output any more
        return _complain(f"error: {error}", FAILED)
    except (ValueError, OSError) as error:
        return _complain(f"error: {error}", USAGE)
    finally:
        console.let_go()
    return status


def _run(argv: Sequence[str] | None, transport: Transport | None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.run == _inspect:
        return _inspect(arguments)  # without a server
    clear = CLEAR_LINE if _draws_bars() else ""
    logging.basicConfig(format=f"{clear}fluxserve-client: %(message)s")  # what could not be done, e.g. a cancel
    with _connect(arguments, transport) as client:
        return int(arguments.run(client, arguments))


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Have SIGTERM and SIGHUP stop the request on the server, as Ctrl-C does. What is ignored (nohup) stays so."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    if threading.current_thread() is not threading.main_thread():  # which alone may change it
        former = {}
    for number, handler in former.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _draws_bars() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _complain(line: str, status: int) -> int:
    with contextlib.suppress(OSError):  # nobody reads standard error: the status says it all
        print(f"fluxserve-client: {console.one_line(line)}", file=sys.stderr)
    return status


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="fluxserve-client",
        description="Draw pictures with a fluxserve server.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = _connection_options()
    for name, run, text in (
        ("generate", _generate, "draw what a prompt says"),
        ("status", _status, "how far a request is"),
        ("cancel", _cancel, "stop a request"),
        ("health", _health, "whether the server is ready"),
    ):
        command = commands.add_parser(
            name,
            parents=[shared],
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        if name == "generate":
            _generate_options(command)
        elif name != "health":
            command.add_argument("request_id", metavar="ID", help="the --request-id of a request in flight")
    _add_inspect(commands)
    return parser


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "what a picture's file says about how it was made"
    command = commands.add_parser("inspect", help=text, description=f"{text[0].upper()}{text[1:]}; no server is asked.")
    command.set_defaults(run=_inspect)
    command.add_argument("files", metavar="FILE", type=Path, nargs="+", help="a PNG, JPEG or WebP file")
    command.add_argument(
        "--trust", type=Path, metavar="FILE", help="PEM file of the authorities that a C2PA signature must go back to"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object a file for a program to read")


def _connection_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    group = options.add_argument_group("connection")
    group.add_argument(
        "--url",
        default="localhost",
        help="host, host:port or grpc://, grpcs://, http://, https:// and those (default localhost, Triton's port)",
    )
    group.add_argument("--protocol", choices=("grpc", "http"), help="for a --url without a scheme (default grpc)")
    group.add_argument(
        "--header", action="append", default=[], metavar="KEY=VALUE", help="sent with every call; repeatable"
    )
    group.add_argument("--ca", metavar="FILE", help="PEM file of the authorities to trust")
    group.add_argument("--cert", metavar="FILE", help="PEM file of the client's certificate")
    group.add_argument("--key", metavar="FILE", help="PEM file of its key")
    group.add_argument("--insecure", action="store_true", help="accept any certificate (HTTP only)")
    group.add_argument("--keepalive", type=float, metavar="SECONDS", help="ping this often while waiting (gRPC only)")
    group.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="give up, and stop the work on the server, after this long",
    )
    group.add_argument(
        "--retries",
        type=int,
        default=0,
        metavar="N",
        help="times that a refused or lost request is sent again (default 0)",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object for a program to read")
    return options


def _generate_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt", help="what to draw; - reads it from standard input")
    out = command.add_argument_group("output")
    out.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("fluxserve.png"),
        metavar="FILE",
        help="its suffix chooses the format: .png .jpg .webp .raw (default fluxserve.png)",
    )
    out.add_argument("-n", "--num-images", type=int, metavar="N", help="pictures, with seeds that count up")
    out.add_argument("--separate", action="store_true", help="write FILE-1, FILE-2, … and not one sheet")
    out.add_argument("--quality", type=int, help="1-100, of .jpg and .webp")
    prompt = "write the prompt into the file, beside the parameters that it has anyway"
    out.add_argument("--embed-prompt", action="store_true", default=None, help=prompt)
    out.add_argument("-q", "--quiet", action="store_true", help="no progress")
    picture = command.add_argument_group("picture (the server's model decides what is not given)")
    picture.add_argument("--height", type=int, metavar="PIXELS", help="a multiple of 16")
    picture.add_argument("--width", type=int, metavar="PIXELS", help="a multiple of 16")
    picture.add_argument("--steps", type=int, help="denoising steps: more is finer and slower")
    picture.add_argument("--guidance", type=float, help="how closely to follow the prompt")
    negative = "what not to draw: a second pass in every step, twice the time; FLUX.1 wants --true-cfg-scale beside it"
    picture.add_argument("--negative-prompt", metavar="TEXT", help=negative)
    picture.add_argument("--true-cfg-scale", type=float, help="FLUX.1: how far to keep from that, above 1")
    picture.add_argument("--seed", type=int, help="the same seed draws the same picture; -1 draws one")
    of_image = "start from this PNG, JPEG or WebP picture; FLUX.2: draw after it, may be repeated"
    picture.add_argument("--image", type=Path, action="append", metavar="FILE", help=of_image)
    picture.add_argument("--strength", type=float, help="how far to leave it behind, 0-1")
    picture.add_argument("--request-id", metavar="ID", help="a name for `status` and `cancel`")


def _connect(arguments: argparse.Namespace, transport: Transport | None) -> Client:
    tls = Tls(arguments.ca, arguments.cert, arguments.key, arguments.insecure)
    return Client(
        arguments.url,
        protocol=arguments.protocol,
        tls=None if tls == Tls() else tls,
        headers=dict(_pair(header) for header in arguments.header),
        keepalive=arguments.keepalive,
        retry=Retry(attempts=1 + arguments.retries) if arguments.retries else None,
        transport=transport,
    )


def _pair(header: str) -> tuple[str, str]:
    key, equals, value = header.partition("=")
    if not (key and equals):
        raise ValueError(f"--header: got {header!r}, expected KEY=VALUE")
    return key, value


def _generate(client: Client, arguments: argparse.Namespace) -> int:
    target: Path = arguments.output
    as_sheet = (arguments.num_images or 1) > 1 and not arguments.separate
    chosen = FORMAT_OF_SUFFIX.get(target.suffix.lower())
    if chosen is None or (chosen == "raw" and as_sheet):
        raise ValueError(f"--output: got {target.name!r}, expected .png, .jpg or .webp (.raw: no sheet of several)")
    _check_writable(target)
    with progress_display(sys.stderr, bar=_draws_bars(), quiet=arguments.quiet) as progress:
        result = client.generate(
            sys.stdin.read().strip() if arguments.prompt == "-" else arguments.prompt,
            height=arguments.height,
            width=arguments.width,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance,
            negative_prompt=arguments.negative_prompt,
            true_cfg_scale=arguments.true_cfg_scale,
            seed=arguments.seed,
            num_images=arguments.num_images,
            image=arguments.image,
            strength=arguments.strength,
            output_format="png" if as_sheet else chosen,  # a sheet is encoded here: lose quality once, not twice
            quality=None if as_sheet else arguments.quality,
            embed_prompt=arguments.embed_prompt,
            request_id=arguments.request_id,
            timeout=arguments.timeout,
            progress=progress,
        )
    files = _write(result, target, as_sheet, arguments.quality)
    print(report(result, files, as_json=arguments.json))
    return OK


def _check_writable(target: Path) -> None:
    """Refuse a file that cannot be written now, and not after the picture was drawn."""
    if not target.parent.is_dir():
        raise ValueError(f"--output: there is no folder {str(target.parent)!r}")
    if target.is_dir():
        raise ValueError(f"--output: {str(target)!r} is a folder")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ValueError(f"--output: {str(target)!r} cannot be written")


def _write(result: Result, target: Path, as_sheet: bool, quality: int | None) -> list[Path]:
    if as_sheet:
        pictures = [result.pil(index) for index in range(len(result.images))]
        save(grid(pictures), target, quality, xmp=pictures[0].info.get("xmp", b""))
        return [target]
    if len(result.images) == 1:
        return [result.save(target)]
    numbered = (target.with_stem(f"{target.stem}-{index + 1}") for index in range(len(result.images)))
    return [result.save(path, index) for index, path in enumerate(numbered)]


def _inspect(arguments: argparse.Namespace) -> int:
    found = [(path, inspection.inspect(path, arguments.trust)) for path in arguments.files]
    for path, each in found:
        print(inspection.report(path, each, as_json=arguments.json))
    return FAILED if any(each.problems for _, each in found) else OK


def _status(client: Client, arguments: argparse.Namespace) -> int:
    now = client.status(arguments.request_id, timeout=arguments.timeout)
    if arguments.json:
        print(
            json.dumps({"request_id": arguments.request_id, "state": now.state, "step": now.step, "steps": now.steps})
        )
    else:
        print(now.state if now.steps == 0 else f"{now.state}, step {now.step} of {now.steps}")
    return OK


def _cancel(client: Client, arguments: argparse.Namespace) -> int:
    state = client.cancel(arguments.request_id, timeout=arguments.timeout)
    if arguments.json:
        print(json.dumps({"request_id": arguments.request_id, "state": state}))
    elif state is State.UNKNOWN:
        print(f"no request {arguments.request_id} is in flight")
    else:
        print(state)
    return FAILED if state is State.UNKNOWN else OK


def _health(client: Client, arguments: argparse.Namespace) -> int:
    ready = client.ready(timeout=arguments.timeout)
    print(json.dumps({"ready": ready}) if arguments.json else "ready" if ready else "not ready")
    return OK if ready else FAILED
