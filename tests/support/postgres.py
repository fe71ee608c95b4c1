"""A PostgreSQL server of Debian's package, in a folder of its own, on a Unix socket alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg

_USER = "postgres"  # the server refuses to run as root


def programs() -> Path | None:
    """Where initdb and postgres are; None if they are not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda each: int(each.parts[-3]))
    if found:
        return found[-1].parent
    anywhere = shutil.which("initdb")
    return Path(anywhere).parent if anywhere else None


class Postgres:
    """The server, inside the `with` block."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._folder = Path(tempfile.mkdtemp(prefix="fs-pg-", dir="/tmp"))  # a socket's path has 107 characters at most
        self._prefix: tuple[str, ...] = ()
        if os.geteuid() == 0:
            self._prefix = ("setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups")  # exec: one pid
            shutil.chown(self._folder, _USER)
        self._process: subprocess.Popen[bytes] | None = None

    def _run(self, program: str, *arguments: str) -> tuple[str, ...]:
        return (*self._prefix, str(self._programs / program), *arguments)

    def __enter__(self) -> Self:
        data = str(self._folder / "data")
        words = self._run("initdb", "-D", data, "-U", _USER, "-A", "trust", "-E", "UTF8", "--no-sync")
        subprocess.run(words, check=True, capture_output=True, timeout=60, cwd="/")
        self.start()
        return self

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        settings = ("listen_addresses=", f"unix_socket_directories={self._folder}", "fsync=off", "max_connections=60")
        options = [word for setting in settings for word in ("-c", setting)]
        with (self._folder / "log").open("ab") as log:
            words = self._run("postgres", "-D", str(self._folder / "data"), *options)
            self._process = subprocess.Popen(words, stdout=log, stderr=log, cwd="/")
        end = time.monotonic() + 30
        while not self._answers():
            assert time.monotonic() < end, (self._folder / "log").read_text()
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self._address("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """End the server as a crash would: what is connected is cut off."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(20)

    def pause(self, signal_number: signal.Signals) -> None:
        """Send SIGSTOP, or SIGCONT, to all of the server's processes."""
        assert self._process is not None
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (pid, *map(int, children)):
            os.kill(each, signal_number)

    def _address(self, name: str) -> str:
        return f"postgresql://{_USER}@/{name}?host={self._folder}"

    def database(self) -> str:
        """The URL of an empty database; there is one, which the test before has left."""
        with psycopg.connect(self._address("postgres"), autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return self._address("postgres")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self._folder)
