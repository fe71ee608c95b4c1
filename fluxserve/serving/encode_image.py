"""The `encode_image` model: pixels → PNG, JPEG, WebP or raw bytes. CPU, n instances, beside the GPU's next request."""

import json
import time
from collections.abc import Sequence
from typing import Any

from fluxserve import contract
from fluxserve.imaging import write_image
from fluxserve.serving import errors as triton_errors
from fluxserve.serving import tensors
from fluxserve.serving.lifecycle import ServedModel


class EncodeImageModel(ServedModel):
    """What Triton calls."""

    name = "encode_image"

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [_answer(r) for r in requests]


def _answer(request: Any) -> Any:
    try:
        return _encode(request)
    except Exception as error:  # noqa: BLE001 (the border: one request's error must not take its neighbours along)
        return triton_errors.response(error)


def _encode(request: Any) -> Any:
    arrays = tensors.read(request, contract.ENCODE_IMAGE)
    images = arrays["pixels_out"][0]  # [num_images, height, width, 3]
    output_format = arrays["resolved_format"][0].decode()
    begin = time.perf_counter()
    files = [write_image(image, output_format, int(arrays["resolved_quality"][0])) for image in images]
    timings = json.loads(arrays["stage_timings"][0, 0])
    timings["image"] = 1000 * (time.perf_counter() - begin)
    return tensors.response(
        contract.ENCODE_IMAGE,
        {
            "images": files,
            "seeds": arrays["noise_seeds"][0],
            "timings": [json.dumps({stage: round(spent, 3) for stage, spent in timings.items()}).encode()],
            "image_size": images.shape[1:3],
        },
    )
