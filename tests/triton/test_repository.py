"""Two models side by side: a repository for each, a server for each, and no settings beside them."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from fluxserve import settings
from fluxserve.cli.main import main
from tests.support import random_flux2
from tests.triton.conftest import drawn_by, pixels, plain, serving

pytestmark = pytest.mark.xdist_group("klein")

FIELDS: dict[str, object] = {"prompt": "a fox", "seed": 3, "height": 96, "width": 112, "num_inference_steps": 2}


def test_two_models_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {"tiny": settings.default_checkpoint(), "klein": random_flux2.klein().folder}
    for name, folder in folders.items():
        assert main(["repository", str(tmp_path / name), "--checkpoint", str(folder)]) == 0
    assert "tiny through torch_eager" in capsys.readouterr().out
    with ExitStack() as stack:
        servers = {name: stack.enter_context(serving(tmp_path / name)) for name in folders}
        for name, server in servers.items():
            picture = pixels(plain(server, "grpc").draw(**FIELDS)["images"][0])
            expected = drawn_by({"checkpoint": str(folders[name])}, FIELDS)
            assert np.abs(picture.astype(int) - expected).max() <= 1
        assert plain(servers["tiny"], "grpc").draw(**FIELDS, guidance_scale=3.0)["images"].shape == (1,)
        with pytest.raises(InferenceServerException, match="guidance_scale"):
            plain(servers["klein"], "grpc").draw(**FIELDS, guidance_scale=3.0)
