"""How one tritonserver is started: its command line, its environment, and the folders that both point to."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxserve import contract, settings
from fluxserve.errors import ServerError
from fluxserve.supervisor.arguments import passed_through
from fluxserve.supervisor.installation import Installation
from fluxserve.supervisor.interpreter import programs
from fluxserve.supervisor.repository import with_queue_timeout
from fluxserve.supervisor.sockets import Ports

_TRITON_EXIT_S = 120
"""How long Triton itself may wait for HTTP connections after SIGTERM. The supervisor ends it long before, as soon as
no answer is left in a connection: Triton would wait for a client that only keeps its connection open."""

PINGS_MS = 1000
"""How often a gRPC client may ping while its request runs. By gRPC's default the third ping within five minutes ends
the connection, and with it the request."""

_PACKAGE = Path(__file__).resolve().parents[1]
_SHUT_APIS = "model-repository,shared-memory,trace,logging"
_SHUT_NAME = "fluxserve: NO HEADER HAS THIS NAME"


@dataclass(frozen=True)
class Launch:
    """What a tritonserver is started with. See `server.TritonServer` for the fields that its caller chooses."""

    repository: Path
    ports: Ports
    address: str
    installation: Installation
    options: Mapping[str, str]
    arguments: Sequence[str]
    prefix: str
    """How the names of the Python backend's shared memory begin."""
    home: Path
    """A folder of this server's own; what the command line names lies in it."""

    def command(self) -> list[str]:
        """The command line. Makes the folders that it names.

        Raises:
            ServerError: the repository lacks a model, or an argument of the user's contradicts one of ours.
        """
        own = self._own_arguments()
        return [str(self.installation.binary.absolute()), *own, *passed_through(self.arguments, own)]

    def folder(self) -> Path:
        """The folder that Triton is started in, which holds this very package and nothing else. Makes it.

        It is the first place where the stubs look for modules. In a folder of the user's, a checkout or a stray
        `json.py` would go before what is installed.
        """
        folder = self.home / "modules"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / _PACKAGE.name).symlink_to(_PACKAGE)
        return folder

    def _own_arguments(self) -> list[str]:
        evhtp, grpc = (f"ipv6:{self.address}", f"[{self.address}]") if ":" in self.address else (self.address,) * 2
        listen = [f"--http-address={evhtp}", f"--grpc-address={grpc}", f"--metrics-address={evhtp}"]
        ports = [f"--{p}-port={getattr(self.ports, p)}" for p in ("http", "grpc", "metrics")]
        backends = [f"--backend-directory={self._backends()}"] if self.installation.backends else []
        return [
            f"--model-repository={self._repository()}",
            "--model-control-mode=none",
            "--disable-auto-complete-config",
            f"--exit-timeout-secs={_TRITON_EXIT_S}",
            f"--grpc-http2-min-recv-ping-interval-without-data={PINGS_MS}",
            *shut(),
            f"--backend-config=python,shm-region-prefix-name={self.prefix}",
            *backends,
            *listen,
            *ports,
        ]

    def _repository(self) -> Path:
        """The contract's models, and nothing else that lies beside them, by links in a folder of ours.

        Triton ends over a `lost+found` or a `.git`, and splits the command lines of its stubs at blanks.
        """
        folder = self.home / "model_repository"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in contract.MODELS:
            _refuse_foreign(self.repository / name)
            (folder / name).symlink_to((self.repository / name).resolve())
        if seconds := settings.load({n: {"string_value": v} for n, v in self.options.items()}).queue_timeout:
            _bound_queue(folder / contract.GENERATE.name, seconds)
        return folder

    def _backends(self) -> Path:
        """The bundled backends with the stub of the running Python put in its place, by links."""
        assert self.installation.backends is not None
        folder = self.home / "backends" / "python"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in (self.installation.backends / "python").iterdir():
            if file.is_file():
                (folder / file.name).symlink_to(file)
        if self.installation.stub:
            (folder / "triton_python_backend_stub").symlink_to(self.installation.stub)
        return folder.parent

    def _libraries(self) -> list[str]:
        """Folders for the loader, before those of the environment.

        libpython comes by a link in a folder of its own. It stands among the system's libraries, whose cuDNN or CUDA
        would otherwise be found before PyTorch's own.
        """
        found = [str(folder) for folder in self.installation.libraries]
        if self.installation.libpython is not None:
            link = self.home / "lib" / self.installation.libpython.name
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(self.installation.libpython)
            found.append(str(link.parent))
        return found

    def environment(self) -> dict[str, str]:
        """This process's environment with the models' settings, and the libraries of the server for it alone.

        The stubs embed Python and find its home, and with it the packages, through the `python` on PATH. Those of the
        wheel heed PYTHONPATH up to Python 3.10 only; `folder` is what all of them heed.
        """
        env = settings.environment(**self.options)
        env["PATH"] = os.pathsep.join([str(programs(self.home)), env.get("PATH", "")])
        env["PYTHONPATH"] = os.pathsep.join(
            dict.fromkeys([str(_PACKAGE.parent), *(str(Path(folder).absolute()) for folder in sys.path if folder)])
        )
        env.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        if libraries := self._libraries():
            env["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [env.get("LD_LIBRARY_PATH")])])
        return env


def _bound_queue(link: Path, seconds: int) -> None:
    """Replace the link to a model with a folder of links, but for its configuration, which gets a queue timeout."""
    model = link.resolve()
    link.unlink()
    link.mkdir()
    for entry in model.iterdir():
        (link / entry.name).symlink_to(entry)
    config = link / "config.pbtxt"
    text = with_queue_timeout(config.read_text(encoding="utf-8"), seconds)
    config.unlink()
    config.write_text(text, encoding="utf-8")


def _refuse_foreign(model: Path) -> None:
    """Raise ServerError for a folder that is not one of fluxserve's models, as far as its files can be read and say."""
    wiring = model.name == contract.FLUX.name
    signs = (
        {"config.pbtxt": "ensemble_scheduling"} if wiring else {"config.pbtxt": "", "1/model.py": "fluxserve.serving"}
    )
    expected = f"expected `{model.name}` of fluxserve's model repository"
    for name, sign in signs.items():
        try:
            text = (model / name).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise ServerError(f"{model / name}: {error.strerror}; {expected}") from error
        if sign not in text:
            raise ServerError(f"{model / name}: another model's; {expected}")
    if not (model / "1").is_dir():
        raise ServerError(f"{model}: no folder `1` for its version; {expected}")


def shut() -> list[str]:
    """Arguments that shut the administrative APIs for everybody.

    Triton can only demand a header with a value, and every user of the machine may read both in its command line. So
    the demanded name is one that no header has. In HTTP/1.1 a name ends at its first colon. In HTTP/2 a name with a
    colon, a blank or a capital is malformed (RFC 9113, 8.2.1), and gRPC refuses all headers that come with it.
    """
    demand = f"{_SHUT_APIS}:{_SHUT_NAME}=shut"
    return [f"--http-restricted-api={demand}", f"--grpc-restricted-protocol={demand}"]
