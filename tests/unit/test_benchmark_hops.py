"""The hops benchmark: a trace of Triton's becomes each request's way, and its parts add up to the whole."""

import pytest

from benchmarks.hops import Asked, hops, stamps

MS = 1_000_000
TRACE = [
    {"id": 1, "model_name": "flux", "model_version": 1, "request_id": "ours-3"},
    {"id": 1, "timestamps": [{"name": "GRPC_WAITREAD_END", "ns": 101 * MS}]},
    {"id": 2, "model_name": "prepare", "model_version": 1, "request_id": "ours-3", "parent_id": 1},
    {"id": 2, "timestamps": [{"name": "COMPUTE_START", "ns": 102 * MS}]},
    {"id": 2, "timestamps": [{"name": "COMPUTE_END", "ns": 104 * MS}]},
    {"id": 3, "model_name": "generate", "model_version": 1, "request_id": "ours-3", "parent_id": 1},
    {"id": 3, "timestamps": [{"name": "COMPUTE_START", "ns": 105 * MS}, {"name": "COMPUTE_END", "ns": 407 * MS}]},
    {"id": 1, "timestamps": [{"name": "GRPC_SEND_START", "ns": 410 * MS}, {"name": "GRPC_SEND_END", "ns": 411 * MS}]},
    {"id": 4, "model_name": "flux", "model_version": 1, "request_id": "another"},
    {"id": 4, "timestamps": [{"name": "GRPC_WAITREAD_END", "ns": 900 * MS}]},
    {"id": 5, "model_name": "control", "model_version": 1},
]


def test_stamps_are_found_by_request_and_model() -> None:
    found = stamps(TRACE)
    assert set(found) == {"ours-3", "another"}
    assert set(found["ours-3"]) == {"flux", "prepare", "generate"}
    assert found["ours-3"]["generate"] == {"COMPUTE_START": 105 * MS, "COMPUTE_END": 407 * MS}
    assert found["another"]["flux"] == {"GRPC_WAITREAD_END": 900 * MS}


def test_hops_add_up_to_what_the_client_waited() -> None:
    found = hops(Asked("ours-3", 100 * MS, 414 * MS, device=300.0, image=2.0), stamps(TRACE)["ours-3"])
    between = {name: spent for name, spent in found.items() if "→" in name}
    assert list(between.values()) == pytest.approx([1, 1, 2, 1, 302, 3, 1, 3])
    assert sum(between.values()) == pytest.approx(314)
    assert found["generate, but for the device"] == pytest.approx(2)
    assert found["client − device − image"] == pytest.approx(12)


def test_a_request_over_http_has_the_same_hops() -> None:
    names = {
        "GRPC_WAITREAD_END": "HTTP_RECV_END",
        "GRPC_SEND_START": "HTTP_SEND_START",
        "GRPC_SEND_END": "HTTP_SEND_END",
    }
    seen, asked = stamps(TRACE)["ours-3"], Asked("ours-3", 100 * MS, 414 * MS, device=300.0, image=2.0)
    over_http = {**seen, "flux": {names[name]: ns for name, ns in seen["flux"].items()}}
    assert hops(asked, over_http) == hops(asked, seen)
