"""Random weights, narrow: diffusers draws from a klein's folder, FLUX.1 has its words, both are like trained ones."""

import math
import re
import zlib
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from fluxserve_export.calibrate import watched
from fluxserve_export.fp8 import simulated, watched_attention
from fluxserve_export.metrics import relative_error
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import peers
from fluxserve import settings
from fluxserve.engines.torch_eager import load_module
from fluxserve.families.flux import signatures, tokens
from fluxserve.families.flux.configs import from_configs
from fluxserve.families.flux.models import FLUX1_DEV, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.families.registry import architectures
from fluxserve.folders import checkpoint
from fluxserve.sampling import schedule
from fluxserve.text import Tokenizers
from testing import published, random_weights
from testing.stand_in import QWEN_WORDS

SIZE = (64, 96)
LATENTS, TEXT = (16, 16), 32
"""A step that is looked at has latents of this size, and this number of text tokens."""


@pytest.fixture(scope="module", params=[FLUX2_KLEIN_4B, FLUX2_KLEIN_9B], ids=lambda spec: spec.name)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[FluxSpec, Path]:
    spec: FluxSpec = request.param
    return spec, random_weights.write(tmp_path_factory.mktemp("random") / "klein", spec, 1, 2, narrow=16)


def test_it_is_a_klein(folder: tuple[FluxSpec, Path]) -> None:
    spec, path = folder
    read = checkpoint.read(path)
    assert read.spec.text == spec.text and read.spec.schedule == spec.schedule
    assert (read.spec.defaults, read.spec.limits, read.spec.vae) == (spec.defaults, spec.limits, spec.vae)
    config = read.config("text_encoder")
    assert config["num_hidden_layers"] == 36, "diffusers runs all of them"
    assert config["tie_word_embeddings"] == (spec is FLUX2_KLEIN_4B)
    assert QWEN_WORDS < Tokenizers(read)("a fox")["qwen3"].ids.max() < config["vocab_size"]


@pytest.mark.parametrize(("layers", "words"), [(None, (49408, 32128)), (1, (1505, 625))])
def test_a_flux1_knows_as_many_words(tmp_path: Path, layers: int | None, words: tuple[int, int]) -> None:
    """As the published one, unless its text encoders are cut; and prompts become the same numbers as tiny's."""
    path = random_weights.write(tmp_path / "flux", FLUX1_DEV, 1, 1, text_layers=layers, narrow=16)
    read, tiny = checkpoint.read(path), checkpoint.read(settings.default_checkpoint())
    assert tuple(encoder.vocabulary for encoder in read.spec.text.encoders) == words
    assert tuple(read.config(name)["vocab_size"] for name in ("text_encoder", "text_encoder_2")) == words
    ids, known = (Tokenizers(of)("a fox") for of in (read, tiny))
    assert all(np.array_equal(ids[name].ids[:20], known[name].ids[:20]) for name in ("clip", "t5"))


@pytest.mark.parametrize("spec", [FLUX2_KLEIN_4B, FLUX2_KLEIN_9B], ids=lambda spec: spec.name)
def test_published_shapes_make_the_published_model(spec: FluxSpec) -> None:
    """Not narrowed, a folder is of the model itself: its limits, its name and with it its floor go by the shapes."""
    with init_empty_weights():
        transformer, vae = (published.module(spec, name).config for name in ("transformer", "vae_decoder"))
    named = {**transformer, "_class_name": "Flux2Transformer2DModel"}
    found = from_configs(named, vae, asdict(spec.schedule))
    assert (found.name, found.transformer, found.limits) == (spec.name, spec.transformer, spec.limits)


@pytest.mark.parametrize("reference", [None, (96, 64)])
def test_diffusers_draws_from_it(folder: tuple[FluxSpec, Path], reference: tuple[int, int] | None) -> None:
    """Through its own pipeline, from the prompt, and the picture is no flat one."""
    peer = peers.Peer(folder[1], "cpu", reference)
    drawn = peer.draw(2, SIZE, 0)
    assert drawn.picture > drawn.loop > 0 and drawn.file > 0
    image = np.asarray(peer.picture(2, SIZE, 0))
    assert image.shape == (*SIZE, 3) and image.std() > 3


# --- like trained ones ------------------------------------------------------------------------------------------------

BEHIND_HIDDEN = r".*(net\.2|linear_out)|single_.*(\.proj_out|attn\.to_out)"


