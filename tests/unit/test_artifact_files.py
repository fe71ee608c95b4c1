"""An artifact's files: what is noticed of another content, and which links are followed."""

import re
from pathlib import Path

import pytest

from fluxserve.errors import ArtifactDamaged, ArtifactError
from fluxserve.families.flux.models import TINY
from fluxserve.folders import artifact as artifacts
from fluxserve.folders.artifact import MANIFEST
from tests.support import artifacts as made

ENGINE = "transformer/any/model.onnx"
CONFIG = "checkpoint/vae/config.json"
SHA = "0" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made.write(tmp_path / "tiny.onnx")


def refusal(folder: Path, kind: type[ArtifactError] = ArtifactError) -> str:
    with pytest.raises(kind) as caught:
        artifacts.read(folder)
    assert str(folder) in str(caught.value), "the message says where"
    return str(caught.value)


def damage(folder: Path, name: str) -> str:
    """The message of an ArtifactDamaged, after what it has of the file's path and its advice."""
    message = refusal(folder, ArtifactDamaged)
    start, advice = f"{folder / name}: ", ". It is not the file that was exported: export again, or copy it again"
    assert message.startswith(start) and message.endswith(advice), message
    return message.removeprefix(start).removesuffix(advice)


def overwrite(file: Path, content: bytes) -> None:
    """Another content of the same length."""
    assert len(content) == file.stat().st_size and content != file.read_bytes()
    file.write_bytes(content)


def reversed_bytes(file: Path) -> bytes:
    return file.read_bytes()[::-1]


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [ENGINE, CONFIG, "reference/t5.safetensors", "checkpoint/tokenizer/tokenizer.json"])
def test_another_size_is_noticed_at_once(folder: Path, name: str) -> None:
    file = folder / name
    whole = file.read_bytes()
    for content in (whole[:-1], b"", whole + b"\0"):
        file.write_bytes(content)
        assert damage(folder, name) == f"{len(content)} bytes; the manifest says {len(whole)}"
    file.unlink()
    assert damage(folder, name) == "missing"
    file.mkdir()
    assert damage(folder, name) == "missing"
    file.rmdir()
    file.write_bytes(whole)
    assert artifacts.read(folder)


def test_another_content_is_noticed_before_it_is_used(folder: Path) -> None:
    """Engines are large: `read` leaves their hashes to whoever opens them."""
    overwrite(folder / ENGINE, reversed_bytes(folder / ENGINE))
    read = artifacts.read(folder)
    wanted, got = read.manifest["files"][ENGINE]["sha256"], artifacts.sha256(folder / ENGINE)
    expected = f"{folder / ENGINE}: sha256 {got[:12]}…; the manifest says {wanted[:12]}…"
    with pytest.raises(ArtifactDamaged, match=re.escape(expected)):
        read.file(ENGINE)
    with pytest.raises(ArtifactDamaged, match=re.escape(expected)):
        read.folder("transformer")
    assert read.file("clip/any/model.onnx") == folder / "clip/any/model.onnx"


@pytest.mark.parametrize("name", ["checkpoint/tokenizer/tokenizer.json", "checkpoint/tokenizer_2/tokenizer.json"])
def test_another_content_of_a_small_file_is_noticed_at_once(folder: Path, name: str) -> None:
    wanted = artifacts.sha256(folder / name)
    overwrite(folder / name, reversed_bytes(folder / name))
    assert damage(folder, name) == f"sha256 {artifacts.sha256(folder / name)[:12]}…; the manifest says {wanted[:12]}…"


def test_another_number_in_a_configuration_is_noticed_at_once(folder: Path) -> None:
    content = (folder / CONFIG).read_bytes()
    digit = re.search(rb'"scaling_factor": \d+\.\d*(\d)', content)
    assert digit
    place = digit.start(1)
    other = b"1" if content[place : place + 1] != b"1" else b"2"
    overwrite(folder / CONFIG, content[:place] + other + content[place + 1 :])
    assert damage(folder, CONFIG).startswith("sha256 ")


def test_a_file_goes_after_it_was_looked_over(folder: Path) -> None:
    read = artifacts.read(folder)
    (folder / ENGINE).unlink()
    with pytest.raises(ArtifactDamaged, match=re.escape(f"{folder / ENGINE}: unreadable (")):
        read.file(ENGINE)


@pytest.mark.parametrize("name", ["nothing", "transformer/any/other", f"../tiny.onnx/{ENGINE}", MANIFEST, ""])
def test_only_listed_files_are_given(folder: Path, name: str) -> None:
    read = artifacts.read(folder)
    (folder / "transformer/any/other").write_text("x")
    with pytest.raises(ArtifactDamaged, match="not listed in the manifest"):
        read.file(name)


def test_folders(folder: Path) -> None:
    read = artifacts.read(folder)
    (folder / "t5/any/unlisted").write_text("x")
    assert read.folder("t5") == [folder / "t5/any/model.onnx"]
    names = sorted(TINY.components)
    assert read.folder("reference") == [folder / "reference" / f"{name}.safetensors" for name in names]
    assert read.folder("vae") == [], "not what only begins like it"


@pytest.mark.parametrize("listed_before", [False, True])
def test_a_configuration_that_is_not_listed(folder: Path, listed_before: bool) -> None:
    name = CONFIG if listed_before else "checkpoint/tokenizer/added_tokens.json"
    if listed_before:
        made.drop(folder, ["files", CONFIG])
    else:
        (folder / name).write_text('{"fox": 5}')
    assert damage(folder, name) == "not listed in the manifest"


def test_a_name_that_is_too_long(folder: Path) -> None:
    refusal(made.put(folder, ["files", "a" * 300], {"sha256": SHA, "bytes": 1}))


# --- links: content-addressed stores keep files behind them. What counts is the content, which is hashed through them -


@pytest.mark.parametrize("name", [ENGINE, CONFIG])
def test_a_link_to_what_was_exported(folder: Path, name: str) -> None:
    outside = folder.parent / "stored"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    assert artifacts.read(folder).file(name) == folder / name


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("../../outside", "sha256 "),
        ("../../gone", "missing"),
        ("..", "missing"),
        ("tokenizer.json", "missing"),
        ("/dev/zero", "missing"),
    ],
    ids=["another file", "nothing", "a folder", "itself", "a device"],
)
def test_links_to_anything_else(folder: Path, target: str, reason: str) -> None:
    name = "checkpoint/tokenizer/tokenizer.json"
    (folder / "outside").write_bytes(reversed_bytes(folder / name))
    (folder / name).unlink()
    (folder / name).symlink_to(target)
    assert damage(folder, name).startswith(reason)
