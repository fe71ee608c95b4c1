"""What a picture's file says about how it was made: its XMP, the text `parameters` of a PNG, and its C2PA manifest.

Files come from strangers. Only the header of a picture is read, no pixel is decoded, an XML document with a DOCTYPE is
refused (so no entity is ever declared, fetched or expanded), and no address that a file names is contacted.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.parsers import expat

from PIL import Image

from fluxserve_client.console import one_line

_FORMATS = ("PNG", "JPEG", "WEBP")
_MAX_XMP = 1 << 20
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_PREFIXES = {
    "http://ns.adobe.com/xap/1.0/": "xmp",
    "http://iptc.org/std/Iptc4xmpExt/2008-02-29/": "Iptc4xmpExt",
    "http://purl.org/dc/elements/1.1/": "dc",
    "urn:fluxserve:picture#": "fluxserve",
}
_MADE_BY_A_MODEL = "trainedAlgorithmicMedia"
_UNTRUSTED = "signingCredential.untrusted"
_COLUMN = 36


@dataclass(frozen=True)
class Manifest:
    """A C2PA manifest, and what its library makes of it.

    Attributes:
        state: "trusted", by the authorities that were named; "valid", by whomever it was signed; "invalid"; or
            "unread", because it is damaged or elsewhere.
        signer, issuer, algorithm: as the certificate says.
        generator: the program that made the claim.
        source_types: IPTC's terms in the actions.
        failures: what does not hold.
    """

    state: str
    signer: str
    issuer: str
    algorithm: str
    generator: str
    source_types: tuple[str, ...]
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What a file says.

    Attributes:
        format: png, jpeg or webp.
        xmp: the packet's properties, by prefix and name; by the namespace in braces where the prefix is not common.
        parameters: of a PNG.
        c2pa: the manifest; None if there is none, or it was not looked for.
        c2pa_checked: whether c2pa-python is installed.
        problems: what is damaged or does not hold.
    """

    format: str
    height: int
    width: int
    xmp: Mapping[str, str]
    parameters: str
    c2pa: Manifest | None
    c2pa_checked: bool
    problems: tuple[str, ...]

    @property
    def made_by_a_model(self) -> bool:
        """Whether the XMP has IPTC's term for it, or the manifest has."""
        terms = (self.xmp.get("Iptc4xmpExt:DigitalSourceType", ""), *(self.c2pa.source_types if self.c2pa else ()))
        return any(term.endswith(f"/{_MADE_BY_A_MODEL}") for term in terms)


def inspect(path: Path, trust: Path | None = None) -> Inspection:
    """Read what a file says.

    Args:
        path: a PNG, JPEG or WebP file.
        trust: a PEM file of the authorities whose certificates are trusted to sign.

    Raises:
        OSError: a file that cannot be read.
        ValueError: no picture of these formats, or no authorities in `trust`.
    """
    data = path.read_bytes()
    try:
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: got {len(data)} bytes, expected a PNG, JPEG or WebP file ({error})") from error
    problems: list[str] = []
    xmp: Mapping[str, str] = {}
    try:
        xmp = read_xmp(picture.info.get("xmp", b""))
    except ValueError as error:
        problems.append(f"XMP: {error}")
    kind = str(picture.format).lower()
    checked, manifest = _read_manifest(data, kind, trust)
    problems += [f"C2PA: {failure}" for failure in manifest.failures] if manifest else []
    return Inspection(
        format=kind,
        height=picture.height,
        width=picture.width,
        xmp=xmp,
        parameters=str(picture.info.get("parameters", "")),
        c2pa=manifest,
        c2pa_checked=checked,
        problems=tuple(problems),
    )


def report(path: Path, inspection: Inspection, *, as_json: bool) -> str:
    """Format an inspection for a terminal or as one JSON object. A terminal gets no control character of the file."""
    if as_json:
        return json.dumps({"file": str(path), "made_by_a_model": inspection.made_by_a_model, **asdict(inspection)})
    size = f"{inspection.format}, {inspection.height} × {inspection.width} (height × width)"
    source = "a trained model made it" if inspection.made_by_a_model else "nothing says that a model made it"
    rows = [("file", size), ("source", source), *inspection.xmp.items()]
    rows += [("parameters", inspection.parameters)] if inspection.parameters else []
    rows += [("C2PA", _manifest_line(inspection))]
    rows += [("problem", problem) for problem in inspection.problems]
    return "\n".join([one_line(str(path)), *(f"  {one_line(name):{_COLUMN}} {one_line(text)}" for name, text in rows)])


def _manifest_line(inspection: Inspection) -> str:
    if not inspection.c2pa_checked:
        return "not checked: c2pa-python is not installed (pip install 'fluxserve-client[provenance]')"
    if not (manifest := inspection.c2pa):
        return "no manifest"
    if manifest.state == "unread":
        return "a manifest that cannot be read"
    about = {
        "trusted": "trusted: the file is unchanged",
        "valid": "valid: the file is unchanged; --trust FILE says whether to trust the signer",
        "invalid": "INVALID",
    }[manifest.state]
    signer = f"signed by {manifest.signer!r} of {manifest.issuer!r}, {manifest.algorithm}, through {manifest.generator}"
    return f"{about}; {signer}"


