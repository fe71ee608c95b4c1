"""What one tritonserver is started with: its command line, its environment, and which models are ours."""

import errno
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from fluxserve import contract, supervisor
from fluxserve.errors import ServerError
from fluxserve.supervisor import arguments, server
from tests.support.unstarted import made

# --- one server, not started -----------------------------------------------------------------------------------------


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /dev/shm; temporary folders go beside it."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(server, "_SHARED_MEMORY", folder)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return folder


def test_the_queues_timeout_is_written_where_triton_reads_it(tmp_path: Path, memory: Path) -> None:
    shipped = (Path(__file__).parents[2] / "model_repository" / "generate" / "config.pbtxt").read_text()
    with made(tmp_path, queue_timeout="7") as running:
        (tmp_path / "generate" / "config.pbtxt").write_text(shipped)
        running.launch.command()
        folder = running.launch.home / "model_repository" / "generate"
        config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        assert config.dynamic_batching.default_queue_policy.default_timeout_microseconds == 7_000_000
        assert (folder / "1" / "model.py").read_text() == "import fluxserve.serving"
        (tmp_path / "generate" / "config.pbtxt").write_text("nothing of the kind")
        with pytest.raises(ServerError, match="got 0 lines `default_timeout_microseconds: "):
            running.launch.command()
    assert (tmp_path / "generate" / "config.pbtxt").read_text() == "nothing of the kind", "the user's own is read only"


def test_the_command(tmp_path: Path, memory: Path) -> None:
    with made(tmp_path) as running:
        command = running.launch.command()
        assert command[0] == str(tmp_path / "none")
        assert {"--http-port=1", "--grpc-port=2", "--metrics-port=3"} < set(command)
        assert {f"--{p}-address=127.0.0.1" for p in ("http", "grpc", "metrics")} < set(command)
        assert "--model-control-mode=none" in command
        shut = "model-repository,shared-memory,trace,logging:fluxserve: NO HEADER HAS THIS NAME=shut"
        assert {f"--http-restricted-api={shut}", f"--grpc-restricted-protocol={shut}"} < set(command)
        models = running._home / "model_repository"
        assert {p.name for p in models.iterdir()} == set(contract.MODELS), "not what else lies in the folder"
        linked = running._home / "backends" / "python"
        assert {p.name for p in linked.iterdir()} == {"libtriton_python.so", "triton_python_backend_stub"}
        assert (linked / "triton_python_backend_stub").resolve() == tmp_path / "stub"


