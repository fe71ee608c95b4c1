"""The launcher: what it starts creates private files, with its own process id, arguments and exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fluxserve.supervisor import launcher

CREATE = """
import json, os, sys
file = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
def change(mode):
    try: os.fchmod(file, mode)
    except PermissionError as error: return error.errno
    return oct(os.fstat(file).st_mode & 0o777)
created = oct(os.fstat(file).st_mode & 0o777)
print(json.dumps([os.getpid(), sys.argv[2:], created, change(0o644), change(0o600), change(0o755)]))
sys.exit(5)
"""


def test_files_are_created_private_and_stay_so(tmp_path: Path) -> None:
    arguments = ["with blanks", "--and=dashes", ""]
    command = launcher.command([sys.executable, "-c", CREATE, str(tmp_path / "region"), *arguments])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid, received, created, boost, private, others = json.load(process.stdout)
    assert pid == process.pid, "signals and the guard are meant for the server"
    assert received == arguments
    assert process.returncode == 5
    assert created == "0o600"
    assert boost == 1, "EPERM for the mode that Boost sets"
    assert (private, others) == ("0o600", "0o755"), "any other mode is the program's business"


def test_what_the_program_starts_inherits_it(tmp_path: Path) -> None:
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CREATE!r}, {str(tmp_path / 'region')!r}])"
    run = subprocess.run(launcher.command([sys.executable, "-c", inner]), capture_output=True, text=True, check=True)
    assert json.loads(run.stdout)[2:4] == ["0o600", 1]


def test_a_program_that_is_not_there() -> None:
    run = subprocess.run(launcher.command(["/nowhere/tritonserver"]), capture_output=True, text=True, check=False)
    assert run.returncode == 127
    assert run.stderr == "fluxserve: /nowhere/tritonserver: No such file or directory\n"


@pytest.mark.parametrize(("mode", "found"), [(0o600, False), (0o644, True), (0o604, True), (0o660, True)])
def test_exposed_files_are_found(mode: int, found: bool, tmp_path: Path) -> None:
    for name in ("fluxserve-1-region", "of-somebody-else"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    assert launcher.exposed(tmp_path, "fluxserve-1-") == ([tmp_path / "fluxserve-1-region"] if found else [])
