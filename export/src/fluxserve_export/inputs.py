"""Inputs of the transformer that calibration met, kept so that its blocks can be measured on them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Inputs = Mapping[str, Tensor]
"""A batch of the transformer's inputs, by the signature's names."""


def calls_to_keep(steps: int, edits: bool) -> tuple[int, ...]:
    """The calls of the transformer, while pictures of `steps` steps are drawn, whose inputs blocks are measured on: the
    first, middle and last step of the first picture, and of the edit that follows each picture where there are
    edits."""
    first = {0, steps // 2, steps - 1}
    return tuple(sorted(first | {steps + step for step in first} if edits else first))


def save_inputs(calls: Sequence[Inputs], file: Path) -> None:
    """Write one image of each call; calls of one picture size become a batch."""
    sizes: dict[int, list[Inputs]] = {}
    for call in calls:
        sizes.setdefault(call["hidden_states"].shape[1], []).append(call)
    tensors = {}
    for index, batch in enumerate(sizes.values()):
        for name, value in batch[0].items():
            of_all = value if name.endswith("_ids") else torch.cat([call[name][:1] for call in batch])
            tensors[f"{index}/{name}"] = of_all.contiguous().cpu()
    save_file(tensors, file)


def load_inputs(file: Path) -> list[dict[str, Tensor]]:
    """The batches that `save_inputs` wrote."""
    batches: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(file).items():
        index, _, name = key.partition("/")
        batches.setdefault(index, {})[name] = value
    return [batches[index] for index in sorted(batches)]