@dataclass
class Seen:
    """What one step shows, by block or linear.

    values: v [heads, tokens, channels]. scores: their spread over keys [heads]. stream: text and picture in front of a
    block. hidden: what a linear behind a hidden layer reads.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    stream: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    hidden: dict[str, Tensor] = field(default_factory=dict)
    velocity: Tensor = field(default_factory=lambda: torch.empty(0))

    def attend(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
        block = name.removesuffix(".attn")
        self.values[block] = v[0]
        self.scores[block] = (q[0] @ k[0].mT / math.sqrt(q.shape[-1])).std(dim=-1).mean(dim=-1)

    def read(self, name: str, x: Tensor, hidden: int) -> None:
        self.hidden[name] = x[0, :, -hidden:]

    def enter(self, name: str, given: dict[str, Tensor]) -> None:
        picture, text = given["hidden_states"][0], given.get("encoder_hidden_states")
        self.stream[name] = (picture[:TEXT], picture[TEXT:]) if text is None else (text[0], picture)


class Likeness:
    """A narrow model as deep as the published one, and what its first step shows."""

    def __init__(self, folder: Path, spec: FluxSpec) -> None:
        folder = random_weights.write(folder / spec.name, spec, text_layers=1, narrow=16)
        self.spec = checkpoint.read(folder, weights=False).spec
        self.module = load_module(checkpoint.read(folder, weights=False), "transformer", "cpu", torch.float32)
        self.run = architectures(self.spec)["transformer"].wrapper(self.module)
        self.width, self.hidden = self.spec.transformer.hidden_size, self.spec.transformer.mlp_width
        self.first = self.see(self.inputs())

    def inputs(self, noise: float = 1.0, prompt: int = 0) -> dict[str, Tensor]:
        shape, axes = self.spec.transformer, len(self.spec.transformer.axes_dims_rope)
        image, text = tokens.image_ids(*LATENTS, axes), tokens.text_ids(TEXT, axes)
        picture, words = (torch.Generator().manual_seed(seed) for seed in (100, prompt))
        given = {
            "hidden_states": torch.randn(1, len(image), shape.in_channels, generator=picture),
            "encoder_hidden_states": torch.randn(1, TEXT, shape.joint_attention_dim, generator=words),
            "pooled_projections": torch.randn(1, shape.pooled_projection_dim or 0, generator=words),
            "timestep": torch.tensor([noise]),
            "guidance": torch.tensor([4.0]),
            "img_ids": torch.from_numpy(image),
            "txt_ids": torch.from_numpy(text),
        }
        return {tensor.name: given[tensor.name] for tensor in signatures.transformer(self.spec).inputs}

    def modules(self, pattern: str) -> dict[str, nn.Module]:
        return {name: module for name, module in self.module.named_modules() if re.fullmatch(pattern, name)}

    @torch.inference_mode()
    def see(self, inputs: dict[str, Tensor]) -> Seen:
        seen = Seen()
        with ExitStack() as stack:
            for name, linear in self.modules(BEHIND_HIDDEN).items():
                hook = linear.register_forward_pre_hook(lambda _, x, n=name: seen.read(n, x[0], self.hidden))
                stack.callback(hook.remove)
            for name, block in self.modules(r"(single_)?transformer_blocks\.\d+").items():
                entered = block.register_forward_pre_hook(lambda *x, n=name: seen.enter(n, x[-1]), with_kwargs=True)
                stack.callback(entered.remove)
            stack.enter_context(watched_attention("transformer", self.module, seen.attend))
            seen.velocity = self.run(**inputs)
        return seen


@pytest.fixture(scope="module", params=[FLUX1_DEV, FLUX2_KLEIN_4B], ids=lambda spec: spec.name)
def like(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Likeness:
    return Likeness(tmp_path_factory.mktemp("like"), request.param)


def _rms(x: Tensor, dim: int) -> Tensor:
    return x.square().mean(dim=dim).sqrt()


def _moved(before: Seen, after: Seen) -> list[float]:
    """Return how far the mean of v moves in each block, as a share of itself."""
    means = [[v.mean(dim=1) for v in seen.values.values()] for seen in (before, after)]
    return [relative_error(there, here) for here, there in zip(*means, strict=True)]


def test_values_have_means(like: Likeness) -> None:
    """They differ by block, head and channel, and between text and picture."""
    shares = []
    for v in like.first.values.values():
        ratio = v.mean(dim=1) / v.std(dim=1)
        assert ratio.abs().std() > 0.15, "over channels"
        shares += _rms(ratio, -1).tolist()
        text, picture = v[:, :TEXT].mean(dim=1), v[:, TEXT:].mean(dim=1)
        assert relative_error(text, picture) > 0.3
    assert min(shares) > 0.3 and max(shares) < 1.1
    assert max(shares) > 1.5 * min(shares)


def test_means_of_values_drift(like: Likeness) -> None:
    """The noise level moves them between a trajectory's ends, and the prompt moves them."""
    tokens, steps = math.prod(LATENTS) // 4, like.spec.defaults.num_inference_steps
    last_noise = float(schedule.sigmas(steps, tokens, like.spec.schedule)[-2])
    last = _moved(like.first, like.see(like.inputs(noise=last_noise)))
    other = _moved(like.first, like.see(like.inputs(prompt=1)))
    assert 0.1 < np.median(last) < 0.4 and min(last) > 0.03 and max(last) < 0.5
    assert 0.1 < np.median(other) < 0.5 and min(other) > 0.05 and max(other) < 0.6


