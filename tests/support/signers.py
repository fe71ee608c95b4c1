"""Certificates that may sign pictures, and some that may not: an authority, a signer below it, the signer's key."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

EMAIL = ExtendedKeyUsageOID.EMAIL_PROTECTION
_USES = ("digital_signature", "key_cert_sign", "crl_sign")
_OTHER_USES = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")


@dataclass(frozen=True)
class Identity:
    """PEM files; `chain` has the signer's certificate and the authority's."""

    chain: Path
    key: Path
    authority: Path


def identity(
    folder: Path,
    key: CertificateIssuerPrivateKeyTypes | None = None,
    days: tuple[int, int] = (-1, 2),
    usage: x509.ObjectIdentifier = EMAIL,
    password: bytes = b"",
) -> Identity:
    """Write the files of a signer whose certificate is valid from and until so many days from now."""
    folder.mkdir(parents=True, exist_ok=True)
    key, above = key or ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = _certificate("Example Authority", "Example Authority", above, days)
    authority = authority.add_extension(x509.BasicConstraints(True, None), True)
    authority = authority.add_extension(_key_usage("key_cert_sign", "crl_sign"), True)
    root = authority.sign(above, hashes.SHA256())
    signer = _certificate("Example Signer", "Example Authority", key, days)
    signer = signer.add_extension(x509.BasicConstraints(False, None), True)
    signer = signer.add_extension(_key_usage("digital_signature"), True)
    signer = signer.add_extension(x509.ExtendedKeyUsage([usage]), False)
    signer = signer.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(above.public_key()), False)
    leaf = signer.sign(above, hashes.SHA256())
    made = Identity(folder / "chain.pem", folder / "key.pem", folder / "authority.pem")
    made.chain.write_bytes(leaf.public_bytes(Encoding.PEM) + root.public_bytes(Encoding.PEM))
    made.authority.write_bytes(root.public_bytes(Encoding.PEM))
    lock: KeySerializationEncryption = BestAvailableEncryption(password) if password else NoEncryption()
    made.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    return made


def with_another_pixel(file: bytes, kind: str) -> bytes:
    """The file with one bit of its compressed pixels turned over."""
    place = {"png": (b"IDAT", -40), "jpeg": (b"\xff\xda", 40), "webp": (b"VP8 ", 40)}
    begin, behind = place[kind]
    changed = bytearray(file)
    changed[file.rindex(begin) + behind] ^= 1
    return bytes(changed)


def _certificate(
    subject: str, issuer: str, key: CertificateIssuerPrivateKeyTypes, days: tuple[int, int]
) -> x509.CertificateBuilder:
    now, names = datetime.now(UTC), []
    for name in (subject, issuer):
        parts = ((NameOID.COMMON_NAME, name), (NameOID.ORGANIZATION_NAME, "Example Studio"))
        names.append(x509.Name([x509.NameAttribute(oid, part) for oid, part in parts]))
    builder = x509.CertificateBuilder(*reversed(names), key.public_key(), x509.random_serial_number())
    begin, end = (now + timedelta(days=day) for day in days)
    return builder.not_valid_before(begin).not_valid_after(end)


def _key_usage(*allowed: str) -> x509.KeyUsage:
    uses = {name: name in allowed for name in (*_USES, *_OTHER_USES)}
    return x509.KeyUsage(**uses, encipher_only=False, decipher_only=False)
