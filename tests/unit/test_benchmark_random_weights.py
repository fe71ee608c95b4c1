"""Random weights of few blocks, narrow: of a klein, that diffusers draws from the folder; of a FLUX.1, its words."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from accelerate import init_empty_weights

from benchmarks import peers, published, random_weights
from benchmarks.stand_in import QWEN_WORDS
from fluxserve import checkpoint, settings
from fluxserve import spec as specs
from fluxserve.spec import FLUX1_DEV, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B, ModelSpec
from fluxserve.text import Tokenizers

SIZE = (64, 96)


@pytest.fixture(scope="module", params=[FLUX2_KLEIN_4B, FLUX2_KLEIN_9B], ids=lambda spec: spec.name)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, Path]:
    spec: ModelSpec = request.param
    return spec, random_weights.write(tmp_path_factory.mktemp("random") / "klein", spec, 1, 2, narrow=16)


def test_it_is_a_klein(folder: tuple[ModelSpec, Path]) -> None:
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
def test_published_shapes_make_the_published_model(spec: ModelSpec) -> None:
    """Not narrowed, a folder is of the model itself: its limits, its name and with it its floor go by the shapes."""
    with init_empty_weights():
        transformer, vae = (published.module(spec, name).config for name in ("transformer", "vae_decoder"))
    named = {**transformer, "_class_name": "Flux2Transformer2DModel"}
    found = specs.from_configs(named, vae, asdict(spec.schedule))
    assert (found.name, found.transformer, found.limits) == (spec.name, spec.transformer, spec.limits)


@pytest.mark.parametrize("reference", [None, (96, 64)])
def test_diffusers_draws_from_it(folder: tuple[ModelSpec, Path], reference: tuple[int, int] | None) -> None:
    """Through its own pipeline, from the prompt, and the picture is no flat one."""
    peer = peers.Peer(folder[1], "cpu", reference)
    drawn = peer.draw(2, SIZE, 0)
    assert drawn.picture > drawn.loop > 0 and drawn.file > 0
    image = np.asarray(peer.picture(2, SIZE, 0))
    assert image.shape == (*SIZE, 3) and image.std() > 3
