"""What every model of the server does when it is loaded and unloaded."""

import gc
import json
from typing import ClassVar

from fluxserve import settings
from fluxserve.serving.inflight import InflightTable
from fluxserve.settings import Settings


class ServedModel:
    """Triton calls `initialize` and `finalize`; a subclass loads what it needs in `load`.

    Each instance is a process of its own and says so in the in-flight table, so that the supervisor notices when one
    dies. One that fails to load never registers: that is Triton's to report.
    """

    name: ClassVar[str]
    _table: InflightTable

    def initialize(self, args: dict[str, str]) -> None:
        config = settings.load(json.loads(args["model_config"])["parameters"])
        self._table = InflightTable(config.inflight_path)
        self.load(config, args)
        gc.collect()
        gc.freeze()  # what is there now stays: no collection in the middle of a request walks a million objects of it
        self._table.register(self.name)

    def finalize(self) -> None:
        self._table.unregister()
        self.unload()

    def load(self, config: Settings, args: dict[str, str]) -> None:
        """Open what the model needs; an error here is the reason that Triton logs. `args` are Triton's."""

    def unload(self) -> None:
        """Close what `load` opened."""
