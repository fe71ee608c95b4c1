"""A certificate for localhost, made by openssl."""

import subprocess
from pathlib import Path

from tests.support import programs


def make(folder: Path) -> tuple[Path, Path]:
    """Return the files of a self-signed certificate and its key."""
    chain, key = folder / "chain.pem", folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command = [programs.needed("openssl"), "req", "-x509", *kind, *subject, "-keyout", str(key), "-out", str(chain)]
    subprocess.run(command, check=True, capture_output=True)
    return chain, key
