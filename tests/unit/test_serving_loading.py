"""serving/generate while it loads: what it refuses, and which GPU is the current one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxserve.errors import ServerError, SettingsError
from tests.support.fake_triton import installed, queue_policy


@pytest.fixture(scope="module")
def serving() -> Iterator[dict[str, Any]]:
    with installed() as modules:
        yield modules


@pytest.mark.parametrize(
    ("policy", "setting", "message"),
    [
        ({}, "0", "default_timeout_microseconds: got 0; allowed: a number above 0"),
        (queue_policy(0), "0", "default_timeout_microseconds: got 0; allowed: a number above 0"),
        (queue_policy(120), "60", "queue_timeout: got 60; allowed: 120, as generate/config.pbtxt says"),
    ],
)
def test_a_queue_without_the_bound_that_was_set(
    serving: dict[str, Any], tmp_path: Path, policy: dict[str, Any], setting: str, message: str
) -> None:
    chosen = {"inflight": str(tmp_path / "table"), "queue_timeout": setting}
    parameters = {name: {"string_value": value} for name, value in chosen.items()}
    args = {"model_config": json.dumps({"parameters": parameters} | policy), "model_instance_kind": "CPU"}
    with pytest.raises(SettingsError, match=message):
        serving["generate"].GenerateModel().initialize(args)


def test_an_unusable_checkpoint_fails_while_loading(serving: dict[str, Any], tmp_path: Path) -> None:
    given = {"checkpoint": tmp_path / "nowhere", "inflight": tmp_path / "table"}
    parameters = {name: {"string_value": str(value)} for name, value in given.items()}
    args = {"model_config": json.dumps({"parameters": parameters} | queue_policy(120)), "model_instance_kind": "CPU"}
    with pytest.raises(Exception, match="nowhere: no such folder"):
        serving["generate"].GenerateModel().initialize(args)


def test_the_gpu_that_was_given_is_the_current_one(
    serving: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's kernels are launched on the current one, whichever their tensors are on."""

    class Opened(Exception):
        pass

    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))

    def opened(source: object, device: str, dtype: str) -> None:
        chosen.append(device)
        raise Opened

    monkeypatch.setattr("fluxserve.source.Source.open_components", opened)
    parameters = {"inflight": {"string_value": str(tmp_path / "table")}}
    args = {"model_config": json.dumps({"parameters": parameters} | queue_policy(120)), "model_instance_kind": "GPU"}
    with pytest.raises(ServerError, match="Opened: "):
        serving["generate"].GenerateModel().initialize({**args, "model_instance_device_id": "1"})
    assert chosen == ["cuda:1", "cuda:1"]
