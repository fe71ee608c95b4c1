"""docker/ against the library: no engine runs it here, so whatever can be held against something is."""

import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import astuple, fields
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from fluxserve import __version__, contract, settings
from fluxserve import supervisor as server
from fluxserve.cli import main as cli
from fluxserve.families.flux.models import FLUX1_DEV, FLUX2_KLEIN_4B, MEMBERS
from tests.support.bodies import MIB, largest_mib

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
UNITS = {"mb": 2**20, "gb": 2**30, "g": 2**30}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (INSTRUCTION, arguments), with comments gone and continued lines joined."""
    lines = (DOCKER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#")).replace("\\\n", "")
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word
    ]


def arguments(name: str) -> list[str]:
    return [rest for word, rest in instructions() if word == name]


def image_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in arguments("ENV") for pair in rest.split())


def copies() -> dict[str, str]:
    """Where in the image a path of the context ends up."""
    split = ([word for word in rest.split() if not word.startswith("--")] for rest in arguments("COPY"))
    return {destination: source for source, destination in split}


def command() -> Namespace:
    """What the entry point means, by the parser that will read it."""
    (entry,) = arguments("ENTRYPOINT")
    program, *rest = json.loads(entry)  # the exec form: no shell stands between SIGTERM and the supervisor
    assert program == "fluxserve"
    return cli._parser().parse_args(rest)


def service() -> dict[str, Any]:
    """compose.yaml's one service, with every ${NAME:-default} at its default."""
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    (only,) = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))["services"].values()
    assert isinstance(only, dict)
    return only


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def size(text: str) -> int:
    number, unit = re.findall(r"\d+|[a-z]+", text)
    return int(number) * UNITS[unit]


def in_context(path: PurePosixPath) -> bool:
    """Whether Dockerfile.dockerignore lets a path through: the last rule that matches it or a folder above decides."""
    lines = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    kept = True
    for rule in (line.strip() for line in lines if line.strip() and not line.startswith("#")):
        pattern = rule.removeprefix("!")
        candidates = [str(p) for p in (path, *path.parents)]
        if pattern.startswith("**/"):
            candidates = list(path.parts)
        if any(fnmatch(c, pattern.removeprefix("**/")) for c in candidates if c != "."):
            kept = rule.startswith("!")
    return kept


# --- Dockerfile ------------------------------------------------------------------------------------------------------


def release() -> tuple[int, int]:
    """Year and month of the base image."""
    (base,) = arguments("FROM")
    found = re.fullmatch(r"nvcr\.io/nvidia/tritonserver:(\d\d)\.(\d\d)-py3(@sha256:[0-9a-f]{64})?", base)
    assert found, base
    return int(found[1]), int(found[2])


def test_base_is_a_pinned_release() -> None:
    year, month = release()
    text = (DOCKER / "README.md").read_text(encoding="utf-8")
    assert f"pinned to {year}.{month:02}" in text


SECURITY = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
HEADER_ENDS_IT = {(26, 6), (26, 7), (26, 8)}
"""Releases that one HTTP header ends (docs/security.md)."""


def test_base_has_every_fix_that_was_published() -> None:
    """Each row of the table of bulletins ends in the release that has its fixes."""
    rows = re.findall(r"^\| \[\d{4}\]\(.*\| (\d\d)\.(\d\d) \|$", SECURITY, re.MULTILINE)
    assert len(rows) >= 12
    assert all((int(year), int(month)) <= release() for year, month in rows)
    assert release() not in HEADER_ENDS_IT


@pytest.mark.parametrize("number", [*range(24206, 24210), 24146, 24173])
def test_known_vulnerabilities_are_in_the_table(number: int) -> None:
    assert f"CVE-2026-{number}" in SECURITY or f"-{number}" in SECURITY


def test_user_is_a_number_and_not_root() -> None:
    words = [word for word, _ in instructions()]
    (user,) = arguments("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert not {"RUN", "COPY", "ADD"} & set(words[words.index("USER") :]), (
        "what comes after USER would be the user's own"
    )


def test_entry_point_is_a_command_line_that_fluxserve_accepts() -> None:
    options = command()
    assert options.command is cli._serve
    assert options.server == "/opt/tritonserver/bin/tritonserver"
    assert options.address == "0.0.0.0"
    assert copies()[str(options.repository)] == "model_repository"
    assert not arguments("CMD"), "CMD would be more arguments"


def test_ports() -> None:
    options = command()
    ports = (options.http_port, options.grpc_port, options.metrics_port)
    assert ports == astuple(server.Ports())
    assert [tuple(map(int, rest.split())) for rest in arguments("EXPOSE")] == [ports]


def test_environment() -> None:
    """An installed package has no source tree around it, so the model has to be named."""
    environment = image_environment()
    assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == "1"
    tiny = copies()[environment["FLUXSERVE_CHECKPOINT"]]
    assert ROOT / tiny == settings.default_checkpoint()


def test_stop_signal() -> None:
    assert arguments("STOPSIGNAL") == ["SIGTERM"]


