"""One picture over HTTP with plain tritonclient: `python plain_http.py "a red apple" apple.png`."""

import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.http as triton


def tensor(name: str, dtype: str, value: npt.NDArray[Any]) -> triton.InferInput:
    """One input; `flux` has no batch dimension, so one value has the shape [1]."""
    return triton.InferInput(name, list(value.shape), dtype).set_data_from_numpy(value)


def main(prompt: str = "a fox on a blue background", path: str = "fox.png") -> None:
    """Draw `prompt` into the file `path`."""
    # network_timeout is 60 s by default, which a large picture may need; hanging up does not stop the server,
    # so whoever gives up early should send a `cancel` to `control`, as fluxserve_client does
    with triton.InferenceServerClient("localhost:8000", network_timeout=300) as client:
        answer = client.infer(
            "flux",
            [
                # dtype object: numpy's own bytes dtype would drop trailing zeros
                tensor("prompt", "BYTES", np.array([prompt.encode()], dtype=np.object_)),
                tensor("num_inference_steps", "INT32", np.array([20], dtype=np.int32)),
                tensor("seed", "INT64", np.array([7], dtype=np.int64)),
                # everything but `prompt` may be left out: height, width, guidance_scale, num_images, …
            ],
            request_id=uuid.uuid4().hex,  # what `control` takes to tell the progress or to cancel
        )
    Path(path).write_bytes(answer.as_numpy("images")[0])
    height, width = answer.as_numpy("image_size")
    print(f"{path}: {width} × {height}, seed {answer.as_numpy('seeds')[0]}")
    print(answer.as_numpy("timings")[0].decode())  # milliseconds by stage


if __name__ == "__main__":
    main(*sys.argv[1:])
