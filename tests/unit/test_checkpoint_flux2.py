"""checkpoint.read for FLUX.2: which member of the family a folder is, and what its language model must hold."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxserve.engines.open import open_components
from fluxserve.engines.torch_eager import load_module
from fluxserve.errors import CheckpointError, EngineError, UnsupportedArchitecture
from fluxserve.families.flux import folder as folders
from fluxserve.families.flux.configs import as_base
from fluxserve.families.flux.models import (
    FLUX2_DEV,
    FLUX2_DEV_TURBO,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    FLUX2_KLEIN_BASE_4B,
    FLUX2_KLEIN_BASE_9B,
)
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.families.flux.tensors import tensors
from fluxserve.folders import checkpoint
from fluxserve.kernels.operations import PLAIN
from fluxserve.settings import default_checkpoint
from tests.support import random_flux2
from tests.support.bare_folders import bare, change, refusal, write_header
from tests.support.random_flux2 import RandomFlux2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model's JSON files with weights of zeros: all that `read` looks at."""
    return bare(default_checkpoint(), tmp_path / "flux")


def write_zeros(folder: Path, layers: int | None) -> None:
    """Replace a component's weights by zeros of the shapes that its config.json says: a sparse file."""
    (file,) = folder.glob("*.safetensors")
    config = json.loads((folder / "config.json").read_text())
    header, end = {}, 0
    for name, shape in tensors(config.get("_class_name") or config["architectures"][0], config, layers).read.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + 2 * math.prod(shape)]}
    write_header(file, header)
    os.truncate(file, file.stat().st_size + end)


# --- FLUX.2-klein ----------------------------------------------------------------------------------------------------


@pytest.fixture
def klein(tmp_path: Path) -> Path:
    """A random klein's JSON files with weights of zeros."""
    return bare(random_flux2.klein().folder, tmp_path / "klein")


def test_klein(klein: Path) -> None:
    read = checkpoint.read(klein)
    assert read.spec.name == "custom"
    assert (read.spec.defaults, read.spec.limits) == (FLUX2_KLEIN_4B.defaults, FLUX2_KLEIN_4B.limits)
    (encoder,) = read.spec.text.encoders
    assert (encoder.name, encoder.vocabulary, encoder.layers) == ("qwen3", random_flux2.VOCABULARY, (9, 18, 27))
    assert read.spec.schedule.empirical_shift


def test_flux2_dev() -> None:
    """Its language model can see, and says so in a configuration of its own."""
    read = checkpoint.read(random_flux2.dev().folder)
    assert (read.spec.defaults, read.spec.limits) == (FLUX2_DEV.defaults, FLUX2_DEV.limits)
    (encoder,) = read.spec.text.encoders
    assert (encoder.name, encoder.vocabulary, encoder.layers) == ("mistral3", random_flux2.VOCABULARY, (10, 20, 30))


