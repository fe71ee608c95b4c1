"""What a measurement stands beside: hardware, versions, commit."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata

import torch

_LIBRARIES = ("diffusers", "transformers", "triton", "nvidia-cudnn-frontend")


def surroundings() -> dict[str, str]:
    """Of this run; "unknown" for what can't be had, nothing for a library that is not there.

    The commit is that of the environment variable COMMIT, if it is set: for a tree that was copied without its history.
    """
    found = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        found["gpu uuid"], found["driver"] = of_gpu("uuid"), of_gpu("driver_version")
        found["cudnn"] = str(torch.backends.cudnn.version())
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "commit": os.environ.get("COMMIT") or _output("git", "rev-parse", "--short", "HEAD")}


def of_gpu(query: str) -> str:
    """What nvidia-smi says of the first GPU, such as "memory.used"; "unknown" where there is none."""
    said = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0")
    return said.splitlines()[0]


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
