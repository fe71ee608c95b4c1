"""fluxserve serve --page, as `make serve` runs it: server, gateway and page start together, and end together."""

import base64
import signal
import subprocess
from pathlib import Path

import httpx2
import openai
import pytest

from fluxserve.supervisor import Ports
from tests.triton.conftest import wait_for
from tests.triton.supervised import alive, listening, serve, shared_memory, tree

pytestmark = pytest.mark.xdist_group("lifecycle")


def test_three_urls_and_one_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    port = Ports.free().http
    url = f"http://127.0.0.1:{port}"
    with serve("--page", f"--page-port={port}") as served, httpx2.Client(base_url=url, verify=False) as browser:
        wait_for(lambda: served.said("page     "), 5)
        for place in (f"gRPC     127.0.0.1:{served.ports.grpc}", f"API      {url}/v1", f"page     {url}/"):
            assert served.said(place), served.lines
        assert '"title":"fluxserve"' in browser.get("/").text
        sdk = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in sdk.models.list()] == ["tiny"]
        answer = sdk.images.generate(prompt="a fox", size="64x64", extra_body={"num_inference_steps": 1})
        assert answer.data and base64.b64decode(answer.data[0].b64_json or "").startswith(b"\x89PNG")
        assert list(tmp_path.glob("fluxserve-page-*"))
        pids = tree(served.process.pid)
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(60) == 0, "".join(served.lines)
    wait_for(lambda: not alive(pids), 10)
    assert shared_memory(served.process.pid) == []
    assert not any(listening(each) for each in (port, served.ports.http, served.ports.grpc))
    assert list(tmp_path.glob("fluxserve-page-*")) == []


def test_make_can_start_the_server_alone() -> None:
    def dry(*arguments: str) -> str:
        command = ["make", "--dry-run", "--silent", "serve", *arguments]
        said = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
        return next(line for line in said.splitlines() if "fluxserve serve" in line)

    assert "--page" in dry()
    assert "--page" not in dry("PAGE=")
    assert "--page" not in dry("SERVER=grpc://gpu-box:8001")
