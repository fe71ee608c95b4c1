"""Run the command `fluxserve-gateway`: serve, and keep the keys."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fluxserve_client import console

from fluxserve_gateway.config import MIB, Config
from fluxserve_gateway.jobs.options import add_job_options, job_settings
from fluxserve_gateway.keys import Keys, KeysError, Limits
from fluxserve_gateway.serve import Listening, fleet_of, run
from fluxserve_gateway.spans import tracer_to

_KEYS = Path("~/.config/fluxserve/gateway-keys.sqlite")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status: 0 done, 1 it failed, 2 wrong usage, 130 stopped by Ctrl-C."""
    console.prepare()
    try:
        given = _parser().parse_args(arguments)
        given.do(given)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, OSError, KeysError) as error:  # an OSError: also that nobody reads standard output any more
        return _complain(str(error), 2 if isinstance(error, ValueError) else 1)
    finally:
        console.let_go()
    return 0


def _complain(message: str, status: int) -> int:
    with contextlib.suppress(OSError):  # nobody reads standard error: the status says it all
        print(f"fluxserve-gateway: {console.one_line(message)}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fluxserve-gateway", description="OpenAI's images API in front of fluxserve servers"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="answer callers until SIGTERM or Ctrl-C"))
    _add_keys(commands.add_parser("keys", help="create, list and revoke API keys"))
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    defaults, where = Config(), Listening()
    add = parser.add_argument
    add("--server", action="append", default=[], metavar="MODEL=URL", help="a server and its model's name; repeatable")
    add("--server-ca", type=Path, metavar="PEM", help="trust these authorities; HOST[:PORT] then means TLS")
    add("--host", default=where.host, help="the address to listen on (default: %(default)s)")
    add("--port", type=int, default=where.port, help="the port (default: %(default)s)")
    add("--keys", type=Path, default=_KEYS, metavar="FILE", help="the file of API keys (default: %(default)s)")
    add("--no-auth", action="store_true", help="take requests without a key; on a loopback address only")
    add("--tls-cert", type=Path, metavar="PEM", help="serve HTTPS with this certificate")
    add("--tls-key", type=Path, metavar="PEM", help="the certificate's key")
    add("--proxy", action="append", default=[], metavar="ADDRESS", help="believe its X-Forwarded headers; repeatable")
    add("--cors-origin", action="append", default=[], metavar="ORIGIN", help="let its pages call; repeatable")
    add("--page", action="store_true", help="serve a web page at / (pip install 'fluxserve-gateway[page]')")
    add(
        "--trace", metavar="URL", help="send spans to an OTLP/HTTP collector (pip install 'fluxserve-gateway[tracing]')"
    )
    add("--quiet", action="store_true", help="log warnings and errors alone")
    add("--log-prompts", action="store_true", help="log prompts; without, none are")
    add("--max-requests", type=_count, default=defaults.max_requests, help="at a time (default: %(default)s)")
    add("--max-body-mib", type=_count, default=defaults.max_body // MIB, help="of one request (default: %(default)s)")
    add("--max-bodies-mib", type=_count, default=defaults.max_bodies // MIB, help="of all (default: %(default)s)")
    add(
        "--timeout", type=_count, default=int(defaults.request_timeout), help="seconds a request (default: %(default)s)"
    )
    add_job_options(parser)
    parser.set_defaults(do=_serve)


def _add_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", type=Path, default=_KEYS, metavar="FILE", help="the file (default: %(default)s)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    create = commands.add_parser("create", help="make a key, and print it: it is shown this once")
    create.add_argument("name", help="whose key it is, for the list")
    create.add_argument("--requests-per-minute", type=_count)
    create.add_argument("--pixels-per-minute", type=_count)
    create.add_argument("--at-a-time", type=_count)
    create.set_defaults(do=_create)
    commands.add_parser("list", help="list the keys, without their secrets").set_defaults(do=_list)
    revoke = commands.add_parser("revoke", help="accept a key no more")
    revoke.add_argument("id", help="the key's id, from the list")
    revoke.set_defaults(do=_revoke)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected 1 or more")
    return number


def _serve(given: argparse.Namespace) -> None:
    config = Config(
        max_body=given.max_body_mib * MIB,
        max_bodies=given.max_bodies_mib * MIB,
        max_requests=given.max_requests,
        request_timeout=given.timeout,
        log_prompts=given.log_prompts,
        cors_origins=tuple(given.cors_origin),
    )
    listening = Listening(given.host, given.port, given.tls_cert, given.tls_key, tuple(given.proxy))
    fleet = fleet_of(given.server, given.server_ca, tracer_to(given.trace) if given.trace is not None else None)
    run(
        fleet,
        config,
        None if given.no_auth else Keys(given.keys.expanduser()),
        listening,
        jobs=job_settings(given),
        page=given.page,
        quiet=given.quiet,
    )


def _create(given: argparse.Namespace) -> None:
    limits = Limits(given.requests_per_minute, given.pixels_per_minute, given.at_a_time)
    key, secret = Keys(given.keys.expanduser(), create=True).create(given.name, limits)
    print(f"{key.id}\n{secret}")


def _list(given: argparse.Namespace) -> None:
    for key in Keys(given.keys.expanduser()).all():
        created = time.strftime("%Y-%m-%d", time.gmtime(key.created))
        state = "revoked" if key.revoked else "in use"
        limits = [f"{name}={value}" for name, value in vars(key.limits).items() if value is not None]
        print(key.id, created, state, key.name, *limits, sep="\t")


def _revoke(given: argparse.Namespace) -> None:
    Keys(given.keys.expanduser()).revoke(given.id)
