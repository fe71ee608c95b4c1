"""One picture over gRPC with plain tritonclient: `python plain_grpc.py "a red apple" apple.png`."""

import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton


def tensor(name: str, dtype: str, value: npt.NDArray[Any]) -> triton.InferInput:
    """One input; `flux` has no batch dimension, so one value has the shape [1]."""
    return triton.InferInput(name, value.shape, dtype).set_data_from_numpy(value)


def main(prompt: str = "a fox on a blue background", path: str = "fox.png") -> None:
    """Draw `prompt` into the file `path`."""
    with triton.InferenceServerClient("localhost:8001") as client:
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
            client_timeout=300,
        )
    Path(path).write_bytes(answer.as_numpy("images")[0])
    height, width = answer.as_numpy("image_size")
    print(f"{path}: {width} × {height}, seed {answer.as_numpy('seeds')[0]}")
    print(answer.as_numpy("timings")[0].decode())  # milliseconds by stage


if __name__ == "__main__":
    main(*sys.argv[1:])