def test_hidden_layers_have_outliers(like: Likeness) -> None:
    """Few features are far above the others for every token, and the weights behind them are small."""
    for name, hidden in like.first.hidden.items():
        size = _rms(hidden, 0)
        outliers = size > 20 * size.median()
        writes = like.spec.transformer.generation == 2 and name.startswith("transformer_blocks.0.ff")
        assert 1 <= outliers.sum() <= (8 if writes else 1), name
        ratio = size[outliers] / _rms(hidden[:, ~outliers].flatten(), 0)
        assert ratio.min() > 35 and ratio.max() < 120, name
        assert (hidden[:, outliers].sign() == hidden[:1, outliers].sign()).all()
        behind = like.module.get_submodule(name).get_parameter("weight")[:, -like.hidden :]
        if writes:  # a massive channel, whose row is another
            behind = behind[behind[:, outliers].abs().amax(dim=1).argsort()[:-1]]
        columns = _rms(behind, 0)
        assert columns[outliers].max() < 0.1 * columns.median()
        assert 0.1 < _rms((hidden @ behind.T).flatten(), 0) < 2.0, "as usual"


def test_scores_are_peaked(like: Likeness) -> None:
    """Weights of q's and k's norms see to it, and differ by block and channel."""
    spreads = torch.cat(list(like.first.scores.values()))
    assert spreads.min() > 1.0 and spreads.max() < 4.0
    assert spreads.max() > 1.7 * spreads.min()
    norms = [p for name, p in like.module.named_parameters() if re.search(r"attn\.norm_(added_)?[qk]\.weight", name)]
    assert all(0.15 < weight.log().std() < 0.5 for weight in norms)


def test_stream_has_massive_channels(like: Likeness) -> None:
    """They are the same with one sign from the first block on, which in FLUX.2 writes them."""
    written = 1 if like.spec.transformer.generation == 2 else 0
    found = set()
    for text_and_picture in list(like.first.stream.values())[written:]:
        for rows in text_and_picture:
            size = _rms(rows, 0)
            massive = size > 10 * size.median()
            assert massive.sum() == max(1, like.width // 1024)
            ratio = size[massive] / _rms(rows[:, ~massive].flatten(), 0)
            assert ratio.min() > 30 and ratio.max() < 100
            assert (rows[:, massive].sign() == rows[:1, massive].sign()).all()
            found.add(tuple(massive.nonzero().flatten().tolist()))
    assert len(found) == 1


def test_rounding_does_not_grow(like: Likeness) -> None:
    """FP8 loses a few percent behind all layers."""
    inputs = like.inputs()
    with torch.inference_mode():
        with watched("transformer", like.module) as seen:
            like.run(**inputs)
        with simulated("transformer", like.module, seen.ranges("max"), centred=True):
            got = like.run(**inputs)
    assert 0.03 < relative_error(got, like.first.velocity) < 0.12


@pytest.mark.parametrize("spec", [FLUX1_DEV, FLUX2_KLEIN_9B], ids=lambda spec: spec.name)
def test_the_same_arguments_give_the_same_bytes(tmp_path: Path, spec: FluxSpec) -> None:
    """And plain ones differ in the transformer alone."""
    once, again, plain = (
        random_weights.write(tmp_path / name, spec, 1, 1, text_layers=1, narrow=8, trained=name != "plain")
        for name in ("once", "again", "plain")
    )
    for file in sorted(file.relative_to(once) for file in once.rglob("*.safetensors")):
        assert (once / file).read_bytes() == (again / file).read_bytes()
        same = (once / file).read_bytes() == (plain / file).read_bytes()
        assert same == (file.parent.name != "transformer")


@pytest.mark.parametrize("spec", [FLUX1_DEV, FLUX2_KLEIN_4B], ids=lambda spec: spec.name)
def test_plain_weights_are_merely_random(tmp_path: Path, spec: FluxSpec) -> None:
    """They are bit by bit one tile's numbers, as wide as keeps a layer's output."""
    folder = random_weights.write(tmp_path / "plain", spec, 1, 2, text_layers=1, narrow=16, trained=False)
    tile = torch.randn(2**22 - 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, weight in load_file(folder / "transformer/diffusion_pytorch_model.safetensors").items():
        if weight.ndim == 1:
            expected = torch.full_like(weight, 0.0 if name.endswith("bias") else 1.0)
        else:
            steers = re.fullmatch(r"time_text_embed\.(timestep|guidance)_embedder\.linear_2\.weight", name)
            shifted = tile.roll(zlib.crc32(name.encode()) % len(tile))[: weight.numel()]
            expected = shifted.view(weight.shape) * float((0.1 if steers else 1.0) * weight.shape[1] ** -0.5)
        assert torch.equal(weight, expected), name
