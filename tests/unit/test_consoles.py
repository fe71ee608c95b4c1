"""The server's console and the client's: two distributions, one behaviour."""

import os
import subprocess
import sys

import pytest

CONSOLES = pytest.mark.parametrize("console", ["fluxserve.console", "fluxserve_client.console"])


def shell(console: str, program: str, redirection: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program that has prepared its streams, in a shell that redirects them."""
    code = f"import os, sys\nfrom {console} import *\nprepare()\n{program}\nlet_go()"
    words = ["/bin/sh", "-c", f'"$0" -c "$1" {redirection}', sys.executable, code]
    return subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


@CONSOLES
@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(console: str, redirection: str) -> None:
    program = "print('a'); print('b', file=sys.stderr); sys.exit(open(os.devnull).fileno() <= 2)"
    assert shell(console, program, redirection).returncode == 0


@CONSOLES
@pytest.mark.parametrize(("encoding", "said"), [("ascii", "... \\u72d0\n"), ("latin-1", "... \\u72d0\n")])
def test_what_an_encoding_lacks_is_spelled_out(console: str, encoding: str, said: str) -> None:
    program = "print('\\u2026 \\u72d0'); print('\\u2026 \\u72d0', file=sys.stderr)"
    ended = shell(console, program, "", PYTHONIOENCODING=encoding)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, said, said)


@CONSOLES
@pytest.mark.parametrize("redirection", [">/dev/full", "2>/dev/full", ">/dev/full 2>&1"])
def test_output_that_cannot_be_written_is_dropped(console: str, redirection: str) -> None:
    program = "sys.stdout.write('a'); sys.stderr.write('b')"
    ended = shell(console, program, redirection, PYTHONUNBUFFERED="")
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False)