def read_xmp(packet: bytes | str) -> dict[str, str]:
    """Return the properties of an XMP packet, each as one text; a list's or structure's parts are joined.

    Raises:
        ValueError: no well-formed XML, a DOCTYPE, or more than 1 MiB.
    """
    raw = packet.encode() if isinstance(packet, str) else packet
    raw = raw.strip(b"\0 \r\n\t")
    if len(raw) > _MAX_XMP:
        raise ValueError(f"got {len(raw)} bytes, expected at most {_MAX_XMP}")
    reader = _XmpReader()
    if raw:
        try:
            reader.parser.Parse(raw, True)
        except expat.ExpatError as error:
            raise ValueError(f"damaged: {error}") from error
    return {name: " ".join(parts).strip() for name, parts in reader.properties.items()}


class _XmpReader:
    """Collects the properties of every rdf:Description that stands directly in rdf:RDF, without recursion."""

    def __init__(self) -> None:
        self.properties: dict[str, list[str]] = {}
        self.parser = expat.ParserCreate(namespace_separator="\n")
        self.parser.buffer_text = True
        self.parser.StartDoctypeDeclHandler = self._refuse
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text
        self._open: list[str] = []
        self._depth = 0  # of the element that is a property; 0 outside of one

    def _refuse(self, *_: object) -> None:
        raise ValueError("got a DOCTYPE, expected none: it can declare entities")

    def _start(self, name: str, attributes: Mapping[str, str]) -> None:
        inside = self._open[-2:] == [f"{_RDF}\nRDF", f"{_RDF}\nDescription"]
        self._open.append(name)
        if self._depth:
            return
        if self._open[-2:] == [f"{_RDF}\nRDF", f"{_RDF}\nDescription"]:
            for attribute, value in attributes.items():
                if "\n" in attribute and not attribute.startswith(f"{_RDF}\n"):
                    self.properties[_short(attribute)] = [value]
        elif inside:
            self._depth = len(self._open)
            self.properties[_short(name)] = (
                [attributes[f"{_RDF}\nresource"]] if f"{_RDF}\nresource" in attributes else []
            )

    def _end(self, _: str) -> None:
        if len(self._open) == self._depth:
            self._depth = 0
        self._open.pop()

    def _text(self, text: str) -> None:
        if self._depth:
            self.properties[_short(self._open[self._depth - 1])].append(text)


def _short(name: str) -> str:
    namespace, _, local = name.rpartition("\n")
    prefix = _PREFIXES.get(namespace, f"{{{namespace}}}" if namespace else "")
    return f"{prefix}:{local}" if prefix else local


def _read_manifest(data: bytes, kind: str, trust: Path | None) -> tuple[bool, Manifest | None]:
    """Return whether the library is installed, and the manifest. Manifests elsewhere, and revocations, stay unread."""
    try:
        import c2pa
    except ModuleNotFoundError:
        if trust:
            raise ValueError(
                "--trust: c2pa-python is not installed (pip install 'fluxserve-client[provenance]')"
            ) from None
        return False, None
    settings: dict[str, Any] = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
    if trust:
        settings["verify"]["verify_trust"] = True
        settings["trust"] = {"trust_anchors": trust.read_text(encoding="ascii", errors="replace")}
    try:
        context = c2pa.Context.from_dict(settings)
    except c2pa.C2paError as error:
        raise ValueError(f"--trust: got {str(trust)!r}, expected certificates in PEM ({error})") from error
    try:
        reader = c2pa.Reader.try_create(f"image/{kind}", io.BytesIO(data), context=context)
    except c2pa.C2paError as error:
        return True, Manifest("unread", "", "", "", "", (), (str(error),))
    if reader is None:
        return True, None
    with reader:
        return True, _manifest(json.loads(reader.json()), must_be_trusted=trust is not None)


def _manifest(store: Mapping[str, Any], *, must_be_trusted: bool) -> Manifest:
    active = store["manifests"][store["active_manifest"]]
    signature, generators = active.get("signature_info", {}), active.get("claim_generator_info", [{}])
    assertions = (a["data"] for a in active.get("assertions", ()) if a["label"].startswith("c2pa.actions"))
    actions: Sequence[Mapping[str, Any]] = [action for data in assertions for action in data.get("actions", ())]
    statuses = store.get("validation_status", ())
    return Manifest(
        state=str(store["validation_state"]).lower(),
        signer=str(signature.get("common_name", "")),
        issuer=str(signature.get("issuer", "")),
        algorithm=str(signature.get("alg", "")),
        generator=" ".join(str(generators[0].get(name, "")) for name in ("name", "version")),
        source_types=tuple(str(a["digitalSourceType"]) for a in actions if "digitalSourceType" in a),
        failures=tuple(
            f"{status['code']}: {status.get('explanation', '')}"
            for status in statuses
            if must_be_trusted or status["code"] != _UNTRUSTED
        ),
    )
