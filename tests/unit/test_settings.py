"""settings.py: parameters win over the environment, which wins over the default."""

import os
from dataclasses import fields
from pathlib import Path

import pytest

from fluxserve import process, settings
from fluxserve.errors import SettingsError
from fluxserve.families import registry
from fluxserve.settings import Settings

NAMES = [f.name for f in fields(Settings)]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(f"FLUXSERVE_{name.upper()}", raising=False)


def given(**values: str) -> dict[str, dict[str, str]]:
    return {name: {"string_value": value} for name, value in values.items()}


def test_defaults() -> None:
    assert settings.load() == settings.load({}) == Settings()
    assert settings.load().checkpoint_path == settings.default_checkpoint()
    assert settings.default_checkpoint().parts[-2:] == ("checkpoints", "tiny")


VALUES = {
    "checkpoint": ("/a", "/b"),
    "artifact": ("/c", "/d"),
    "model": ("flux.2-dev", "flux.2-dev-turbo"),
    "engine": ("one", "two"),
    "dtype": ("float16", "bfloat16"),
    "threads": ("3", "4"),
    "max_rows": ("2", "5"),
    "max_waiting": ("7", "8"),
    "queue_timeout": ("30", "600"),
    "cache": ("/e", "/f"),
    "c2pa_certificate": ("/g", "/h"),
    "c2pa_key": ("/i", "/j"),
    "inflight": ("/x", "/y"),
}


def test_every_setting_is_tried_below() -> None:
    assert set(VALUES) == set(NAMES)


@pytest.mark.parametrize("name", VALUES)
def test_precedence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from_environment, from_parameter = VALUES[name]
    monkeypatch.setenv(f"FLUXSERVE_{name.upper()}", from_environment)
    assert str(getattr(settings.load(), name)) == from_environment
    assert str(getattr(settings.load(given(**{name: from_parameter})), name)) == from_parameter
    others = [n for n in NAMES if n != name]
    assert all(getattr(settings.load(), n) == getattr(Settings(), n) for n in others)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("dtype", "int8", "auto, float32, bfloat16, float16"),
        ("dtype", "", "auto, float32, bfloat16, float16"),
        ("model", "flux.2-turbo", f"{', '.join(member.name for member in registry.members())}; or nothing"),
        ("threads", "many", "an integer"),
        ("threads", "1.5", "an integer"),
        ("threads", "", "an integer"),
        ("threads", "-1", "0 or more"),
        ("max_rows", "0", "1 or more"),
        ("max_waiting", "-1", "0 to 192"),
        ("max_waiting", "193", "0 to 192"),
        ("queue_timeout", "86401", "0 to 86,400"),
    ],
)
def test_errors_name_the_setting(name: str, value: str, allowed: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings.load(given(**{name: value}))
    got = value if allowed[0] in "01" else repr(value)
    assert str(caught.value) == f"{name}: got {got}; allowed: {allowed}"


def test_numbers_are_numbers() -> None:
    loaded = settings.load(given(threads="2", max_rows="3"))
    assert (loaded.threads, loaded.max_rows) == (2, 3)


def test_the_table_of_a_server_is_named_after_it() -> None:
    assert settings.load(given(inflight="/tmp/t")).inflight_path == Path("/tmp/t")
    assert settings.load().inflight_path.name == f"{process.prefix(os.getppid())}inflight"


def test_environment_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXSERVE_ENGINE", "old")
    monkeypatch.setenv("SOMETHING", "else")
    env = settings.environment(engine="new", inflight="/tmp/t")
    assert (env["FLUXSERVE_ENGINE"], env["FLUXSERVE_INFLIGHT"], env["SOMETHING"]) == ("new", "/tmp/t", "else")
    assert os.environ["FLUXSERVE_ENGINE"] == "old"


def test_a_server_keeps_freed_memory_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    env = settings.environment()
    assert (env["MALLOC_ARENA_MAX"], env["MALLOC_MMAP_THRESHOLD_"]) == ("3", str(32 * 2**20))


def test_a_relative_checkpoint_is_kept_as_it_is() -> None:
    assert settings.load(given(checkpoint="here")).checkpoint_path == Path("here")


def test_a_parameter_without_a_string_value() -> None:
    with pytest.raises(SettingsError, match="engine"):
        settings.load({"engine": {}})


def test_the_cache_is_where_the_setting_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In this process and, by the environment, in its children."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLUXSERVE_CACHE", raising=False)
    settings.keep_cache_in("")
    assert settings.cache_folder() == tmp_path / ".cache" / "fluxserve"
    monkeypatch.setenv("FLUXSERVE_CACHE", "~/elsewhere")
    assert settings.cache_folder() == tmp_path / "elsewhere"
    settings.keep_cache_in("/srv/cache")
    assert settings.cache_folder() == Path("/srv/cache") and settings.environment()["FLUXSERVE_CACHE"] == "/srv/cache"
