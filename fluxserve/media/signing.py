"""C2PA manifests: a file signed with the operator's certificate, so that whoever changes a pixel breaks the signature.

The one import of c2pa-python, and of the library that it reads keys with; `open_signer` imports this file only where a
certificate is set. The manifest says that a trained model created the picture. The signature covers every byte of the
file, so the XMP with model, seed and parameters is signed too. No timestamp authority is asked: nothing leaves the
server, and a signature is valid as long as its certificate is.
"""

import io
import json
from pathlib import Path

import c2pa
import numpy as np
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fluxserve import __version__
from fluxserve.errors import SettingsError, SigningFailed
from fluxserve.media.png import strips
from fluxserve.media.provenance import SOURCE_TYPE

_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
_SETTINGS = {"builder": {"thumbnail": {"enabled": False}}}  # it would be as large as the file
_OFFLINE = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
_FIT = (
    "a certificate that C2PA takes: valid today, not self-signed, for digital signatures, and with emailProtection or"
)
_FIT += " documentSigning as its extended key usage"


class Signer:
    """Signs files. Any number of threads may share it.

    Args:
        certificate: PEM, the signer's certificate first, then those up to the authority.
        key: PEM, PKCS #8 and not encrypted.
        model: the name of what draws.

    Raises:
        SettingsError: a file can't be read, the two do not belong together, or C2PA refuses the certificate.
    """

    def __init__(self, certificate: Path, key: Path, model: str) -> None:
        chain, private = _read("c2pa_certificate", certificate), _read("c2pa_key", key)
        algorithm = _algorithm(chain, private, certificate, key)
        self._identity = algorithm.encode(), chain, private
        self._context = c2pa.Context.from_dict(_SETTINGS)
        self._manifest = json.dumps(_manifest(model))
        self._try_out(certificate)

    def sign(self, file: bytes, output_format: str) -> bytes:
        """A PNG, JPEG or WebP file with a manifest; its pixels and everything else in it stay.

        Raises:
            SigningFailed: the library refused, as it does once the certificate has expired.
        """
        signed = io.BytesIO()
        info = c2pa.C2paSignerInfo(*self._identity, None)
        try:
            with c2pa.Signer.from_info(info) as signer, c2pa.Builder(self._manifest, context=self._context) as builder:
                builder.sign(signer, f"image/{output_format}", io.BytesIO(file), signed)
        except c2pa.C2paError as error:
            raise SigningFailed(str(error)) from error
        return signed.getvalue()

    def _try_out(self, certificate: Path) -> None:
        """Sign a picture and read it again: what C2PA refuses must fail the start and not the first request."""
        try:
            signed = self.sign(strips.encode(np.zeros((16, 16, 3), np.uint8)), "png")
        except SigningFailed as error:
            raise SettingsError("c2pa_certificate", str(certificate), f"{_FIT} ({error})") from error
        with c2pa.Reader("image/png", io.BytesIO(signed), context=c2pa.Context.from_dict(_OFFLINE)) as reader:
            if reader.get_validation_state() not in ("Valid", "Trusted"):
                raise SettingsError("c2pa_certificate", str(certificate), _FIT)


def _manifest(model: str) -> dict[str, object]:
    created = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE, "softwareAgent": {"name": model}}
    return {
        "claim_generator_info": [{"name": "fluxserve", "version": __version__}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
    }


def _read(name: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise SettingsError(name, str(file), f"a PEM file that can be read ({error.strerror})") from error


def _algorithm(chain: bytes, private: bytes, certificate: Path, key: Path) -> str:
    """C2PA's name of the key's algorithm, once the key is known to be the certificate's."""
    try:
        signers = x509.load_pem_x509_certificates(chain)[0].public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SettingsError("c2pa_certificate", str(certificate), f"certificates in PEM ({error})") from error
    try:
        secret = load_pem_private_key(private, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SettingsError("c2pa_key", str(key), f"a private key in PEM, not encrypted ({error})") from error
    if secret.public_key() != signers:
        raise SettingsError("c2pa_key", str(key), f"the key of {certificate}, which has another")
    if isinstance(secret, ec.EllipticCurvePrivateKey) and secret.curve.name in _CURVES:
        return _CURVES[secret.curve.name]
    if isinstance(secret, rsa.RSAPrivateKey):
        return "ps256"
    if isinstance(secret, ed25519.Ed25519PrivateKey):
        return "ed25519"
    raise SettingsError("c2pa_key", str(key), f"an RSA key, an Ed25519 key, or one of {', '.join(_CURVES)}")
