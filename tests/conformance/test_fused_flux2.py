"""FLUX.2 whole in the fused engine: plainly in float32 against diffusers; in BF16 and FP8, on a GPU with kernels."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from fluxserve_export.calibrate import watched

from fluxserve.engine import Components
from fluxserve.engines.fused.build import BF16, FP8, Precision
from fluxserve.engines.fused.open import assemble
from fluxserve.engines.open import open_components
from fluxserve.engines.torch_eager import TorchEngine, load_module
from fluxserve.families.flux import signatures
from fluxserve.families.registry import architectures
from fluxserve.folders.artifact import Ranges
from fluxserve.job import Job
from fluxserve.kernels.operations import PLAIN
from fluxserve.pipeline import Pipeline
from tests.conformance.test_flux2 import BASE, PROMPT, job_of, their_run
from tests.conformance.test_gpu import psnr
from tests.support import parity, random_flux2
from tests.support.fused import KERNELS
from tests.support.random_flux2 import TOKENS, RandomFlux2
from tests.support.waiting import loop_never_waits

GPU = torch.cuda.is_available()
CPU, DEVICE = torch.device("cpu"), torch.device("cuda:0" if GPU else "cpu")
EXACT = Precision(torch.float32, torch.float32)

pytestmark = pytest.mark.xdist_group("klein")


def opened(flux: RandomFlux2, tokens: int = TOKENS, max_rows: int = 1) -> Pipeline:
    folder = flux.checkpoint(tokens)
    return Pipeline(folder.spec, assemble(folder, CPU, EXACT, None, PLAIN), max_rows=max_rows)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prompt", [PROMPT, "a", "a fox " * 60, "a<|endoftext|>fox<|im_end|>\n<think>"])
def test_text_to_image(tied: bool, prompt: str) -> None:
    klein = random_flux2.klein(tied)
    job = job_of(klein, (64, 96), 4, [7, 8], prompt)
    parity.agree(opened(klein), job, *their_run(klein, job, 4, prompt))


@pytest.mark.parametrize(
    ("size", "steps", "seeds"),
    [((64, 64), 1, [0]), ((96, 80), 5, [1, 2, 3]), ((80, 64), 8, [11]), ((256, 256), 2, [3])],
)
def test_sizes_and_steps(size: tuple[int, int], steps: int, seeds: Sequence[int]) -> None:
    klein = random_flux2.klein()
    job = job_of(klein, size, steps, seeds)
    parity.agree(opened(klein, max_rows=2), job, *their_run(klein, job, steps))


@pytest.mark.parametrize(("size", "steps", "guidance", "seeds", "negative", "sizes"), BASE)
def test_base(
    size: tuple[int, int],
    steps: int,
    guidance: float | None,
    seeds: list[int],
    negative: str,
    sizes: list[tuple[int, int]],
) -> None:
    """FLUX.2-klein Base, whose two passes are rows that take turns."""
    base, images = random_flux2.klein(distilled=False), random_flux2.pictures(*sizes)
    more = ({"guidance_scale": guidance} if guidance else {}) | (
        {"negative_prompt": negative.encode()} if negative else {}
    )
    job = job_of(base, size, steps, seeds, images=images, **more)
    parity.agree(opened(base), job, *their_run(base, job, steps, images=images, negative=negative))


def test_at_its_full_length_of_text() -> None:
    klein = random_flux2.klein()
    job = job_of(klein, tokens=512)
    parity.agree(opened(klein, 512), job, *their_run(klein, job, 4, tokens=512))


@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("sizes", [[(64, 80)], [(64, 96), (80, 96), (96, 64)]])
def test_editing(sizes: Sequence[tuple[int, int]], head_dim: int) -> None:
    klein, images = random_flux2.klein(head_dim=head_dim), random_flux2.pictures(*sizes)
    job = job_of(klein, (80, 64), 4, [5], images=images)
    parity.agree(opened(klein), job, *their_run(klein, job, 4, images=images, size=(80, 64)))


def test_its_arena_holds_the_largest_picture_with_all_references() -> None:
    folder = random_flux2.klein().checkpoint()
    signature = assemble(folder, CPU, EXACT, None, PLAIN).network.signature
    limits = folder.spec.limits
    assert signature.most("image_tokens") == (limits.max_pixels + 4 * limits.max_reference_pixels) // 16**2


# --- as it is served --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide() -> RandomFlux2:
    """Heads as large as the kernels want them."""
    return random_flux2.klein(head_dim=128)


@pytest.fixture(scope="module")
def jobs(wide: RandomFlux2) -> list[Job]:
    """Words alone; and two references."""
    images = random_flux2.pictures((64, 96), (80, 64))
    return [job_of(wide, (80, 64), 4, [3]), job_of(wide, (80, 64), 4, [5], images=images)]


@pytest.fixture(scope="module")
def reference(wide: RandomFlux2, jobs: list[Job]) -> tuple[list[np.ndarray], Ranges]:
    """What torch_eager draws in float32, and what it is quantised with."""
    folder = wide.checkpoint()
    module = load_module(folder, "transformer", "cpu", torch.float32)
    transformer = TorchEngine(
        signatures.transformer(folder.spec), architectures(folder.spec)["transformer"].wrapper(module)
    )
    components = open_components("torch_eager", folder, "cpu", "float32").replacing(transformer=transformer)
    with watched("transformer", module) as seen:
        drawn = [one(Pipeline(folder.spec, components), job) for job in jobs]
    return drawn, seen.ranges("max")


def one(pipeline: Pipeline, job: Job) -> np.ndarray:
    (drawing,) = pipeline.draw([job])
    assert drawing is not None
    return drawing.images


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def served(request: pytest.FixtureRequest, wide: RandomFlux2, reference: tuple[list[np.ndarray], Ranges]) -> Pipeline:
    folder, quantised = wide.checkpoint(), request.param == "fp8"
    ranges = reference[1] if quantised else None
    components: Components = assemble(folder, DEVICE, FP8 if quantised else BF16, ranges, KERNELS)
    return Pipeline(folder.spec, components, str(DEVICE))


def test_it_draws_the_same_pictures(
    served: Pipeline, jobs: list[Job], reference: tuple[list[np.ndarray], Ranges]
) -> None:
    for job, expected in zip(jobs, reference[0], strict=True):
        other = next(picture for picture in reference[0] if picture is not expected)
        close = psnr(one(served, job), expected)
        assert close > 25 and close > psnr(other, expected) + 10


def test_the_same_bytes_run_to_run_and_in_a_batch(served: Pipeline, wide: RandomFlux2, jobs: list[Job]) -> None:
    """Replayed from a graph too, and with pictures of other shapes in between."""
    job, other = jobs[1], jobs[0]
    first = one(served, job)
    for _ in range(3):
        one(served, other)
        assert np.array_equal(one(served, job), first)
    beside = replace(job, seeds=(9,))
    together = [drawing.images for drawing in served.draw([beside, job]) if drawing is not None]
    assert np.array_equal(together[1], first)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_the_loop_does_not_wait_for_the_device(served: Pipeline, jobs: list[Job]) -> None:
    """With references or without."""
    for job in jobs:
        one(served, job)
        loop_never_waits(served, job)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_it_warms_up(served: Pipeline) -> None:
    served.warm_up()