def test_the_environment(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    with made(tmp_path, engine="other") as running:
        env = running.launch.environment()
        assert env["FLUXSERVE_ENGINE"] == "other"
        assert env["FLUXSERVE_INFLIGHT"] == str(running.table.path)
        *given, own, mine = env["LD_LIBRARY_PATH"].split(":")
        assert given == ["/one", "/two"] and mine == "/mine"
        (libpython,) = Path(own).iterdir()  # alone: what stands beside it would go before PyTorch's own libraries
        assert libpython.readlink() == Path("/lib/libpython.so")
        assert running.launch.environment() == env, "a server that is started again"
        assert env["HF_HUB_OFFLINE"] == env["TRANSFORMERS_OFFLINE"] == "1"
        assert str(Path(supervisor.__file__).parents[2]) in env["PYTHONPATH"].split(":")
    assert os.environ["LD_LIBRARY_PATH"] == "/mine"


def no_config(model: Path) -> str:
    (model / "config.pbtxt").unlink()
    return "generate/config.pbtxt: No such file or directory"


def dangling(model: Path) -> str:
    shutil.rmtree(model)
    model.symlink_to("nowhere")
    return "generate/config.pbtxt: No such file or directory"


def no_version(model: Path) -> str:
    (model / "1" / "model.py").rename(model / "model.py")
    return "generate/1/model.py: No such file or directory"


def a_file(model: Path) -> str:
    shutil.rmtree(model)
    model.touch()
    return "generate/config.pbtxt: Not a directory"


def somebody_elses(model: Path) -> str:
    (model / "1" / "model.py").write_text("import vllm")
    return "generate/1/model.py: another model's"


def endless(model: Path) -> str:
    shutil.rmtree(model)
    model.symlink_to(model)
    return "generate/config.pbtxt: Too many levels of symbolic links"


@pytest.mark.parametrize("damage", [no_config, dangling, no_version, a_file, somebody_elses, endless])
def test_a_model_that_is_not_ours_is_refused_by_name(
    tmp_path: Path, memory: Path, damage: Callable[[Path], str]
) -> None:
    with made(tmp_path) as running:
        message = damage(tmp_path / "generate")
        with pytest.raises(ServerError) as refused:
            running.start()
        assert f"{tmp_path}/{message}; expected `generate` of fluxserve's model repository" == str(refused.value)
        assert running.exit_status() is None, "before Triton starts"


def test_the_ensemble_is_ours_too(tmp_path: Path, memory: Path) -> None:
    with made(tmp_path) as running:
        shutil.rmtree(tmp_path / "flux" / "1")
        with pytest.raises(ServerError, match="flux: no folder `1` for its version"):
            running.launch.command()
        (tmp_path / "flux" / "config.pbtxt").write_text('backend: "vllm"')
        with pytest.raises(ServerError, match=r"flux/config\.pbtxt: another model's"):
            running.launch.command()


def test_a_model_that_cannot_be_read(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, **_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with made(tmp_path) as running, monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", denied)
        with pytest.raises(ServerError, match=r"flux/config\.pbtxt: Permission denied; expected `flux`"):
            running.launch.command()


def test_paths_are_of_the_folder_that_the_user_is_in(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton runs in a folder of its own, which holds this package and nothing else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("FLUXSERVE_ARTIFACT", "model")
    monkeypatch.setattr("sys.path", ["", "here", *sys.path])
    with made(tmp_path, checkpoint="model") as running:
        given = ["--grpc-server-cert=a.pem", "--log-f=log", "--trace-config=triton,file=t", "--log-info=1"]
        assert replace(running.launch, arguments=given).command()[-4:] == [
            f"--grpc-server-cert={tmp_path}/a.pem",
            f"--log-f={tmp_path}/log",
            f"--trace-config=triton,file={tmp_path}/t",
            "--log-info=1",
        ]
        env = running.launch.environment()
        assert env["FLUXSERVE_CHECKPOINT"] == env["FLUXSERVE_ARTIFACT"] == str(tmp_path / "model")
        assert all(Path(folder).is_absolute() for folder in env["PYTHONPATH"].split(":"))
        (package,) = running.launch.folder().iterdir()
        assert package.resolve() == Path(supervisor.__file__).parents[1]
    with made(tmp_path, checkpoint="black-forest-labs/FLUX.1-dev") as running:
        assert running.launch.environment()["FLUXSERVE_CHECKPOINT"] == "black-forest-labs/FLUX.1-dev", "no path of ours"


def test_a_collector_on_this_machine_is_reached_without_a_proxy(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "intern")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with made(tmp_path) as running:
        env = running.launch.environment()
        assert env["no_proxy"] == "intern,localhost,127.0.0.1,::1" and env["NO_PROXY"] == "localhost,127.0.0.1,::1"


# --- arguments and memory --------------------------------------------------------------------------------------------


def test_arguments_are_passed_on(tmp_path: Path, memory: Path) -> None:
    with made(tmp_path) as running:
        given = ["--log-verbose=1", "--backend-config=python,shm-growth-byte-size=2097152"]
        assert replace(running.launch, arguments=given).command()[-2:] == given


@pytest.mark.parametrize(
    "argument",
    [
        "--model-control-mode=explicit",
        "--model-contr=explicit",  # Triton takes any beginning of a name
        "--http-port=80",
        "--grpc-addr=0.0.0.0",
        "--model-repository=/tmp",
        "--backend-config=python,shm-region-prefix-name=x",
        "--backend-directory=/tmp",
        "--exit-timeout-secs=1",
        "--",
        "80",
        "",
    ],
)
def test_an_argument_of_ours_is_refused_by_name(tmp_path: Path, memory: Path, argument: str) -> None:
    with made(tmp_path) as running, pytest.raises(ServerError, match=f"--triton-arg: got {argument!r}; expected"):
        replace(running.launch, arguments=[argument]).command()


def test_a_tracing_argument_beside_trace_is_refused(tmp_path: Path, memory: Path) -> None:
    with made(tmp_path) as running:
        given = arguments.tracing("http://here:4318/v1/traces", 7)
        assert "--trace-config=rate=7" in replace(running.launch, arguments=given).command()
        with pytest.raises(ServerError, match="twice"):
            replace(running.launch, arguments=[*given, "--trace-config=rate=1"]).command()


@pytest.mark.parametrize("url", ["", "localhost:4318", "ftp://x", "http://"])
def test_a_collector_is_an_address(url: str) -> None:
    with pytest.raises(ServerError, match=f"--trace: got {url!r}; expected"):
        arguments.tracing(url)
    with pytest.raises(ServerError, match="--trace-rate: got 0; expected"):
        arguments.tracing("http://x", 0)
