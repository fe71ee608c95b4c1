"""PixArt-Σ's folders, requests and jobs: what is read, and what is refused by name."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxserve.errors import CheckpointError, InvalidRequest, UnsupportedArchitecture
from fluxserve.families import registry
from fluxserve.families.pixart.folder import from_configs
from fluxserve.families.pixart.models import MEMBERS, PixArtSpec
from fluxserve.folders import checkpoint
from fluxserve.job import Job
from fluxserve.request import Tokens
from tests.support import random_pixart
from tests.support.bare_folders import bare, change, refusal
from tests.support.folders import copied, edit

pytestmark = pytest.mark.xdist_group("pixart")

SCHEDULER, TRANSFORMER = "scheduler/scheduler_config.json", "transformer/config.json"
VAE, TEXT = "vae/config.json", "text_encoder/config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """JSON files, and weights of zeros."""
    return bare(random_pixart.make().folder, tmp_path / "pixart")


@pytest.fixture
def spec() -> PixArtSpec:
    found = random_pixart.make().checkpoint().spec
    assert isinstance(found, PixArtSpec)
    return found


def test_the_bare_copy_passes(folder: Path, spec: PixArtSpec) -> None:
    """So that every refusal below is for its own reason."""
    assert checkpoint.read(folder).spec == spec
    assert (spec.family, spec.name, spec.defaults.side, spec.size_multiple) == ("pixart", "custom", 64, 16)


@pytest.mark.parametrize(("member", "side"), list(zip(MEMBERS, (256, 512, 1024, 2048), strict=True)))
def test_published_numbers(member: PixArtSpec, side: int) -> None:
    """A folder's configurations, as they are published, say which member it is."""
    transformer = {
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "sample_size": side // 8,
        "interpolation_scale": {2048: 4, 1024: 2}.get(side),
        "use_additional_conditions": False,
    }
    vae = {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512], "scaling_factor": 0.13025}
    assert from_configs(transformer, vae, {"d_model": 4096, "vocab_size": 32128}, {}) == member
    assert (member.defaults.side, member.text.sequence.tokens) == (side, 300)
    with pytest.raises(ValueError, match=r"scaling_factor=0\.18215"):
        from_configs(transformer, {**vae, "scaling_factor": 0.18215}, {"d_model": 4096, "vocab_size": 32128}, {})