def test_health_check_asks_for_readiness() -> None:
    (check,) = arguments("HEALTHCHECK")
    flags, _, probe = check.partition("CMD ")
    assert json.loads(probe)[-1] == f"http://127.0.0.1:{server.Ports().http}/v2/health/ready"
    assert seconds(re.search(r"--start-period=(\S+)", flags)[1]) >= server.READY_TIMEOUT_S  # type: ignore[index]


def test_pip_keeps_to_the_pins_and_leaves_no_cache() -> None:
    installs = [rest for rest in arguments("RUN") if "pip install" in rest]
    assert installs
    for install in installs:
        assert "--no-cache-dir" in install
        assert "--constraint /src/constraints.txt" in install


def context_sources() -> Iterator[str]:
    yield from copies().values()
    for run in arguments("RUN"):
        for mount in re.findall(r"--mount=type=bind,(\S+)", run):
            yield from re.findall(r"source=([^,]+)", mount)
    # the last bind is the whole context, of which `pip install` reads:
    yield from ("pyproject.toml", "README.md", "LICENSE", "fluxserve", "export")


def test_context_has_what_the_build_reads() -> None:
    for source in context_sources():
        path = ROOT / source
        found = (
            [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        )
        assert found, source
        for file in found:
            assert in_context(PurePosixPath(file.relative_to(ROOT))), file


@pytest.mark.parametrize("path", [".git/config", ".venv/bin/python", "tests/unit/x.py", "fluxserve/__pycache__/x.pyc"])
def test_context_has_nothing_else(path: str) -> None:
    assert not in_context(PurePosixPath(path))


# --- compose.yaml ----------------------------------------------------------------------------------------------------


def test_compose_builds_this_image() -> None:
    build = service()["build"]
    context = (DOCKER / build["context"]).resolve()
    assert context == ROOT.resolve()
    assert (context / build["dockerfile"]).samefile(DOCKER / "Dockerfile")
    assert service()["image"] == f"fluxserve:{__version__}"


def test_ports_are_published_on_loopback() -> None:
    published = [port.rsplit(":", 2) for port in service()["ports"]]
    assert {host for host, _, _ in published} == {server.LOOPBACK}
    assert [int(inside) for _, _, inside in published] == list(astuple(server.Ports()))


def test_nothing_is_writable_but_tmp() -> None:
    compose = service()
    assert compose["read_only"] is True
    assert all(volume["read_only"] is True for volume in compose["volumes"])
    assert "/models" in {volume["target"] for volume in compose["volumes"]}
    (tmp,) = compose["tmpfs"]
    path, options = tmp.split(":")
    assert path == "/tmp"
    assert {"noexec", "nosuid", "nodev"} <= set(options.split(","))
    assert "size=" in options


def test_privileges() -> None:
    compose = service()
    assert compose["cap_drop"] == ["ALL"]
    assert compose["security_opt"] == ["no-new-privileges:true"]
    assert compose["ipc"] == "private"
    assert not {"user", "privileged", "cap_add", "pid", "network_mode", "devices"} & set(compose)


def instances(model: str) -> int:
    config = (ROOT / "model_repository" / model / "config.pbtxt").read_text(encoding="utf-8")
    (group,) = text_format.Parse(config, model_config_pb2.ModelConfig()).instance_group
    return int(group.count)


def shared_memory_needed(gpus: int = 1) -> int:
    """Bytes in /dev/shm when every process has held its largest request and the answer to it, at the widest limits.

    A region never shrinks, and a request goes through it before it is refused: so the largest request is the largest
    body that reaches Triton, for `control` too. Triton 2.51 bounds none; a proxy does, and keeps clients to `flux` and
    `control`.
    """
    body = max(largest_mib(model) for model in MEMBERS) * MIB
    limits = max((model.limits for model in MEMBERS), key=lambda limits: limits.max_pixels)
    image = 3 * limits.max_pixels  # RGB; as much as all references have
    assert image >= 3 * max(m.limits.max_references * m.limits.max_reference_pixels for m in MEMBERS)
    answer = limits.max_images * image * 4 // 3  # a PNG of noise is as large as its pixels, and base64 adds a third
    generate = contract.MAX_BATCH_SIZE * (image + answer)
    return instances("prepare") * (body + image) + instances("control") * body + gpus * generate


def test_shared_memory() -> None:
    one, eight = (f"{shared_memory_needed(gpus) / 1e9:.2f}" for gpus in (1, 8))
    for file in ("compose.yaml", "README.md"):
        words = " ".join((DOCKER / file).read_text(encoding="utf-8").replace("#", "").split())
        assert f"{one} GB" in words and f"{eight} GB" in words, (file, one, eight)
    assert size(service()["shm_size"]) >= 1.5 * shared_memory_needed(8)


def test_the_proxys_limits_are_the_models() -> None:
    """The largest request passes, and the configuration and both pages say the same."""
    one, four = largest_mib(FLUX1_DEV), largest_mib(FLUX2_KLEIN_4B)
    configuration = (DOCKER / "nginx.conf").read_text(encoding="utf-8")
    assert f"client_max_body_size {one}m;" in configuration and f"FLUX.2: {four}m." in configuration
    for page in (DOCKER / "README.md", ROOT / "docs" / "security.md"):
        assert f"{one} MiB for FLUX.1, {four} MiB for FLUX.2" in page.read_text(encoding="utf-8"), page


FLUX1_BYTES = 2 * 12 * 10**9
"""Of the transformer in BF16, which is the largest component."""


def test_memory_limit() -> None:
    """Bytes of /dev/shm and /tmp, of what runs without a GPU, and of one GPU's process while it loads FLUX.1."""
    compose = service()
    (tmp,) = compose["tmpfs"]
    in_memory = size(compose["shm_size"]) + size(re.search(r"size=(\w+)", tmp)[1])  # type: ignore[index]
    base, process = in_memory + size("4gb"), size("4gb") + FLUX1_BYTES
    assert size(compose["mem_limit"]) >= 1.1 * (base + process)
    assert compose["memswap_limit"] == compose["mem_limit"], "no swap"
    text = (DOCKER / "README.md").read_text(encoding="utf-8")
    assert f"{base / 2**30:.0f} + 4 + {FLUX1_BYTES / 1e9:.0f} = {base / 2**30 + 4 + FLUX1_BYTES / 1e9:.0f} GB" in text
    for limit in ("--memory ", "--memory-swap ", "--pids-limit ", "--ulimit core=0"):
        assert limit in text, "docker run has the limits too"


def test_process_limit() -> None:
    kept = ROOT / "benchmarks" / "results" / "fatal-cpu-2026-11-30.json"
    idle = json.loads(kept.read_text(encoding="utf-8"))["idle_threads"]
    gpus, cores, compilers = 8, 128, 32
    assert int(service()["pids_limit"]) >= 2 * (idle["all"] + gpus * (cores + compilers))
    assert f"[{idle['all']} are in use]" in (DOCKER / "README.md").read_text(encoding="utf-8")
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    assert f"{idle['all']} are in use, {idle['triton']} of them Triton's own" in text


def test_no_core_dumps() -> None:
    assert service()["ulimits"]["core"] == 0


def test_limits_can_be_changed_and_are_documented() -> None:
    compose = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    text = (DOCKER / "README.md").read_text(encoding="utf-8")
    for name in ("MEMORY_LIMIT", "PIDS_LIMIT"):
        default = re.search(rf"\$\{{{name}:-(\w+)\}}", compose)
        assert default
        assert f"| `{name}` | `{default[1]}` |" in text


def test_stopping_leaves_time_to_drain() -> None:
    assert command().drain_timeout == server.DRAIN_TIMEOUT_S
    more = server.EXIT_TIMEOUT_S + server.GONE_TIMEOUT_S  # TritonServer.stop
    grace = seconds(service()["stop_grace_period"])
    assert grace >= server.DRAIN_TIMEOUT_S + more
    for file in ("compose.yaml", "README.md"):
        words = " ".join((DOCKER / file).read_text(encoding="utf-8").split())
        assert f"up to {server.DRAIN_TIMEOUT_S:.0f} s" in words and f"up to {more:.0f} s more" in words, file
    assert f"**{grace:.0f} s to stop**" in (DOCKER / "README.md").read_text(encoding="utf-8")


def test_health_check_is_the_images_own() -> None:
    (check,) = arguments("HEALTHCHECK")
    flags, _, probe = check.partition("CMD ")
    written = service()["healthcheck"]
    assert written["test"] == ["CMD", *json.loads(probe)]
    for flag in flags.split():
        name, value = flag.removeprefix("--").split("=")
        assert str(written[name.replace("-", "_")]) == value


def test_gpu_and_restart() -> None:
    (device,) = service()["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert service()["restart"] == "unless-stopped"
    assert service()["init"] is True


def test_settings_are_real_and_documented() -> None:
    known = {f"FLUXSERVE_{field.name.upper()}" for field in fields(settings.Settings)} - {"FLUXSERVE_INFLIGHT"}
    assert set(service()["environment"]) == known, "the in-flight table's place is the supervisor's business"
    assert service()["environment"]["FLUXSERVE_CHECKPOINT"] == image_environment()["FLUXSERVE_CHECKPOINT"]
    text = (DOCKER / "README.md").read_text(encoding="utf-8")
    assert known == set(re.findall(r"^\| `(FLUXSERVE_\w+)`", text, re.MULTILINE))


# --- linters, where they are installed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "linter",
    [
        ["hadolint", str(DOCKER / "Dockerfile")],
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(DOCKER / "compose.yaml")],
    ],
    ids=lambda linter: linter[0],
)
def test_lint(linter: list[str]) -> None:
    program = shutil.which(linter[0]) or shutil.which(linter[0], path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip(f"{linter[0]} is not installed")
    done = subprocess.run([program, *linter[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
