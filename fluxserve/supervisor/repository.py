"""A model repository for one model: the one that is shipped, with its settings written into it.

Any Triton serves it as it stands, without a variable in the environment: two models side by side are two such folders,
each with a server of its own.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from fluxserve.errors import ServerError

_TOLD = ("prepare", "generate")
"""The models that read settings."""
_ANY_GPU = "instance_group [ { kind: KIND_AUTO count: 1 } ]"


def lay_out(shipped: Path, target: Path, chosen: Mapping[str, str], gpus: Sequence[int] = ()) -> None:
    """Write `target`, whole or not at all.

    Args:
        shipped: the repository to begin with.
        chosen: settings by their names (see settings.Settings); paths must be absolute.
        gpus: where `generate` runs, one instance on each; none: on every GPU that the server sees.

    Raises:
        ServerError: `target` exists, its parent doesn't, or `shipped` is another repository than this was made for.
    """
    if target.exists() or not target.absolute().parent.is_dir():
        raise ServerError(f"{target}: got a path that can't be made; expected a new folder in one that exists")
    configs = {f"{name}/config.pbtxt": _told(shipped / name / "config.pbtxt", chosen) for name in _TOLD}
    if gpus:
        configs["generate/config.pbtxt"] = _placed(configs["generate/config.pbtxt"], gpus)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}-") as aside:
        folder = Path(aside) / target.name
        shutil.copytree(shipped, folder, ignore=shutil.ignore_patterns("__pycache__"))
        for name, text in configs.items():
            (folder / name).write_text(text, encoding="utf-8")
        folder.rename(target)


def with_queue_timeout(text: str, seconds: int) -> str:
    """Return the text of generate/config.pbtxt with Triton's bound on the wait set. Raises ServerError: it has none."""
    line = "default_timeout_microseconds: "
    changed, count = re.subn(rf"{line}\d+", f"{line}{1_000_000 * seconds}", text)
    if count != 1:
        raise ServerError(
            f"generate/config.pbtxt: got {count} lines `{line}…`; expected one, as in fluxserve's model repository"
        )
    return changed


def _told(config: Path, chosen: Mapping[str, str]) -> str:
    """A config.pbtxt's text and the settings; JSON's strings are protobuf's."""
    try:
        text = config.read_text(encoding="utf-8")
    except OSError as error:
        raise ServerError(f"{config}: {error.strerror}; expected fluxserve's model repository") from error
    settings = [
        f"parameters {{ key: {json.dumps(name)} value {{ string_value: {json.dumps(value, ensure_ascii=False)} }} }}\n"
        for name, value in chosen.items()
    ]
    return "".join([text.rstrip("\n"), "\n\n# What this repository serves.\n", *settings]) if settings else text


def _placed(text: str, gpus: Sequence[int]) -> str:
    if _ANY_GPU not in text:
        raise ServerError(f"generate/config.pbtxt: got no line `{_ANY_GPU}`; expected fluxserve's model repository")
    numbers = ", ".join(map(str, gpus))
    return text.replace(_ANY_GPU, f"instance_group [ {{ kind: KIND_GPU count: 1 gpus: [ {numbers} ] }} ]")
