"""`fluxserve doctor` says what a server would refuse, before one is started; and what no check of files can see."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fluxserve.cli.main import main
from fluxserve.errors import NotFinite
from fluxserve.folders import checkpoint
from tests.support.folders import copied, edit
from tests.support.foreign_folders import T5, TRANSFORMER, VAE, a_copy_called, beside, fill, only_config, pointer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copied(tmp_path / "flux")


# --- what is said before a server is started -------------------------------------------------------------------------


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["doctor", *arguments])
    return status, capsys.readouterr().out


def test_doctor_finds_nothing_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = doctor(capsys, "--checkpoint", str(folder))
    assert status == 0 and "FAIL" not in said
    assert f"tiny at {folder}" in said and "ok    weights: all numbers are finite" in said


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor too many": (lambda f: edit(f, TRANSFORMER, beside("*.weight_scale")), "model"),
    "two sets": (a_copy_called("flux1-dev.safetensors"), "model"),
    "a quantiser": (only_config("vae/config.json", quantization_config={"quant_method": "gguf"}), "model"),
    "NaN": (lambda f: edit(f, T5, fill("shared.weight", float("nan"))), "weights"),
    "infinity in the VAE": (lambda f: edit(f, VAE, fill("encoder.conv_out.bias", float("inf"))), "weights"),
    "an activation that nobody has": (only_config("text_encoder/config.json", hidden_act="wishful"), "engine"),
    "blocks that nobody has": (only_config("vae/config.json", up_block_types=["UpBlock9D"] * 4), "engine"),
    "heads of another size": (only_config("transformer/config.json", axes_dims_rope=[1, 2]), "model"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizers"),
    "a tokenizer that is a pointer": (
        lambda f: (f / "tokenizer_2/tokenizer.json").write_bytes(pointer("lfs")),
        "tokenizers",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_doctor_says_what_serve_would_refuse(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    spoil, check = WRONG[kind]
    spoil(folder)
    status, said = doctor(capsys, "--checkpoint", str(folder))
    assert status == 1 and re.findall(r"FAIL  (\w+): ", said) == [check]
    assert str(folder) in said


def test_doctor_knows_the_dtype(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(folder, TRANSFORMER, fill("proj_out.bias", 1e30))
    assert doctor(capsys, "--checkpoint", str(folder))[0] == 0
    monkeypatch.setenv("FLUXSERVE_DTYPE", "float16")
    assert doctor(capsys, "--checkpoint", str(folder))[0] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may be what the engine runs on")
def test_doctor_knows_the_engine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = doctor(capsys, "--checkpoint", str(folder), "--engine", "fused")
    assert status == 1 and "FAIL  engine: fused: got cpu; expected a CUDA device" in said


# --- what no check of files can see -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("component", "name"), [(TRANSFORMER, "proj_out.weight"), (VAE, "decoder.conv_out.weight")])
def test_finite_weights_whose_picture_is_not(folder: Path, component: str, name: str) -> None:
    """They overflow on their way: the model does not become ready."""
    from fluxserve.engines.torch_eager import open_components
    from fluxserve.pipeline import Pipeline

    edit(folder, component, lambda tensors: tensors[name].fill_(3e38))
    read = checkpoint.read(folder)
    components = open_components(read, "cpu", "float32")
    with pytest.raises(NotFinite):
        Pipeline(read.spec, components).warm_up()
    components.close()
