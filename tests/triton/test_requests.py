"""What a user of plain tritonclient gets, over gRPC and HTTP."""

import io
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from fluxserve import settings
from fluxserve.engines.open import open_components
from fluxserve.families import registry
from fluxserve.folders import checkpoint
from fluxserve.media import images as imaging
from fluxserve.pipeline import Pipeline
from fluxserve.supervisor import TritonServer
from fluxserve.text import Tokenizers
from tests.triton.conftest import PATIENCE, PlainClient, counters, drawn_by, plain, running, wait_for

pytestmark = pytest.mark.xdist_group("triton")


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_only_a_prompt(client: PlainClient) -> None:
    out = client.draw()
    assert {*out} == {"images", "seeds", "timings", "image_size"}
    assert out["images"].shape == out["seeds"].shape == (1,)
    assert pixels(out["images"][0]).shape == (128, 128, 3)
    assert list(out["image_size"]) == [128, 128]
    assert 0 <= out["seeds"][0] < 2**32
    timings = json.loads(out["timings"][0])
    assert {*timings} == {"queue", "encode", "denoise", "decode", "total", "image"}
    assert timings["total"] == pytest.approx(timings["encode"] + timings["denoise"] + timings["decode"], abs=0.01)
    assert timings["denoise"] > timings["encode"] > 0


def test_every_option(client: PlainClient) -> None:
    out = client.draw(
        "a small fox on a blue background",
        height=64,
        width=96,
        num_inference_steps=3,
        guidance_scale=2.0,
        seed=2**40,
        num_images=3,
        output_format="webp",
        quality=70,
    )
    assert [Image.open(io.BytesIO(i)).format for i in out["images"]] == ["WEBP"] * 3
    assert pixels(out["images"][0]).shape == (64, 96, 3)
    assert list(out["seeds"]) == [2**40, 2**40 + 1, 2**40 + 2]


def test_formats_hold_the_same_picture(client: PlainClient) -> None:
    raw, png, jpeg = (client.draw(seed=1, output_format=f)["images"][0] for f in ("raw", "png", "jpeg"))
    exact = np.frombuffer(raw, np.uint8).reshape(128, 128, 3)
    assert np.array_equal(pixels(png), exact)
    assert Image.open(io.BytesIO(jpeg)).format == "JPEG"
    assert np.abs(pixels(jpeg).astype(int) - exact).mean() < 8


def test_the_same_seed_is_the_same_picture(server: TritonServer) -> None:
    """Over both protocols, as image k of num_images, and in a batch with others."""
    grpc, http = plain(server, "grpc"), plain(server, "http")
    alone = grpc.draw(seed=42)["images"][0]
    assert http.draw(seed=42)["images"][0] == alone
    assert grpc.draw(seed=40, num_images=3)["images"][2] == alone
    assert grpc.draw(seed=43)["images"][0] != alone
    with ThreadPoolExecutor(6) as pool:
        batch = list(pool.map(lambda p: grpc.draw(p, seed=42)["images"][0], ["a red apple", "a fox"] * 3))
    assert batch[::2] == [alone] * 3
    assert alone not in batch[1::2]


def test_through_triton_as_in_process(server: TritonServer) -> None:
    """The server adds nothing to the pipeline and takes nothing from it."""
    folder = checkpoint.read(settings.load().checkpoint_path)
    pipeline = Pipeline(folder.spec, open_components("torch_eager", folder, "cpu", "float32"))
    fields = {"prompt": b"a red apple", "seed": 5}
    (drawing,) = pipeline.draw([registry.plan(fields, folder.spec, Tokenizers(folder))])
    assert drawing is not None
    theirs = pixels(plain(server, "grpc").draw(seed=5)["images"][0])
    assert np.abs(theirs.astype(int) - drawing.images[0]).max() <= 1


def test_a_negative_prompt(client: PlainClient) -> None:
    """As in this process; and not as without, with another scale, or with other words, of which there may be none."""
    fields = {"prompt": "a fox on a blue background", "seed": 7, "height": 64, "width": 96, "num_inference_steps": 3}
    guided = {"negative_prompt": "a cat", "true_cfg_scale": 4.5}
    (drawn,) = client.draw(**fields, **guided)["images"]
    assert np.abs(pixels(drawn).astype(int) - drawn_by({}, {**fields, **guided})).max() <= 1
    others = [{}, {**guided, "true_cfg_scale": 2.0}, {**guided, "negative_prompt": ""}]
    plainly, *differ = [client.draw(**fields, **other)["images"][0] for other in others]
    assert drawn not in (plainly, *differ)
    assert client.draw(**fields, **{**guided, "true_cfg_scale": 1.0})["images"][0] == plainly


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_image_to_image(client: PlainClient, file_format: str) -> None:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((200, 100)).convert("RGB").save(file, file_format)
    fields = {"image": file.getvalue(), "seed": 3}
    gentle, strong = (client.draw(strength=s, **fields) for s in (0.05, 1.0))
    assert list(gentle["image_size"]) == [96, 192], "without a size: the image's own, in multiples of 16"
    given = np.asarray(Image.open(file).convert("RGB").resize((192, 96), Image.Resampling.LANCZOS)).astype(int)
    near, far = (np.abs(pixels(o["images"][0]) - given).mean() for o in (gentle, strong))
    assert near < far
    assert list(client.draw(height=64, width=64, **fields)["image_size"]) == [64, 64]