@pytest.mark.parametrize(
    ("file", "entry", "value", "reason"),
    [
        (SCHEDULER, "_class_name", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"),
        (SCHEDULER, "solver_order", 3, "scheduler solver_order: got 3; expected 2"),
        (SCHEDULER, "use_karras_sigmas", True, "use_karras_sigmas"),
        (SCHEDULER, "beta_schedule", "squaredcos_cap_v2", "beta_schedule: got 'squaredcos_cap_v2'"),
        (SCHEDULER, "beta_end", "much", "beta_end"),
        (TRANSFORMER, "_class_name", "FluxTransformer2DModel", "PixArtTransformer2DModel"),
        (TRANSFORMER, "use_additional_conditions", True, "PixArt-α"),
        (TRANSFORMER, "activation_fn", "geglu", "transformer activation_fn: got 'geglu'"),
        (TRANSFORMER, "num_layers", 4, "missing"),
        (TRANSFORMER, "num_layers", -1, "num_layers"),
        (TRANSFORMER, "cross_attention_dim", 64, "cross_attention_dim: got 64; expected 48"),
        (TRANSFORMER, "out_channels", 12, "out_channels: got 12"),
        (TRANSFORMER, "in_channels", 8, "in_channels"),
        (VAE, "latents_mean", [0.0], "vae latents_mean"),
        (VAE, "latent_channels", 16, "in_channels"),
        (TEXT, "d_model", 128, "text_encoder d_model: got 128; expected 64"),
        (TEXT, "quantization_config", {"quant_method": "bitsandbytes"}, "bitsandbytes"),
    ],
)
def test_folders_that_are_refused(folder: Path, file: str, entry: str, value: object, reason: str) -> None:
    change(folder / file, **{entry: value})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(folder)
    assert str(folder) in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("file", [SCHEDULER, TRANSFORMER, VAE, TEXT])
def test_files_that_are_missing(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert f"{folder / file}: missing" in refusal(folder)


def test_every_tensor_is_listed(folder: Path) -> None:
    """With the shapes that the modules have, and no others."""
    pipe, read = random_pixart.make().pipe, checkpoint.read(folder)
    assert read.folders == ("text_encoder", "transformer", "vae")
    for name in read.folders:
        module, config = getattr(pipe, name), read.config(name)
        listed = registry.of(read.spec).tensors(read.spec, name, type(module).__name__, config).read
        of_module = {key: tuple(tensor.shape) for key, tensor in module.named_parameters()}
        assert dict(listed) == of_module


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_tensors_that_are_lost_or_strange_are_refused(tmp_path: Path, component: str) -> None:
    lost = copied(tmp_path / "lost", random_pixart.make().folder)
    edit(lost, component, lambda tensors: tensors.pop(max(tensors)))
    assert "missing" in refusal(lost)
    strange = copied(tmp_path / "strange", random_pixart.make().folder)
    edit(strange, component, lambda tensors: tensors.update(strange=tensors[min(tensors)].clone()))
    assert "strange" in refusal(strange)


def test_a_folder_has_one_name(folder: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="no name"):
        checkpoint.read(folder, model="pixart-sigma-xl-2-1024")
    family = registry.named("pixart")
    assert [family.named(member, member.name) for member in MEMBERS] == list(MEMBERS)


def planned(fields: Mapping[str, Any], spec: PixArtSpec) -> Job:
    """With words that count a prompt's letters."""

    def tokenize(prompt: str) -> dict[str, Tokens]:
        return {"t5": Tokens(np.full(300, len(prompt)), (np.arange(300) <= len(prompt)).astype(np.int64))}

    return registry.plan({"prompt": b"a fox", **fields}, spec, tokenize)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("image", [b"x"], "nothing: custom does not take it"),
        ("strength", 0.5, "nothing: custom does not take it"),
        ("true_cfg_scale", 2.0, "nothing: custom does not take it"),
        ("guidance_scale", 0.0, "a finite number from 1 to 30"),
        ("guidance_scale", float("nan"), "a finite number from 1 to 30"),
        ("guidance_scale", 31.0, "a finite number from 1 to 30"),
        ("num_inference_steps", 101, "1 to 100"),
        ("height", 72, "a multiple of 16 from 64 to 128"),
        ("width", 256, "a multiple of 16 from 64 to 128"),
        ("prompt", b"", "1 to 4096 bytes of UTF-8 text"),
        ("negative_prompt", b"\xff", "1 to 4096 bytes of UTF-8 text"),
    ],
)
def test_requests_that_make_no_sense(spec: PixArtSpec, field: str, value: object, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        planned({field: value}, spec)
    assert (caught.value.field, caught.value.allowed) == (field, allowed)


def test_a_negative_prompt_needs_guidance(spec: PixArtSpec) -> None:
    with pytest.raises(
        InvalidRequest, match="negative_prompt: got 5 bytes; allowed: nothing beside a guidance_scale of 1"
    ):
        planned({"negative_prompt": b"a dog", "guidance_scale": 1.0}, spec)
    assert planned({"negative_prompt": b"", "guidance_scale": 1.0}, spec).arrays.keys() == {"ids", "mask"}


def test_what_a_request_says_nothing_about(spec: PixArtSpec) -> None:
    job = planned({}, spec)
    assert (job.height, job.width, job.steps, job["guidance"].tolist()) == (64, 64, 20, [4.5])
    assert (job["ids"][0], job["negative_ids"][0]) == (5, 0)
    assert (job["mask"].sum(), job["negative_mask"].sum()) == (6, 1)
    assert registry.of(spec).parameters(job, spec) == {"task": "text-to-image", "cfg_scale": "4.5"}
    alone = planned({"guidance_scale": 1.0}, spec)
    assert registry.of(spec).parameters(alone, spec) == {"task": "text-to-image"}
    assert planned({"negative_prompt": b" A Dog. "}, spec)["negative_ids"][0] == 6, "without the spaces around it"


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_jobs_that_are_sent_by_anybody(spec: PixArtSpec, scale: float) -> None:
    family, good = registry.of(spec), planned({"guidance_scale": scale}, spec)
    family.check(good, spec)
    wrong: dict[str, Job] = {
        "size": replace(good, height=72),
        "seeds": replace(good, seeds=()),
        "sigmas": replace(good, sigmas=good.sigmas * 1.01),
        "ids": replace(good, arrays={**good.arrays, "ids": good["ids"] + 10**6}),
        "mask": replace(good, arrays={**good.arrays, "mask": good["mask"] * 0}),
        "job": replace(good, arrays={**good.arrays, "image": np.zeros((64, 64, 3), np.uint8)}),
    }
    if scale > 1:
        shorter = {name: good[name][:5] for name in ("negative_ids", "negative_mask")}
        wrong |= {
            "guidance": replace(good, arrays={**good.arrays, "guidance": np.array([np.nan], np.float32)}),
            "negative_ids": replace(good, arrays={**good.arrays, **shorter}),
        }
    for name, job in wrong.items():
        with pytest.raises(InvalidRequest) as caught:
            family.check(job, spec)
        assert caught.value.field == name
