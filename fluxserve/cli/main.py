"""fluxserve serve | demo | generate | repository | doctor: the command line. Of the library, only this prints."""

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxserve import __version__, console, settings
from fluxserve.cli.serve import add_options, serve
from fluxserve.errors import FluxserveError, LibraryMissing, ServerError
from fluxserve.families import registry
from fluxserve.folders.files import expanded
from fluxserve.supervisor import Ports, TritonServer
from fluxserve.supervisor.installation import Installation, bundled, installed_at
from fluxserve.supervisor.repository import lay_out

if TYPE_CHECKING:
    from fluxserve_client import Client

_EPILOG = """\
examples:
  fluxserve serve                                      the tiny model on 127.0.0.1, until Ctrl-C
  fluxserve serve --checkpoint /models/FLUX.1-dev      another model, from a diffusers-format folder
  fluxserve serve --server /opt/tritonserver/bin/tritonserver
  fluxserve demo "a fox on a blue background"          start a server, draw one picture, stop
  fluxserve demo --server grpc://gpu-box:8001 "a fox"  draw it on a server that runs already
  fluxserve generate "a red apple" -o apple.png        without a server, in this process
  fluxserve repository /srv/klein --checkpoint /models/klein-4B --gpus 1
                                                       a model repository for one model, for any Triton
  fluxserve doctor                                     what this machine can run, and every setting
"""
_REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for an error with a message, 2 for usage, 130 for Ctrl-C."""
    console.prepare()
    try:
        status = _run(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
    except (FluxserveError, OSError) as error:  # an OSError: a file that can't be written, a closed pipe
        return _complain(str(error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        console.let_go()
    return status


def _run(given: Sequence[str]) -> int:
    if given[:1] == ["export"]:
        return _export(given[1:])
    options = _parser().parse_args(given)
    logging.captureWarnings(True)
    settings.let_threads_sleep()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was started is stopped
    return int(options.command(options))


def _complain(message: str) -> int:
    with contextlib.suppress(OSError):  # nobody reads standard error: the status says it all
        print(f"fluxserve: {console.printable(message)}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fluxserve",
        description="The FLUX family of text-to-image models behind Triton Inference Server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve", help="run Triton until Ctrl-C or SIGTERM; admitted requests are finished first"
    )
    _server_options(serve)
    add_options(serve)
    serve.set_defaults(command=_serve)

    demo = commands.add_parser("demo", help="start a server on free ports, draw one picture through the client, stop")
    demo.add_argument("prompt", nargs="?", default="a fox on a blue background")
    demo.add_argument("-o", "--output", type=_picture, default=Path("demo.png"), help="default: %(default)s")
    demo.add_argument("--seed", type=int, default=-1, help="default: -1, draw one")
    _server_options(demo)
    demo.set_defaults(command=_demo)

    generate = commands.add_parser("generate", help="draw one picture in this process, without a server")
    generate.add_argument("prompt")
    generate.add_argument(
        "-o", "--output", type=_picture, default=Path("image.png"), help=".png, .jpg or .webp; default: %(default)s"
    )
    numbers = (("height", int), ("width", int), ("num-inference-steps", int))
    for name, kind in (*numbers, ("guidance-scale", float), ("true-cfg-scale", float)):
        generate.add_argument(f"--{name}", type=kind, help="default: the model's own")
    generate.add_argument("--negative-prompt", type=os.fsencode, metavar="TEXT", help="what not to draw")
    generate.add_argument("--seed", type=int, default=-1, help="default: -1, draw one")
    _model_options(generate)
    generate.set_defaults(command=_generate)

    commands.add_parser("export", help="turn a checkpoint into an artifact: ONNX, TensorRT or TensorRT-RTX engines")
    repository = commands.add_parser("repository", help="write a model repository for one model; any Triton serves it")
    repository.add_argument("folder", type=Path, help="a new one")
    _model_options(repository)
    repository.add_argument("--gpus", type=_gpu, nargs="+", default=[], metavar="N", help="default: all there are")
    repository.set_defaults(command=_lay_out)
    doctor = commands.add_parser("doctor", help="check what this machine can run; print every setting")
    _server_options(doctor)
    doctor.set_defaults(command=_doctor)
    return parser


def _picture(text: str) -> Path:
    """A file that can be written once the picture is there, of a kind that we write."""
    path = Path(text)
    if path.suffix.lower() not in _FORMATS:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a name that ends in {', '.join(_FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.absolute().parent}: no such folder")
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path}: {'is a folder' if path.is_dir() else 'cannot be written'}")
    return path


def _gpu(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}; expected the number of a GPU, 0 or more")
    return int(text)


def _model_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--checkpoint", help="a diffusers-format folder; default: the tiny model that is shipped")
    model.add_argument("--artifact", help="a folder made by `fluxserve export`, in place of a checkpoint")
    parser.add_argument(
        "--model",
        choices=[member.name for member in registry.members()],
        metavar="NAME",
        help="of a checkpoint that its shapes can't tell: flux.2-dev-turbo; default: what the folder says",
    )
    parser.add_argument("--engine", help="default: the artifact's; for a checkpoint, torch_eager")


def _server_options(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    parser.add_argument(
        "--server",
        default="",
        metavar="PATH|URL",
        help="a tritonserver binary, or the URL (http://, grpc://) of a server that runs already; "
        "default: the one in the wheel nvidia-pytriton",
    )
    parser.add_argument("--repository", type=Path, default=_REPOSITORY, help="model repository; default: %(default)s")


def _chosen(options: argparse.Namespace) -> dict[str, str]:
    """The settings that were given on the command line."""
    names = ("checkpoint", "artifact", "model", "engine")
    return {name: getattr(options, name) for name in names if getattr(options, name)}


def _installation(server: str) -> Installation:
    return installed_at(Path(server)) if server else bundled()


# --- repository ------------------------------------------------------------------------------------------------------


def _lay_out(options: argparse.Namespace) -> int:
    from fluxserve import source

    chosen = _chosen(options)
    for name in ("checkpoint", "artifact"):
        if name in chosen:
            chosen[name] = str(expanded(Path(chosen[name])).absolute())
    found = source.find(settings.load({name: {"string_value": value} for name, value in chosen.items()}))
    lay_out(_REPOSITORY, options.folder, chosen, options.gpus)
    _say(f"{options.folder}: {found.spec.name} through {found.engine}")
    _say(f"  fluxserve serve --repository {options.folder} --http-port 8010 --grpc-port 8011 --metrics-port 8012")
    return 0


# --- serve -----------------------------------------------------------------------------------------------------------


def _serve(options: argparse.Namespace) -> int:
    if "://" in options.server:
        return _attach(options.server)
    model = _served_name(options) if options.page else ""
    installation, notices = _installation(options.server), console.Notices(sys.stdout)
    try:
        return serve(options, installation, _chosen(options), notices, model)
    finally:
        notices.close()


def _served_name(options: argparse.Namespace) -> str:
    """Return the name of the model that will be served; "flux" for a repository that says so itself."""
    from fluxserve import source

    if options.repository != _REPOSITORY:
        return "flux"
    config = settings.load({name: {"string_value": value} for name, value in _chosen(options).items()})
    return source.find(config).spec.name


def _say(line: str) -> None:
    print(line, flush=True)


def _attach(url: str) -> int:
    """Another server is served by somebody else: say whether it is ready."""
    _say(f"{_ready(url)}; it runs by itself, so there is nothing to start")
    return 0


def _ready(url: str) -> str:
    with _client(url) as client:
        if not client.ready():
            raise ServerError(f"{url}: the server or its model `flux` is not ready")
    return f"{url}: ready"


@contextlib.contextmanager
def _client(url: str) -> "Iterator[Client]":
    """A client of a server, whose errors become ours: what a caller gives to it is the command line's."""
    settings.silence_grpc()
    try:
        from fluxserve_client import Client
        from fluxserve_client import FluxserveError as ClientError
    except ModuleNotFoundError as error:
        raise LibraryMissing(str(error.name), comes_with="the client (pip install ./client)") from error
    try:
        with Client(url) as client:
            yield client
    except (ClientError, ValueError) as error:
        raise ServerError(str(error)) from error


