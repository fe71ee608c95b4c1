"""What a file says about how its picture was made: by a trained model, by which one, and with which parameters.

Every PNG, JPEG and WebP file carries it as XMP (ISO 16684-1), in the terms of the IPTC Photo Metadata Standard 2025.1.
A PNG has the text `parameters` as well, which programs around diffusion models read. Neither holds a time or the id
of a request: equal requests have equal files. media/signing.py adds a signature where an operator has a certificate.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fluxserve import __version__
from fluxserve.media.png.container import text

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for media that a trained model made; C2PA uses the same."""

MAX_PROMPT_BYTES = 8192
"""An escaped character has up to six bytes, and a segment of a JPEG file 64 KiB."""

PRODUCT = f"fluxserve {__version__}"

_NAMESPACES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "fluxserve": "urn:fluxserve:picture#",
}
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF {namespaces}><rdf:Description rdf:about="">'
    "{properties}</rdf:Description></rdf:RDF></x:xmpmeta>"
    '<?xpacket end="r"?>'
)
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2
# A carriage return that is not escaped is read as a newline.
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "\r": "&#13;"})


@dataclass(frozen=True)
class System:
    """The model and how it is run: the same for every picture of a server."""

    model: str
    engine: str
    precision: str


@dataclass(frozen=True)
class Provenance:
    """How one picture was made.

    Attributes:
        steps: denoising steps that were computed.
        own: fields of the model's family, such as `task` and `guidance`; their names become those of XML elements.
        prompt: empty unless the caller wants it in the file.
    """

    system: System
    seed: int
    steps: int
    height: int
    width: int
    own: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""

    def xmp(self) -> bytes:
        """Return an XMP packet in UTF-8.

        Quotes and `>` are escaped too: a reader that searches the packet with a regular expression, as Pillow does for
        an orientation, must not find a property in a prompt.
        """
        properties = "".join(f"<{name}>{_escaped(value)}</{name}>" for name, value in self._properties().items())
        namespaces = " ".join(f'xmlns:{prefix}="{uri}"' for prefix, uri in _NAMESPACES.items())
        return _PACKET.format(namespaces=namespaces, properties=properties).encode()

    def _properties(self) -> Mapping[str, str]:
        properties = {
            "Iptc4xmpExt:DigitalSourceType": SOURCE_TYPE,
            "Iptc4xmpExt:AISystemUsed": self.system.model,
            "Iptc4xmpExt:AISystemVersionUsed": PRODUCT,
            "Iptc4xmpExt:AIPromptInformation": self.prompt,
            "xmp:CreatorTool": PRODUCT,
            "fluxserve:seed": str(self.seed),
            "fluxserve:steps": str(self.steps),
            "fluxserve:height": str(self.height),
            "fluxserve:width": str(self.width),
            "fluxserve:engine": self.system.engine,
            "fluxserve:precision": self.system.precision,
            **{f"fluxserve:{name}": value for name, value in self.own.items()},
        }
        return {name: value for name, value in properties.items() if value}

    def parameters(self) -> str:
        """Return the text that Stable Diffusion's programs read: the prompt's lines, if any, then the settings."""
        settings = {
            "Steps": str(self.steps),
            "CFG scale": self.own.get("cfg_scale", ""),
            "Distilled CFG Scale": self.own.get("guidance", ""),
            "Seed": str(self.seed),
            "Size": f"{self.width}x{self.height}",
            "Model": self.system.model,
            "Version": PRODUCT,
        }
        line = ", ".join(f"{name}: {value}" for name, value in settings.items() if value)
        return f"{_printable(self.prompt)}\n{line}" if self.prompt else line

    def png_chunks(self) -> bytes:
        """Return the text chunks of a PNG, which stand behind its header."""
        return text("XML:com.adobe.xmp", self.xmp().decode()) + text("parameters", self.parameters())


def _printable(value: str) -> str:
    """Replace control characters, and others that XML 1.0 lacks, by U+FFFD."""
    return _NOT_XML.sub("\ufffd", value)


def _escaped(value: str) -> str:
    """Escape text for an XML element."""
    return _printable(value).translate(_ESCAPES)