def test_requests_of_one_shape_share_a_batch(server: TritonServer) -> None:
    client = plain(server, "grpc")

    def executions() -> tuple[int, int]:
        import tritonclient.grpc as triton

        with triton.InferenceServerClient(server.grpc_url) as c:
            stats = c.get_inference_statistics("generate").model_stats[0]
            return stats.inference_count, stats.execution_count

    before = executions()
    with ThreadPoolExecutor(9) as pool:
        list(pool.map(lambda k: client.draw(seed=k, height=64, width=64), range(9)))
    requests, batches = (a - b for a, b in zip(executions(), before, strict=True))
    assert requests == 9
    assert batches < 9


def test_urgent_requests_go_first(server: TritonServer) -> None:
    """Priorities are a request parameter of `flux` and reach the queue of `generate`. They are strict: whatever is more
    urgent goes first, though it came later; among equals, whatever came first."""
    client = plain(server, "grpc")
    finished: list[str] = []

    def draw(name: str, width: int, priority: int) -> None:
        fields = {"prompt": "a fox", "height": 64, "width": width}  # widths differ, so that they can't share a batch
        client.call("flux", fields, request_id=name, priority=priority)
        finished.append(name)

    order = (("low", 80, 3), ("middle", 96, 2), ("high", 112, 1), ("higher", 128, 1), ("late", 144, 2))
    with running(client, "ahead") as ahead, ThreadPoolExecutor(len(order)) as pool:
        waiting = []
        for name, width, priority in order:
            waiting.append(pool.submit(draw, name, width, priority))
            wait_for(lambda name=name: client.control(name, "status")[0] == "queued")
            time.sleep(0.1)  # from `prepare`, where it is counted, to the queue
        client.control("ahead", "cancel")
        ahead.result(PATIENCE)
        for each in waiting:
            each.result(PATIENCE)
    assert finished == ["high", "higher", "middle", "late", "low"]


def test_png_of_a_megapixel_is_quick_and_exact() -> None:
    """Byte-exact when decoded, and in a fifth of the time that Pillow's quickest compression takes beside it."""
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 250, (64, 64, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
    image = smooth + rng.integers(0, 6, smooth.shape, dtype=np.uint8)
    ours, pillows = [], []
    for _ in range(7):
        ours.append(seconds(lambda: imaging.write_image(image, "png", 90)))
        pillows.append(seconds(lambda: Image.fromarray(image).save(io.BytesIO(), "png", compress_level=1)))
    assert np.array_equal(pixels(imaging.write_image(image, "png", 90)), image)
    assert min(ours) < min(pillows) / 5


def seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def test_metrics(server: TritonServer) -> None:
    before = counters(server)
    client = plain(server, "grpc")
    client.draw(num_images=2, num_inference_steps=3, height=64, width=64)
    client.refused(lambda: client.draw(height=17))
    gained = {name: value - before.get(name, 0) for name, value in counters(server).items()}
    assert gained["fluxserve_images_total"] == 2
    assert gained["fluxserve_pixels_total"] == 2 * 64 * 64
    assert gained["fluxserve_steps_total"] == 6
    assert gained['fluxserve_rejected_requests_total{reason="invalid_request"}'] == 1
    for stage in ("queue", "encode", "denoise", "decode", "total"):
        assert gained[f'fluxserve_stage_seconds_count{{stage="{stage}"}}'] == 1
    assert gained['fluxserve_stage_seconds_sum{stage="denoise"}'] > 0


def test_gauges_of_requests_in_flight(server: TritonServer) -> None:
    client = plain(server, "grpc")

    def shown() -> tuple[float, float]:
        now = counters(server)
        return now["fluxserve_waiting_requests"], now["fluxserve_running_requests"]

    with running(client, "gauged") as answer:
        wait_for(lambda: shown() == (0, 1))
        client.control("gauged", "cancel")
        answer.result(PATIENCE)
    wait_for(lambda: shown() == (0, 0))
