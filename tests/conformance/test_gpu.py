"""What only a GPU can show. Run on one with `pytest -m gpu`; elsewhere each test skips and says why."""

import numpy as np
import pytest
import torch

from fluxserve import settings
from fluxserve.device import DeviceClock, Pacer
from fluxserve.engines.open import open_components
from fluxserve.families import registry
from fluxserve.folders import checkpoint
from fluxserve.job import Job
from fluxserve.pipeline import Pipeline
from fluxserve.text import Tokenizers
from tests.support.waiting import loop_never_waits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.xdist_group("gpu"),
]


def pipeline_of(device: str, dtype: str, max_rows: int = 1, engine: str = "torch_eager") -> Pipeline:
    folder = checkpoint.read(settings.default_checkpoint())
    return Pipeline(folder.spec, open_components(engine, folder, device, dtype), device, max_rows)


@pytest.fixture(params=["torch_eager", "fused"])
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "fused" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the fused engine's kernels are for Hopper")
    return str(request.param)


def job_of(pipeline: Pipeline, **fields: object) -> Job:
    folder = checkpoint.read(settings.default_checkpoint())
    fields = {"prompt": b"a fox on a blue background", "seed": 3, **fields}
    return registry.plan(fields, pipeline.spec, Tokenizers(folder))


def draw(pipeline: Pipeline, *jobs: Job) -> list[np.ndarray]:
    return [d.images for d in pipeline.draw(jobs) if d is not None]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.maximum(np.mean((a.astype(float) - b) ** 2), 1e-9)))


def test_float32_draws_what_the_cpu_draws() -> None:
    """The noise is the CPU's on either device, so only rounding differs."""
    cpu, gpu = pipeline_of("cpu", "float32"), pipeline_of("cuda:0", "float32")
    (a,), (b,) = draw(cpu, job_of(cpu)), draw(gpu, job_of(gpu))
    assert psnr(a, b) > 45


def test_bfloat16_draws_the_same_picture(engine: str) -> None:
    full, half = pipeline_of("cuda:0", "float32"), pipeline_of("cuda:0", "bfloat16", engine=engine)
    (a,), (b,), (other,) = draw(full, job_of(full)), draw(half, job_of(half)), draw(full, job_of(full, seed=4))
    assert psnr(a, b) > max(28, psnr(a, other) + 6), "the worst of 200 is 28.2; another seed's median is 20.3"


def test_the_same_bytes_run_to_run_and_in_a_batch(engine: str) -> None:
    pipeline = pipeline_of("cuda:0", "bfloat16", engine=engine)
    job, other = job_of(pipeline), job_of(pipeline, prompt=b"a red apple", seed=9)
    (alone,), (again,) = draw(pipeline, job), draw(pipeline, job)
    _, batched = draw(pipeline, other, job)
    assert np.array_equal(alone, again)
    assert np.array_equal(alone, batched)


def test_the_host_runs_at_most_two_steps_ahead() -> None:
    device = torch.device("cuda:0")
    pacer, done = Pacer(device), []
    for step in range(8):
        torch.cuda._sleep(20_000_000)  # about 10 ms of the GPU's time
        event = torch.cuda.Event()
        event.record()
        done.append(event)
        pacer.step()
        pending = sum(not e.query() for e in done)
        assert pending <= 2, f"after step {step}"
    assert pending > 0, "it waited for the device to be idle"


def test_pictures_come_into_pinned_memory() -> None:
    cpu, gpu = pipeline_of("cpu", "float32"), pipeline_of("cuda:0", "float32")
    for job in (job_of(cpu), job_of(cpu)):
        (expected,), (image,) = draw(cpu, job), draw(gpu, job)
        assert torch.from_numpy(image).is_pinned()
        assert psnr(expected, image) > 45


def test_times_are_the_devices() -> None:
    clock = DeviceClock(torch.device("cuda:0"))
    with clock.stage("sleep"):
        torch.cuda._sleep(100_000_000)
    spent = clock.milliseconds()["sleep"]
    assert 20 < spent < 500, "the launch alone takes microseconds"


def test_the_loop_does_not_wait_for_the_device(engine: str) -> None:
    pipeline = pipeline_of("cuda:0", "bfloat16", engine=engine)
    job = job_of(pipeline)
    draw(pipeline, job)  # allocations and kernels are loaded
    loop_never_waits(pipeline, job)
