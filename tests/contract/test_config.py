"""Every config.pbtxt is held against contract.py, through Triton's own protobuf."""

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from fluxserve import contract

REPOSITORY = Path(__file__).parents[2] / "model_repository"
TYPES = {"BYTES": "STRING"}


def config(name: str) -> model_config_pb2.ModelConfig:
    text = (REPOSITORY / name / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_every_model_has_a_contract() -> None:
    assert {p.parent.name for p in REPOSITORY.glob("*/config.pbtxt")} == set(contract.MODELS)


@pytest.mark.parametrize("name", contract.MODELS)
def test_tensors(name: str) -> None:
    model, read = contract.MODELS[name], config(name)
    assert read.name == name
    assert read.max_batch_size == model.max_batch_size
    for tensors, entries in ((model.inputs, read.input), (model.outputs, read.output)):
        want = [(t.name, f"TYPE_{TYPES.get(t.dtype, t.dtype)}", t.dims, t.optional) for t in tensors]
        got = [
            (e.name, model_config_pb2.DataType.Name(e.data_type), tuple(e.dims), getattr(e, "optional", False))
            for e in entries
        ]
        assert got == want


def test_ensemble_names_do_not_collide() -> None:
    """An ensemble output that is called like an input would be that input."""
    assert not {t.name for t in contract.FLUX.inputs} & {t.name for t in contract.FLUX.outputs}


def test_ensemble_is_wired_completely() -> None:
    known = {t.name for t in contract.FLUX.inputs}
    for step in config("flux").ensemble_scheduling.step:
        model = contract.MODELS[step.model_name]
        assert {*step.input_map} == {t.name for t in model.inputs}
        assert set(step.input_map.values()) <= known
        assert {*step.output_map} == {t.name for t in model.outputs}
        known |= set(step.output_map.values())
    assert {t.name for t in contract.FLUX.outputs} <= known


def test_queue() -> None:
    batching = config("generate").dynamic_batching
    policy = batching.default_queue_policy
    assert policy.max_queue_size == contract.MAX_QUEUE_SIZE > contract.MAX_WAITING
    assert policy.timeout_action == policy.REJECT
    assert policy.default_timeout_microseconds == contract.QUEUE_TIMEOUT_S * 1_000_000
    assert not policy.allow_timeout_override
    assert (batching.priority_levels, batching.default_priority_level) == (
        contract.PRIORITY_LEVELS,
        contract.DEFAULT_PRIORITY,
    )


def test_instances() -> None:
    group = model_config_pb2.ModelInstanceGroup
    kinds = {name: [(g.kind, g.count) for g in config(name).instance_group] for name in contract.MODELS}
    assert kinds["flux"] == []
    assert kinds["generate"] == [(group.KIND_AUTO, 1)]
    assert all(kinds[name][0][0] == group.KIND_CPU for name in ("prepare", "control"))


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("*/1/model.py")), ids=lambda p: p.parts[-3])
def test_model_py_is_thin(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
