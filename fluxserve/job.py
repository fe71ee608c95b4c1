"""What `prepare` hands to `generate`: one request as named arrays, in a form that crosses between processes.

A job knows no model. What every family has are its fields; the rest is in `arrays`, which only its family reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fluxserve.errors import InvalidRequest

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

_SIZE, _SEEDS, _SIGMAS = "size", "seeds", "sigmas"
_OWN = "own."
"""What the names of a family's arrays begin with on the wire."""
_ALLOWED = "the arrays of one request, as `prepare` sends them"


@dataclass(frozen=True)
class Job:
    """One request, laid out for the device.

    Attributes:
        height, width: of the pictures, in pixels.
        seeds: one for each picture.
        sigmas: noise levels, float32 [steps + 1], falling to 0.
        arrays: what the family needs beside, by name.
    """

    height: int
    width: int
    seeds: tuple[int, ...]
    sigmas: npt.NDArray[np.float32]
    arrays: Arrays = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    def get(self, name: str) -> Array | None:
        return self.arrays.get(name)

    def count(self, name: str) -> int:
        """Return how many arrays are called name.SOMETHING."""
        return sum(other.rpartition(".")[0] == name for other in self.arrays)

    def numbered(self, name: str) -> tuple[Array, ...]:
        """Return the arrays called name.0, name.1 and so on."""
        return tuple(self.arrays[f"{name}.{index}"] for index in range(self.count(name)))

    @property
    def batch_key(self) -> tuple[int, int, int]:
        """What two jobs must share, beside the length of their wire form, to be batched by Triton."""
        return self.height, self.width, self.steps

    @property
    def likeness(self) -> tuple[object, ...]:
        """What two jobs must share to go through the loop together."""
        own = sorted((name, array.dtype.str, array.shape) for name, array in self.arrays.items())
        return self.height, self.width, self.sigmas.tobytes(), *own

    def dump(self, **beside: int) -> bytes:
        """Return the wire form: safetensors, whose length follows from the names, dtypes and shapes of all arrays.

        Args:
            beside: numbers that travel with the job.
        """
        common = {
            _SIZE: np.array([self.height, self.width], dtype=np.int32),
            _SEEDS: np.array(self.seeds, dtype=np.int64),
            _SIGMAS: np.asarray(self.sigmas, dtype=np.float32),
        }
        numbers = {name: np.array([value], dtype=np.int64) for name, value in beside.items()}
        own = {_OWN + name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        return bytes(save({**common, **numbers, **own}))


def parse(wire: bytes, beside: tuple[str, ...]) -> tuple[Job, dict[str, int]]:
    """Return a job, and the numbers that travelled with it.

    Raises:
        InvalidRequest: not the wire form of a job with these numbers.
    """
    try:
        arrays = load(wire)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest("job", f"{len(wire)} bytes ({error})", _ALLOWED) from error
    own = {name.removeprefix(_OWN): arrays.pop(name) for name in list(arrays) if name.startswith(_OWN)}
    expected = {_SIZE: (np.int32, 2), _SEEDS: (np.int64, None), _SIGMAS: (np.float32, None)}
    expected |= dict.fromkeys(beside, (np.int64, 1))
    if set(arrays) != set(expected):
        raise InvalidRequest("job", f"arrays {sorted(arrays)}", f"{sorted(expected)}, and those of the model's family")
    for name, (dtype, length) in expected.items():
        got = arrays[name]
        if got.dtype != dtype or got.ndim != 1 or length not in (None, len(got)):
            raise InvalidRequest(
                f"job: {name}", f"{got.dtype} {list(got.shape)}", f"{np.dtype(dtype)} [{length or 'n'}]"
            )
    height, width = (int(side) for side in arrays[_SIZE])
    seeds = tuple(int(seed) for seed in arrays[_SEEDS])
    return Job(height, width, seeds, arrays[_SIGMAS], own), {name: int(arrays[name][0]) for name in beside}
