"""The Python that Triton's stubs find, where its own path is not ASCII.

A stub embeds Python in isolated mode, with ASCII as the file system encoding. Letters of a path beyond ASCII are no
text to it: torch can't be imported from such a folder, and a .pth file that names one ends the stub. So it is shown a
virtual environment of the same packages, under paths of ours.
"""

import sys
import sysconfig
from pathlib import Path

_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"


def programs(home: Path) -> Path:
    """The folder of a `python` whose paths are ASCII: this one's, or that of an environment made in `home`."""
    packages, base = _packages(), Path(sys.base_prefix)
    if all(str(path).isascii() for path in (sys.executable, base, *packages)):
        return Path(sys.executable).parent
    environment = home / "python"
    if not environment.exists():
        site = environment / "lib" / _VERSION / "site-packages"
        for folder in (site, environment / "bin", environment / "paths"):
            folder.mkdir(parents=True)
        (environment / "base").symlink_to(base)
        configuration = f"home = {environment}/base/bin\ninclude-system-site-packages = false\n"
        (environment / "pyvenv.cfg").write_text(configuration, encoding="ascii")
        for name in ("python", "python3"):
            (environment / "bin" / name).symlink_to(sys.executable)
        links = [environment / "paths" / str(number) for number in range(len(packages))]
        for link, package in zip(links, packages, strict=True):
            link.symlink_to(package)
        (site / "paths.pth").write_text("".join(f"{link}\n" for link in links), encoding="ascii")
    return environment / "bin"


def _packages() -> list[Path]:
    """Folders that Python's site module has added: packages, and what .pth files name. PYTHONPATH is not among them."""
    library = sysconfig.get_path("stdlib")
    own = [place for place, folder in enumerate(sys.path) if folder in (library, f"{library}/lib-dynload")]
    return [Path(folder).absolute() for folder in sys.path[max(own) + 1 :] if Path(folder).is_dir()]
