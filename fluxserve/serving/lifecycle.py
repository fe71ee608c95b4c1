"""What every model of the server does when it is loaded and unloaded."""

import gc
import json
from typing import ClassVar

from fluxserve import settings
from fluxserve.inflight import InflightTable
from fluxserve.serving import errors
from fluxserve.serving.processes import Heartbeat, ProcessTable
from fluxserve.settings import Settings


class ServedModel:
    """Triton calls `initialize` and `finalize`; a subclass loads what it needs in `load`.

    Each instance is a process of its own. From the moment it begins to load, a heartbeat tells the supervisor that it
    is there and gets on. One that fails to load takes its entry back: the reason is Triton's to report.
    """

    name: ClassVar[str]
    _table: InflightTable
    _processes: ProcessTable
    _heartbeat: Heartbeat

    def initialize(self, args: dict[str, str]) -> None:
        try:
            self._initialize(args)
        except Exception as error:  # noqa: BLE001 (the border: what the stub can't print would end it without a reason)
            reason = errors.of_loading(error)
        else:
            return
        raise reason  # from nothing: the stub would walk through the other's traceback

    def _initialize(self, args: dict[str, str]) -> None:
        config = settings.load(json.loads(args["model_config"])["parameters"])
        settings.keep_cache_in(config.cache)
        self._table = InflightTable(config.inflight_path)
        self._processes = ProcessTable.beside(config.inflight_path)
        self._heartbeat = Heartbeat(self._processes, self.name)
        try:
            self.load(config, args)
        except BaseException:
            self._heartbeat.close()
            raise
        gc.collect()
        gc.freeze()  # what is there now stays: no collection in the middle of a request walks a million objects of it
        self._heartbeat.loaded()

    def finalize(self) -> None:
        self._heartbeat.close()
        self.unload()

    def load(self, config: Settings, args: dict[str, str]) -> None:
        """Open what the model needs; an error here is the reason that Triton logs. `args` are Triton's."""

    def unload(self) -> None:
        """Close what `load` opened."""
