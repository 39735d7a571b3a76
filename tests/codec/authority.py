"""A CA on cryptography's own code: the root, the control plane's certificate, and whatever a signing request asks for."""

import datetime
import ipaddress
import os

import support

support.require("cryptography")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PEM = serialization.Encoding.PEM
SKEW = datetime.timedelta(minutes=1)


def _name(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _now():
    return datetime.datetime.utcnow()


def usage(**wanted):
    uses = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
    uses += ["key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]
    return x509.KeyUsage(**{use: wanted.get(use, False) for use in uses})


class Authority:
    """A root, kept in a directory, and what it signs."""

    def __init__(self, place=None):
        place = place or support.directory()
        os.makedirs(place, exist_ok=True)
        self.root_file, key_file = os.path.join(place, "root-cert.pem"), os.path.join(place, "root-key.pem")
        if os.path.exists(key_file):
            with open(key_file, "rb") as key, open(self.root_file, "rb") as root:
                self.key = serialization.load_pem_private_key(key.read(), None)
                self.certificate = x509.load_pem_x509_certificate(root.read())
            return
        self.key = ec.generate_private_key(ec.SECP256R1())
        until = _now() + datetime.timedelta(days=365)
        root = self._builder(_name("codec root"), self.key.public_key(), until)
        root = root.add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        root = root.add_extension(usage(key_cert_sign=True, crl_sign=True), critical=True)
        self.certificate = root.sign(self.key, hashes.SHA256())
        with open(self.root_file, "wb") as file:
            file.write(self.certificate.public_bytes(PEM))
        with open(key_file, "wb") as file:
            file.write(self._key_pem(self.key))

    @staticmethod
    def _key_pem(key):
        return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())

    def _builder(self, subject, key, until):
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(_name("codec root")).public_key(key)
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(_now() - SKEW).not_valid_after(until)

    def root_pem(self):
        return self.certificate.public_bytes(PEM).decode()

    def server(self, address):
        """Key and certificate of a TLS server at an address, in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self._builder(_name("control plane"), key.public_key(), _now() + datetime.timedelta(days=1))
        name = x509.IPAddress(ipaddress.ip_address(address))
        leaf = leaf.add_extension(x509.SubjectAlternativeName([name]), critical=False)
        leaf = leaf.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        leaf = leaf.sign(self.key, hashes.SHA256())
        return self._key_pem(key), leaf.public_bytes(PEM) + self.root_pem().encode()

    def sign(self, csr_pem, seconds, identity=None):
        """The leaf, in PEM, for a signing request; for another identity than it asks for if the caller says so."""
        request = x509.load_pem_x509_csr(csr_pem.encode())
        assert request.is_signature_valid, "the request is not signed by its key"
        key = request.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1", key
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        asked = self.identity(csr_pem)
        assert len(names) == 1, names
        leaf = self._builder(x509.Name([]), key, _now() + datetime.timedelta(seconds=seconds))
        name = x509.UniformResourceIdentifier(identity or asked)
        leaf = leaf.add_extension(x509.SubjectAlternativeName([name]), critical=True)
        leaf = leaf.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        leaf = leaf.add_extension(usage(digital_signature=True), critical=True)
        both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        leaf = leaf.add_extension(x509.ExtendedKeyUsage(both), critical=False)
        return leaf.sign(self.key, hashes.SHA256()).public_bytes(PEM).decode()

    @staticmethod
    def identity(csr_pem):
        """The only name in a request: a URI."""
        request = x509.load_pem_x509_csr(csr_pem.encode())
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        return uri
