"""What is served: a checkpoint's weights, or an artifact's engines. The settings say which."""

from dataclasses import dataclass
from pathlib import Path

from fluxserve.engine import Components
from fluxserve.engines import open as engines
from fluxserve.errors import SettingsError
from fluxserve.folders import artifact as artifacts
from fluxserve.folders import checkpoint as checkpoints
from fluxserve.folders.artifact import Artifact
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.settings import Settings
from fluxserve.spec import NETWORK, ModelSpec


@dataclass(frozen=True)
class Source:
    """A folder that was looked over; `checkpoint` has the tokenizers and configurations in either case."""

    engine: str
    checkpoint: Checkpoint
    artifact: Artifact | None = None

    @property
    def spec(self) -> ModelSpec:
        return self.artifact.spec if self.artifact else self.checkpoint.spec

    def open_components(self, device: str, dtype: str) -> Components:
        """Load every component. Raises CheckpointError, ArtifactError, EngineError."""
        if self.artifact:
            return engines.open_artifact(self.artifact, device)
        return engines.open_components(self.engine, self.checkpoint, device, dtype)

    @property
    def path(self) -> Path:
        """The folder that is served, as it was found."""
        return self.artifact.path if self.artifact else self.checkpoint.path

    def check_files(self, dtype: str) -> None:
        """Read all weights once, without keeping them: what loading them would find.

        Raises:
            CheckpointError: numbers that are not finite.
            ArtifactDamaged: a file that is not the one that was exported.
        """
        if self.artifact:
            self.artifact.check_contents()
            return
        from fluxserve.engines import finite  # torch, which `prepare` does without

        for name in self.checkpoint.folders:
            finite.check(self.checkpoint.weights(name), dtype)

    def check_engine(self, device: str, dtype: str) -> None:
        """Raise the error that opening the engine would raise before it reads weights; see engines.open."""
        if self.artifact:
            engines.check_artifact(self.artifact, device)
        else:
            engines.check_components(self.engine, self.checkpoint, device, dtype)

    def device(self, offered: str) -> str:
        """Where the engine runs: on what is offered, or on the CPU if it runs nowhere else."""
        return "cpu" if self.engine in engines.CPU_ONLY else offered

    def precision(self, device: str, dtype: str) -> str:
        """The numbers that the network computes with: those of the artifact, or else the dtype on that device."""
        if self.artifact:
            return self.artifact.component(NETWORK).precision
        return engines.dtype_on(device, dtype)

    @property
    def compiles(self) -> bool:
        """Whether kernels may be compiled where the engine runs, because its own are."""
        return self.engine in engines.COMPILING


def find(config: Settings) -> Source:
    """The source that the settings name; an artifact is served in place of a checkpoint.

    Raises:
        SettingsError: the settings contradict each other.
        CheckpointError, ArtifactError: the folder can't be served.
        UnknownEngine: lists the valid names.
    """
    if not config.artifact:
        name = config.engine or engines.DEFAULT
        if engines.needs_artifact(name):
            raise SettingsError(
                "artifact", "", f"the folder of an artifact, which {name} runs: `fluxserve export` makes one"
            )
        return Source(name, checkpoints.read(config.checkpoint_path, model=config.model))
    if config.dtype != "auto":
        raise SettingsError("dtype", config.dtype, "auto beside an artifact: its precision was chosen at export")
    artifact = artifacts.read(config.artifact_path)
    if config.engine not in ("", artifact.engine):
        raise SettingsError("engine", config.engine, f"{artifact.engine}, which {config.artifact} is for; or nothing")
    if config.model not in ("", artifact.spec.name):
        raise SettingsError("model", config.model, f"{artifact.spec.name}, which {config.artifact} is; or nothing")
    return Source(artifact.engine, artifact.checkpoint, artifact)
