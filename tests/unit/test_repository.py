"""repository: what is laid out is the shipped repository with settings that Triton reads as they were given."""

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from fluxserve import settings
from fluxserve.cli.main import main
from fluxserve.errors import ServerError
from fluxserve.supervisor.repository import lay_out

SHIPPED = Path(__file__).parents[2] / "model_repository"
ODD = '/models/a "quoted" näme\\with\ttabs'


def config(folder: Path, model: str) -> dict[str, Any]:
    """As a Python model of Triton's gets it."""
    text = (folder / model / "config.pbtxt").read_text(encoding="utf-8")
    message = text_format.Parse(text, model_config_pb2.ModelConfig())
    read: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return read


def test_settings_are_read_as_they_were_given(tmp_path: Path) -> None:
    chosen = {"artifact": ODD, "engine": "fused"}
    lay_out(SHIPPED, tmp_path / "dev", chosen, gpus=[1, 3])
    for model in ("prepare", "generate"):
        found = settings.load(config(tmp_path / "dev", model)["parameters"])
        assert (found.artifact, found.engine, found.checkpoint) == (ODD, "fused", "")
    (group,) = config(tmp_path / "dev", "generate")["instance_group"]
    assert group == {"kind": "KIND_GPU", "count": 1, "gpus": [1, 3]}


def test_the_model_that_was_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["repository", str(tmp_path / "made"), "--checkpoint", str(settings.default_checkpoint())]
    assert main([*command, "--model", "flux.2-dev-turbo"]) == 1
    assert (
        "model: got 'flux.2-dev-turbo'; expected tiny, by its transformer and whether it is distilled"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "made").exists()
    assert main([*command, "--model", "tiny"]) == 0
    for model in ("prepare", "generate"):
        assert settings.load(config(tmp_path / "made", model)["parameters"]).model == "tiny"


def test_everything_else_is_the_shipped_one(tmp_path: Path) -> None:
    lay_out(SHIPPED, tmp_path / "plain", {})
    files = {f.relative_to(SHIPPED) for f in SHIPPED.rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    assert {f.relative_to(tmp_path / "plain") for f in (tmp_path / "plain").rglob("*") if f.is_file()} == files
    assert all((tmp_path / "plain" / f).read_bytes() == (SHIPPED / f).read_bytes() for f in files)
    assert [f.name for f in tmp_path.iterdir()] == ["plain"], "nothing is left beside it"


def test_what_can_not_be_laid_out(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for target in (tmp_path / "there", tmp_path / "no" / "folder"):
        with pytest.raises(ServerError, match="expected a new folder in one that exists"):
            lay_out(SHIPPED, target, {})
    with pytest.raises(ServerError, match="expected fluxserve's model repository"):
        lay_out(tmp_path / "there", tmp_path / "new", {})
    assert not (tmp_path / "new").exists()