# --- demo ------------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    if "://" in options.server:
        return _draw_through(options.server, options)
    with (
        Path(os.devnull).open("wb") as log,
        TritonServer(options.repository, Ports.free(), _installation(options.server), log, _chosen(options)) as server,
    ):
        ticker = console.Ticker("starting Triton")
        server.start()
        ticker.done(server.wait_ready(progress=ticker))
        return _draw_through(f"grpc://{server.grpc_url}", options)


def _show_step(progress: Any) -> None:
    print(f"\rdrawing … step {progress.step} of {progress.steps}\r", end="", flush=True)


def _draw_through(url: str, options: argparse.Namespace) -> int:
    begin = time.perf_counter()
    with _client(url) as client:
        progress = _show_step if sys.stdout.isatty() else None
        result = client.generate(options.prompt, seed=options.seed, progress=progress)
        result.save(options.output)
    spent = 1000 * (time.perf_counter() - begin)
    t = result.timings
    print(f"{options.output.resolve()}: {options.prompt!r}, {result.width} x {result.height}, seed {result.seeds[0]}")
    print(
        f"  queue {t.queue:.1f} ms, text {t.encode:.1f} ms, denoise {t.denoise:.1f} ms, VAE {t.decode:.1f} ms,"
        f" {result.format} {t.image:.1f} ms; connecting to file, as the client saw it: {spent:.0f} ms"
    )
    return 0


