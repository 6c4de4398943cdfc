"""Certificates for tests of TLS, signed by a CA of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ernie_cluster.config.api import TlsConfig

DAY = timedelta(days=1)


@dataclass
class Authority:
    """A CA, with its certificate in a file.

    Args:
        folder: where its files go.
        name: of the CA; its files begin with it.
    """

    folder: Path
    name: str = "ca"
    key: EllipticCurvePrivateKey = field(default_factory=lambda: generate_private_key(SECP256R1()))

    def __post_init__(self) -> None:
        certificate = self._builder(self.name, self.key, -DAY, DAY).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.file = self.folder / f"{self.name}.pem"
        self.file.write_bytes(_pem(certificate.sign(self.key, hashes.SHA256())))

    def issue(
        self,
        *,
        start: timedelta = -DAY,
        end: timedelta = DAY,
        password: bytes | None = None,
        usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.SERVER_AUTH,
        stem: str = "server",
    ) -> TlsConfig:
        """A new pair for 127.0.0.1 in the files `<stem>.pem` and `<stem>.key`, valid from `start` to `end` from now."""
        key = generate_private_key(SECP256R1())
        names = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
        builder = self._builder(stem, key, start, end).add_extension(names, critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        certificate, key_file = self.folder / f"{stem}.pem", self.folder / f"{stem}.key"
        certificate.write_bytes(_pem(builder.sign(self.key, hashes.SHA256())))
        secrecy = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secrecy))
        return TlsConfig(str(certificate), str(key_file))

    def _builder(
        self, subject: str, key: EllipticCurvePrivateKey, start: timedelta, end: timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return x509.CertificateBuilder(
            issuer_name=_name(self.name),
            subject_name=_name(subject),
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now + start,
            not_valid_after=now + end,
        )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
