"""The shipped model draws what it is asked to: a sample, on the CPU, of ``benchmarks/quality.py``.

24 pictures a set and 8 steps keep it short; on 200 a set, 8 steps score as 20 do. The bars are the project's own.
A model that is right 97% of the time passes each of them with a probability over 99%; one that is right half of the
time passes with one under 2% (binomial, 24 draws).
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from benchmarks.quality import BARS, FIRST_SEED, PROMPT_SEED, Generate, fluxserve_generator
from testing.judge import Verdict, background_colours, judge, load_judge, name_objects
from training.evaluate import ask_for
from training.grammar import COLOURS, held_out_pairs, training_pairs

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "tiny"
COUNT, STEPS, GUIDANCE = 24, 8, 3.0

pytestmark = pytest.mark.xdist_group("quality")


@pytest.fixture(scope="module")
def generate() -> Generate:
    return fluxserve_generator({"checkpoint": str(CHECKPOINT), "dtype": "float32"}, "cpu", batch=12)


@pytest.fixture(scope="module")
def drawn(generate: Generate) -> dict[str, tuple[Tensor, list[tuple[int, int]]]]:
    seeds = list(range(FIRST_SEED, FIRST_SEED + COUNT))
    sets = {which: ask_for(which, COUNT, PROMPT_SEED) for which in BARS}
    return {which: (generate(prompts, seeds, STEPS, GUIDANCE), pairs) for which, (prompts, pairs) in sets.items()}


def verdict(images: Tensor, pairs: list[tuple[int, int]]) -> Verdict:
    return judge(load_judge(), images, pairs)


@pytest.mark.parametrize("which", BARS)
def test_it_draws_what_it_is_asked_to(which: str, drawn: dict) -> None:
    found = verdict(*drawn[which])
    object_bar, colour_bar = BARS[which]
    assert found.object_accuracy >= object_bar
    assert found.colour_accuracy >= colour_bar


def test_held_out_pairs_were_never_drawn_for_training() -> None:
    assert set(ask_for("held_out", 200, PROMPT_SEED)[1]) <= held_out_pairs()
    assert not set(ask_for("seen", 200, PROMPT_SEED)[1]) & held_out_pairs()
    assert not set(training_pairs()) & held_out_pairs()


def test_the_judge_finds_the_wrong_prompts_wrong(drawn: dict) -> None:
    images, pairs = drawn["seen"]
    found = verdict(images, pairs[1:] + pairs[:1])
    assert found.object_accuracy <= 0.1
    assert found.colour_accuracy <= 0.4  # two neighbours may well share one of twelve colours


def test_the_judge_sees_nothing_in_noise() -> None:
    noise = torch.randint(256, (48, 128, 128, 3), generator=torch.Generator().manual_seed(0)).byte()
    assert verdict(noise, training_pairs()[::94][:48]).object_accuracy <= 0.1
    assert len(name_objects(load_judge(), noise).unique()) < 12  # it has no opinion, always the same few


def test_the_judge_names_the_palette() -> None:
    flat = torch.tensor(list(COLOURS.values())).byte()[:, None, None, :].expand(-1, 128, 128, -1)
    assert background_colours(flat).tolist() == list(range(len(COLOURS)))


def test_guidance_has_an_effect(generate: Generate) -> None:
    prompts, seeds = ["a fox on a blue background", "an owl on a purple background"], [1, 2]
    weak, strong = (generate(prompts, seeds, 4, guidance).float() for guidance in (1.0, 5.0))
    assert (weak - strong).abs().mean() > 1.0  # of 255; the same guidance twice differs by nothing


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_diffusers_loads_it_as_it_is(dtype: torch.dtype | None) -> None:
    options = {"dtype": dtype} if dtype else {}
    pipeline = FluxPipeline.from_pretrained(CHECKPOINT, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a fox", height=64, width=96, num_inference_steps=1, output_type="np").images[0]  # 512 T5 tokens
    assert picture.shape == (64, 96, 3)
    assert 0 <= picture.min() < picture.max() <= 1


def test_all_weights_fit_in_20_megabytes() -> None:
    sizes = [path.stat().st_size for path in CHECKPOINT.rglob("*.safetensors")]
    assert len(sizes) == 4
    assert sum(sizes) <= 20_000_000
    assert not [p for p in CHECKPOINT.rglob("*") if p.suffix in {".bin", ".pt", ".pkl", ".ckpt", ".model"}]


def test_the_architecture_is_flux_1() -> None:
    config = json.loads((CHECKPOINT / "transformer" / "config.json").read_text())
    assert config["attention_head_dim"] == 128
    assert config["num_attention_heads"] == 2
    assert config["axes_dims_rope"] == [16, 56, 56]
    assert config["guidance_embeds"] is True
    vae = json.loads((CHECKPOINT / "vae" / "config.json").read_text())
    assert vae["latent_channels"] == 16
    assert len(vae["block_out_channels"]) == 4


def test_the_tokenizers_read_any_text() -> None:
    from transformers import AutoTokenizer

    t5 = AutoTokenizer.from_pretrained(CHECKPOINT / "tokenizer_2")
    clip = AutoTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    assert t5("A Fox").input_ids == t5("a  fox ").input_ids
    assert len(t5("a fox on a blue background").input_ids) == 7
    for text in ("", "🦊", "日本の狐", "Füchse\x00\n\t", "x" * 500):
        assert t5(text).input_ids[-1] == t5.eos_token_id
        ids = clip(text).input_ids
        assert ids.count(clip.eos_token_id) == 1  # CLIP pools at the first one
        assert ids[-1] == clip.eos_token_id