# --- export ----------------------------------------------------------------------------------------------------------


def _export(arguments: Sequence[str]) -> int:
    """Hand over to the exporter, a package of its own whose libraries nothing else needs."""
    settings.let_threads_sleep()
    (command,) = entry_points(group="fluxserve.commands", name="export")
    try:
        export: Callable[[Sequence[str]], int] = command.load()
    except ModuleNotFoundError as error:
        missing = f"{error.name or error}: not installed; expected the extra 'export' (pip install 'fluxserve[export]')"
        print(f"fluxserve export: {missing}", file=sys.stderr)
        return 1
    return export(arguments)


# --- generate, doctor ------------------------------------------------------------------------------------------------


def _generate(options: argparse.Namespace) -> int:
    from fluxserve import source
    from fluxserve.media.provenance import System
    from fluxserve.model import Model
    from fluxserve.model import request as request_of
    from fluxserve.serving.files import Files, open_signer

    config = settings.load({name: {"string_value": value} for name, value in _chosen(options).items()})
    names = ("height", "width", "num_inference_steps", "guidance_scale", "negative_prompt", "true_cfg_scale", "seed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    given["output_format"] = _FORMATS[options.output.suffix.lower()]
    found = source.find(config)
    request = request_of(found.spec, options.prompt, **given)  # this and the signer before weights are loaded
    signer = open_signer(config, found.spec.name)
    ticker, begin = console.Ticker("loading"), time.perf_counter()
    with Model.of(found, config) as model:
        ticker.done(time.perf_counter() - begin)
        job, device = model.job(request), str(model.pipeline.device)
        (drawing,) = model.pipeline.draw([job])
        assert drawing is not None, "nobody can cancel it"
        system = System(found.spec.name, found.engine, found.precision(device, config.dtype))
        files = Files(None, found.spec, system, signer)
        (file,) = files.begin(drawing, job, request.output_format, request.quality)()
        options.output.write_bytes(file)
    size = f"{request.width} x {request.height}"
    stages = ", ".join(f"{name} {spent:.1f} ms" for name, spent in drawing.timings.items())
    print(f"{options.output.resolve()}: {size}, seed {request.seed}, {device}\n  {stages}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    """Every check is made, whatever the others say; the status is 1 if one failed."""
    from fluxserve.cli import doctor

    config = settings.load({name: {"string_value": value} for name, value in _chosen(options).items()})

    def server() -> str:
        return _ready(options.server) if "://" in options.server else str(_installation(options.server).binary)

    failed: set[str] = set()
    for name, check in doctor.checks(config, server).items():
        if "model" in failed and name in doctor.NEEDS_MODEL:
            continue
        try:
            print(f"  ok    {name}: {check()}")
        except FluxserveError as error:
            failed.add(name)
            print(f"  FAIL  {name}: {error}")
    print("\nsettings (environment variable, value):")
    for field in fields(config):
        print(f"  FLUXSERVE_{field.name.upper():<12} {getattr(config, field.name)!r}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