@pytest.fixture
def published_dev(tmp_path: Path) -> Path:
    """FLUX.2-dev's configurations at its real shape, with weights of zeros that take no room."""
    target, shape = bare(random_flux2.dev().folder, tmp_path / "dev"), FLUX2_DEV.transformer
    names = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim")
    real = {name: getattr(shape, name) for name in (*names, "axes_dims_rope")}
    change(target / "transformer/config.json", **real)
    text = json.loads((target / "text_encoder/config.json").read_text())["text_config"]
    wide = {**text, "hidden_size": shape.joint_attention_dim // 3}
    change(target / "text_encoder/config.json", text_config=wide)
    for name in ("transformer", "text_encoder"):
        write_zeros(target / name, layers=30 if name == "text_encoder" else None)
    return target


def test_turbo_is_told(published_dev: Path) -> None:
    dev, turbo = checkpoint.read(published_dev), checkpoint.read(published_dev, model="flux.2-dev-turbo")
    assert (dev.spec.name, dev.spec.defaults) == ("flux.2-dev", FLUX2_DEV.defaults)
    assert (turbo.spec.name, turbo.spec.defaults) == ("flux.2-dev-turbo", FLUX2_DEV_TURBO.defaults)
    assert (turbo.spec.limits, turbo.spec.only_steps) == (FLUX2_DEV_TURBO.limits, 8)
    assert (turbo.spec.text, turbo.spec.vae) == (dev.spec.text, dev.spec.vae), "what the folder says stays"
    assert checkpoint.read(published_dev, model="flux.2-dev") == dev


def test_a_model_that_the_folder_is_not(published_dev: Path, folder: Path, klein: Path) -> None:
    for path, model, expected in (
        (published_dev, "flux.2-klein-9b", "flux.2-dev or flux.2-dev-turbo"),
        (folder, "flux.2-dev-turbo", "tiny"),
        (klein, "flux.2-dev-turbo", "no name"),
    ):
        with pytest.raises(UnsupportedArchitecture) as caught:
            checkpoint.read(path, model=model)
        assert (
            str(caught.value)
            == f"{path}: model: got {model!r}; expected {expected}, by its transformer and whether it is distilled"
        )


@pytest.mark.parametrize("is_distilled", [False, "remove"])
def test_a_klein_that_is_not_distilled(klein: Path, is_distilled: object) -> None:
    """A Base model is drawn in two passes per step, and an entry that is missing says so, as in diffusers."""
    distilled = checkpoint.read(klein).spec
    change(klein / "model_index.json", is_distilled=is_distilled)
    base = checkpoint.read(klein).spec
    assert isinstance(base, FluxSpec) and base.classifier_free
    assert (base.defaults, base.limits) == (FLUX2_KLEIN_BASE_4B.defaults, FLUX2_KLEIN_BASE_4B.limits)
    assert (base.name, base.text) == (distilled.name, distilled.text), "what the folder says stays"


@pytest.mark.parametrize("is_distilled", [None, 1, "false"])
def test_a_klein_that_does_not_say_whether_it_is_distilled(klein: Path, is_distilled: object) -> None:
    change(klein / "model_index.json", is_distilled=is_distilled)
    assert "is_distilled" in refusal(klein, UnsupportedArchitecture)


@pytest.mark.parametrize("member", [FLUX2_KLEIN_BASE_4B, FLUX2_KLEIN_BASE_9B], ids=lambda m: m.name)
def test_a_base_of_a_published_shape(member: FluxSpec) -> None:
    """Its configurations are its klein's: model_index.json alone tells them apart, and a name may not contradict it."""
    (klein,) = (m for m in (FLUX2_KLEIN_4B, FLUX2_KLEIN_9B) if m.transformer == member.transformer)
    assert as_base(klein) == member
    for spec, other in ((klein, member), (member, klein)):
        assert folders.named(spec, spec.name) == spec
        with pytest.raises(ValueError, match=f"{spec.name}, by its"):
            folders.named(spec, other.name)


@pytest.mark.parametrize(
    ("name", "change_to"),
    [
        ("model_index.json", {"_class_name": "Flux2KleinKVPipeline"}),
        ("model_index.json", {"_class_name": "Flux2KleinInpaintPipeline"}),
        ("model_index.json", {"_class_name": "FluxPipeline"}),
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}),
        ("text_encoder/config.json", {"architectures": ["Qwen3Model"]}),
        ("text_encoder/config.json", {"hidden_size": 64}),
    ],
)
def test_another_architecture_than_kleins(klein: Path, name: str, change_to: dict[str, Any]) -> None:
    change(klein / name, **change_to)
    assert "expected" in refusal(klein, UnsupportedArchitecture)


def test_the_fused_engine_has_no_text_encoder_for_dev() -> None:
    from fluxserve.engines.fused import open as fused

    with pytest.raises(EngineError, match=r"fused: got custom, whose text encoder is mistral3; expected one with clip"):
        fused.assemble(random_flux2.dev().checkpoint(), torch.device("cpu"), fused.BF16, None, PLAIN)


LANGUAGE_MODELS = {
    random_flux2.klein: ("model.", r"model\.(layers\.(27|28|29)\.|norm\.)|lm_head\."),
    random_flux2.dev: (
        "language_model.model.",
        r"language_model\.(model\.(layers\.3[01]\.|norm\.)|lm_head)|vision|multi",
    ),
}
"""Of a folder: what its language model's names begin with, and what of the file nobody reads."""


@pytest.mark.parametrize("made", LANGUAGE_MODELS)
@pytest.mark.parametrize("lost", ["layers.26.mlp.up_proj.weight", "embed_tokens.weight"])
def test_a_language_model_that_lacks_a_layer(tmp_path: Path, made: Callable[[], RandomFlux2], lost: str) -> None:
    """What is after the last layer that is read may be missing, and only that; a head, and eyes, too."""
    target, (prefix, beyond) = tmp_path / "flux", LANGUAGE_MODELS[made]
    shutil.copytree(made().folder, target)
    (file,) = (target / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not re.match(beyond, name)}
    assert len(kept) < len(tensors)
    save_file(kept, file, metadata={"format": "pt"})
    open_components("torch_eager", checkpoint.read(target), "cpu", "float32").close()
    del kept[prefix + lost]
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing 1 tensor of"):
        open_components("torch_eager", checkpoint.read(target), "cpu", "float32")


def test_of_mistral_three_quarters_are_loaded(tmp_path: Path) -> None:
    """Whichever way its weights are called: as it was published first, or as its classes are built today."""
    target = tmp_path / "dev"
    shutil.copytree(random_flux2.dev().folder, target)
    (file,) = (target / "text_encoder").glob("*.safetensors")
    old = load_module(checkpoint.read(target), "mistral3", "cpu", torch.float32).state_dict()
    assert {name.split(".layers.")[0] for name in old} == {
        "model.language_model",
        "model.language_model.embed_tokens.weight",
    }
    assert {int(name.split(".")[3]) for name in old if ".layers." in name} == set(range(30))
    names = {name: "model." + name.replace("language_model.model.", "language_model.") for name in load_file(file)}
    save_file({names[name]: tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    new = load_module(checkpoint.read(target), "mistral3", "cpu", torch.float32).state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
