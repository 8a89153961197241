"""Certificates for STLS and for implicit TLS: one source for both, and one made at first start.

TLS 1.2 and 1.3 only, forward secrecy and AEAD only, no compression, no renegotiation (RFC 9325);
the ALPN name is `pop3` (RFC 7301), against cross-protocol
attacks. Over 400 lines, a third of them the words that say what is wrong with a file.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import cast

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import NameOID
from OpenSSL import SSL, crypto
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOProtocol
from zope.interface import implementer

from popdrop.asowner import as_owner
from popdrop.credentials import acceptable_name
from popdrop.errors import ConfigError
from popdrop.selfmade import make as _make
from popdrop.values import PeerFacts

log = Logger()

CIPHERS = b"ECDHE+AESGCM:ECDHE+CHACHA20:!aNULL"
"""For TLS 1.2."""

CIPHERS_OF_13 = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
"""All are good, and so the first is the quickest: a handshake makes some twenty hashes."""

LAYOUTS = (("fullchain.pem", "privkey.pem"), ("tls.crt", "tls.key"))
"""Names of chain and key in a folder: certbot's, and those of a Kubernetes secret."""

SELF_MADE = "self-made.pem"

WARN_BEFORE = timedelta(days=21)
"""How long before its end a certificate is a warning: certbot renews 30 days before it."""

COMMON_LIFE = timedelta(days=90)
"""A certificate for less is a warning for the same share of its life: 10 days of 45."""

DAY = timedelta(days=1)
"""Between two lines of one cause; also the life of the keys of session tickets (RFC 9325
section 7.4 wants them changed)."""

SESSION_CONTEXT = b"popdrop"
"""Without one OpenSSL refuses resumed sessions where client certificates are asked for."""

PrivateKey = (
    rsa.RSAPrivateKey
    | ec.EllipticCurvePrivateKey
    | ed25519.Ed25519PrivateKey
    | ed448.Ed448PrivateKey
)

_CERTIFICATE_BLOCK = re.compile(
    rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL
)
_KEY_BLOCK = re.compile(rb"-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?-----END \1-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A certificate with its key, and the certificates that lead to its root."""

    path: str
    leaf: x509.Certificate
    chain: tuple[x509.Certificate, ...]
    key: PrivateKey

    @property
    def names(self) -> frozenset[bytes]:
        """DNS names in lower case, `*.` ones too; the common name where there is no other."""
        try:
            extension = self.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
            found = extension.value.get_values_for_type(x509.DNSName)
        except x509.ExtensionNotFound:
            common = self.leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            found = [str(attribute.value) for attribute in common]
        return frozenset(name.lower().encode("utf-8", "replace") for name in found)

    @property
    def ends(self) -> datetime:
        return self.leaf.not_valid_after_utc

    def current(self, now: datetime) -> bool:
        return self.leaf.not_valid_before_utc <= now <= self.ends

    def aged(self, now: datetime) -> bool:
        """Whether it is time that somebody renews it."""
        life = self.ends - self.leaf.not_valid_before_utc
        return now > self.ends - WARN_BEFORE * min(1.0, life / COMMON_LIFE)


class _Daily:
    """A warning is written once a day, however often there is cause: files are read each minute."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._told: dict[str, datetime] = {}

    def due(self, cause: str) -> bool:
        """Whether `cause` was not told of within a day. It is now."""
        now = self._clock()
        self._told = {each: when for each, when in self._told.items() if now - when < DAY}
        if cause in self._told:
            return False
        self._told[cause] = now
        return True

    def forget(self, cause: str) -> None:
        """What is over and comes again is told of again."""
        self._told.pop(cause, None)


Facts = tuple[int, int, int, int]


def _facts(found: os.stat_result) -> Facts:
    """What changes when a file does, or when a folder gets a new one."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _facts_now(path: str) -> Facts | None:
    try:
        return _facts(os.stat(path))
    except OSError:
        return None


class _Reader:
    """Reads pairs from files; every complaint names the option, the file and the remedy.

    `seen` is what files and folders were when they were read: a change after that is a change.
    """

    def __init__(self, option: str, daily: _Daily | None = None) -> None:
        self._option = option
        self._daily = daily
        self.files: list[str] = []
        self.seen: dict[str, Facts | None] = {}

    def wrong(self, what: str) -> ConfigError:
        return ConfigError(f"{self._option}: {what}")

    def octets(self, path: str) -> bytes:
        self.files.append(path)
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                self.seen[path] = _facts(status)
                found = file.read()
                open_to_all = status.st_mode & 0o004 and _KEY_BLOCK.search(found)
                if open_to_all and (self._daily is None or self._daily.due(f"open {path}")):
                    log.warn("Everybody may read the private key in {path}: chmod o-r", path=path)
                return found
        except FileNotFoundError:
            raise self.wrong(f"there is no file {path}; name an existing one") from None
        except PermissionError:
            raise self.wrong(
                f"{path} may not be read; give the user that Popdrop runs as the right,"
                " for instance with chgrp popdrop and chmod 0640"
            ) from None
        except OSError as error:
            raise self.wrong(f"{path} cannot be read: {error.strerror}") from None

    def pair(self, certificate_path: str, key_path: str, chain_path: str | None = None) -> _Pair:
        """The certificate that belongs to the key is the leaf, whichever comes first."""
        certificates = self.certificates(certificate_path)
        key = self.key(key_path)
        if chain_path is not None:
            certificates += self.certificates(chain_path)
        public = _public_octets(key)
        for leaf in certificates:
            if _public_octets(leaf) == public:
                break
        else:
            raise self.wrong(
                f"the key in {key_path} does not belong to a certificate in {certificate_path};"
                " install key and certificate together"
            )
        chain = tuple(each for each in certificates if each is not leaf)
        return _Pair(certificate_path, leaf, chain, key)

    def certificates(self, path: str) -> list[x509.Certificate]:
        blocks = _CERTIFICATE_BLOCK.findall(self.octets(path))
        try:
            return x509.load_pem_x509_certificates(b"\n".join(blocks))
        except ValueError:
            raise self.wrong(
                f"{path} holds no readable certificate;"
                " PEM with a line -----BEGIN CERTIFICATE----- is needed"
            ) from None

    def key(self, path: str) -> PrivateKey:
        block = _KEY_BLOCK.search(self.octets(path))
        if block is None:
            raise self.wrong(
                f"{path} holds no private key; PEM with a line -----BEGIN PRIVATE KEY----- is"
                " needed, in the file of the certificate or in one of its own"
            )
        try:
            key = serialization.load_pem_private_key(block.group(), None)
        except TypeError:
            raise self.wrong(
                f"the private key in {path} is locked by a password;"
                " take that off with openssl pkey -in OLD -out NEW"
            ) from None
        except Exception:
            raise self.wrong(f"the private key in {path} is damaged; install it again") from None
        if not isinstance(key, PrivateKey):
            raise self.wrong(f"the private key in {path} is of no use for TLS; use ECDSA or RSA")
        return key

    def folder(self, path: str) -> list[_Pair]:
        """The pairs in `path` itself, then those one folder down, each by name."""
        pairs = list(self._here(path))
        for name in self._names(path):
            below = os.path.join(path, name)
            if os.path.isdir(below):
                pairs += self._here(below)
        if not pairs:
            raise self.wrong(
                f"the folder {path} holds no certificate; fullchain.pem with privkey.pem are"
                " needed (certbot's layout), there or one folder down, or a .pem file with both"
            )
        return pairs

    def _names(self, path: str) -> list[str]:
        self.seen.setdefault(path, _facts_now(path))
        try:
            return sorted(os.listdir(path))
        except OSError as error:
            raise self.wrong(
                f"the folder {path} cannot be read: {error.strerror};"
                " give the user that Popdrop runs as the right"
            ) from None

    def _here(self, path: str) -> Iterator[_Pair]:
        names = self._names(path)
        for chain, key in LAYOUTS:
            if chain in names or key in names:
                yield self.pair(os.path.join(path, chain), os.path.join(path, key))
        known = {name for layout in LAYOUTS for name in layout}
        for name in names:
            whole = os.path.join(path, name)
            if name.endswith(".pem") and name not in known and os.path.isfile(whole):
                octets = self.octets(whole)
                if _KEY_BLOCK.search(octets) and _CERTIFICATE_BLOCK.search(octets):
                    yield self.pair(whole, whole)


@implementer(IOpenSSLServerConnectionCreator)
class Certificates:
    """What TLS connections are made from: for `startTLS` and for `TLSMemoryBIOFactory`.

    `path` is a PEM file with chain and key, or a folder (certbot's layout, directly or by name
    one folder down); with `key`, `path` holds the certificates alone; `chain` adds more.
    A client that names a server (SNI, RFC 6066 section 3) gets the certificate of that name, of
    several the one that lasts longest; every other client gets the first that is valid.
    `client_ca` is a PEM file: clients are asked for a certificate and need not have one, but one
    that this authority did not sign ends the handshake.
    `option` begins every complaint. `clock` tells the time, with its zone. Raises `ConfigError`.

    An expired certificate is served, with a warning: a client that checks it tells its user why
    it does not go on, and one that does not check it goes on as before.
    """

    def __init__(
        self,
        path: str,
        *,
        key: str | None = None,
        chain: str | None = None,
        option: str = "",
        client_ca: str | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._source = (path, key, chain, option or f"--starttls {path}")
        self._client_ca = client_ca
        self._clock = clock
        self._daily = _Daily(clock)
        self.files: tuple[str, ...] = ()
        self._seen: dict[str, Facts | None] = {}
        self._roots: list[x509.Certificate] = []
        self._begin: SSL.Context | None = None
        self._begun = clock()
        self._refused = ""
        self._read()
        self._warn_of_age()

    @property
    def ends(self) -> dict[str, datetime]:
        """When each of the certificates ends that clients are shown, by its file."""
        return {pair.path: pair.ends for pair in self._shown}

    @property
    def refused(self) -> bool:
        """Whether the files hold a pair that cannot be used, so that an older one is served."""
        return bool(self._refused)

    def _read(self) -> None:
        path, key, chain, option = self._source
        reader = _Reader(option, self._daily)
        if key is None and os.path.isdir(path):
            pairs = reader.folder(path)
        else:
            pairs = [reader.pair(path, key or path, chain)]
        authority = _Reader(f"--client-ca {self._client_ca}")
        roots = authority.certificates(self._client_ca) if self._client_ca is not None else []
        files = tuple(dict.fromkeys(reader.files + authority.files))
        now = self._clock()
        contexts = [(pair, self._context_of(reader, pair, roots)) for pair in pairs]
        default = next((each for each in contexts if each[0].current(now)), contexts[0])
        by_name: dict[bytes, tuple[_Pair, SSL.Context]] = {}
        for each in sorted(contexts, key=lambda each: each[0].ends):
            by_name.update(dict.fromkeys(each[0].names, each))
        # All at once, at the end: a pair that is broken changes nothing.
        self.files, self._seen = files, reader.seen | authority.seen
        self._default = default[1]
        self._by_name = {name: context for name, (_, context) in by_name.items()}
        # Of several for one name the others are left over, and may end as they like.
        self._shown = tuple({id(pair): pair for pair, _ in (default, *by_name.values())}.values())
        if self._begin is None or roots != self._roots:
            # A resumed session is not verified again: none outlives a change of the authority.
            self._renew_tickets(roots)

    def _renew_tickets(self, roots: list[x509.Certificate]) -> None:
        self._begin, self._roots, self._begun = self._context(roots), roots, self._clock()

    def refresh(self) -> None:
        """Read the files again if they have changed. Blocking; sessions in progress go on.

        A pair that cannot be used leaves the old one in its place and one line a day in the log.
        So does a certificate that ends soon.
        """
        if self._clock() - self._begun >= DAY:
            self._renew_tickets(self._roots)
        if any(_facts_now(path) != facts for path, facts in self._seen.items()):
            self._read_again()
        elif self._refused:
            self._over()  # the files are the old ones again
        self._warn_of_age()

    def _read_again(self) -> None:
        try:
            self._read()
        except ConfigError as error:
            if str(error) != self._refused:
                self._over()
            self._refused = str(error)
            if self._daily.due(self._refused):
                log.error("{error}; the old certificate stays in use", error=self._refused)
        else:
            self._over()
            log.info("read {path} again", path=self._source[0])

    def _over(self) -> None:
        self._daily.forget(self._refused)
        self._refused = ""

    def _warn_of_age(self) -> None:
        now = self._clock()
        for pair in self._shown:
            if not pair.current(now):
                text = "The certificate in {path} is valid from {start} to {end} only: renew it"
            elif pair.aged(now):
                text = "The certificate in {path} ends in {days} days, at {end}: renew it"
            else:
                continue
            if self._daily.due(f"{text} {pair.path} {pair.ends}"):
                log.warn(
                    text,
                    path=pair.path,
                    start=pair.leaf.not_valid_before_utc,
                    end=pair.ends,
                    days=(pair.ends - now).days,
                )

    def serverConnectionForTLS(self, protocol: TLSMemoryBIOProtocol) -> SSL.Connection:
        """A fresh server connection. The client's greeting decides on its certificate.

        It begins with a context that has none. OpenSSL keeps the keys of session tickets there,
        so that tickets hold over a renewal, and are good for every name.
        """
        return SSL.Connection(cast(SSL.Context, self._begin), None)

    def _context(self, roots: list[x509.Certificate]) -> SSL.Context:
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
        context.set_options(SSL.OP_CIPHER_SERVER_PREFERENCE)
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)
        # Sessions are resumed by tickets, which the clients keep; a cache here would only grow.
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_cipher_list(CIPHERS)
        context.set_tls13_ciphersuites(CIPHERS_OF_13)
        context.set_alpn_select_callback(_choose_protocol)
        context.set_tlsext_servername_callback(self._choose_certificate)
        if roots:
            _ask_for_certificate(context, roots)
        return context

    def _context_of(
        self, reader: _Reader, pair: _Pair, roots: list[x509.Certificate]
    ) -> SSL.Context:
        context = self._context(roots)
        try:
            context.use_certificate(pair.leaf)
            context.use_privatekey(pair.key)
            for certificate in pair.chain:
                context.add_extra_chain_cert(certificate)
            context.check_privatekey()
        except SSL.Error as error:
            reasons = ", ".join(each[-1] for each in error.args[0]) if error.args else ""
            raise reader.wrong(
                f"OpenSSL refuses the certificate in {pair.path} or its key ({reasons});"
                " use ECDSA P-256 or RSA of 2048 bits or more"
            ) from None
        return context

    def _choose_certificate(self, connection: SSL.Connection) -> None:
        """Called for every client, whether it names a server or not."""
        name = (connection.get_servername() or b"").lower().rstrip(b".")
        context = self._by_name.get(name) or self._by_name.get(b"*." + name.partition(b".")[2])
        connection.set_context(context or self._default)


class Keyring:
    """One `Certificates` for each set of files, however many options name it."""

    def __init__(self, client_ca: str | None = None) -> None:
        self._known: dict[tuple[str, str | None, str | None], Certificates] = {}
        self._client_ca = client_ca

    def get(
        self, path: str, *, key: str | None = None, chain: str | None = None, option: str = ""
    ) -> Certificates:
        """As `Certificates`, which is read at the first call only."""
        files = (path, key, chain)
        if files not in self._known:
            self._known[files] = Certificates(
                path, key=key, chain=chain, option=option, client_ca=self._client_ca
            )
        return self._known[files]

    def refresh(self) -> None:
        """As `Certificates.refresh`, for all of them."""
        for certificates in self._known.values():
            certificates.refresh()

    def ends(self) -> dict[str, datetime]:
        """When each of the certificates ends that clients are shown, by its file."""
        return {path: end for each in self._known.values() for path, end in each.ends.items()}

    def refused(self) -> int:
        """How many sets of files hold a pair that cannot be used."""
        return sum(each.refused for each in self._known.values())


def tls_facts(transport: object, facts: PeerFacts) -> PeerFacts:
    """`facts`, and what TLS adds: version and cipher, as `TLSv1.3` and `TLS_AES_256_GCM_SHA384`.

    Also channel bindings, and the name in the client's certificate. The same `facts` without TLS,
    and as long as the handshake is not done.
    """
    get_handle = getattr(transport, "getHandle", None)
    handle = None if get_handle is None else get_handle()
    if not isinstance(handle, SSL.Connection):
        return facts
    cipher = handle.get_cipher_name()
    if cipher is None:
        return facts
    certificate = handle.get_peer_certificate(as_cryptography=True)
    version = handle.get_protocol_version_name()
    return replace(
        facts,
        tls_version=version,
        tls_cipher=cipher,
        bindings=Bindings(handle, version),
        certificate_name=None if certificate is None else certificate_name(certificate),
    )


EXPORTER = "tls-exporter"
END_POINT = "tls-server-end-point"


class Bindings(Mapping[str, bytes]):
    """Channel bindings of one connection, made when they are asked for: few clients use them.

    `tls-exporter` (RFC 9266) is there for TLS 1.3 alone: before, it needs the extended master
    secret, of which OpenSSL's Python interface does not tell. `tls-server-end-point` (RFC 5929
    section 4) is there for certificates whose signature uses one hash.
    """

    def __init__(self, connection: SSL.Connection, version: str) -> None:
        self._connection = connection
        self._modern = version == "TLSv1.3"

    def __getitem__(self, name: str) -> bytes:
        found = None
        if name == EXPORTER and self._modern:
            found = self._connection.export_keying_material(b"EXPORTER-Channel-Binding", 32, b"")
        elif name == END_POINT:
            found = _end_point(self._connection)
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        if self._modern:
            yield EXPORTER
        if END_POINT in self:
            yield END_POINT

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return self._modern or END_POINT in self


def _end_point(connection: SSL.Connection) -> bytes | None:
    """The hash of the certificate that was sent, by the hash of its own signature."""
    certificate = connection.get_certificate(as_cryptography=True)
    if certificate is None:
        return None
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return None
    if isinstance(algorithm, hashes.MD5 | hashes.SHA1):
        algorithm = hashes.SHA256()
    return None if algorithm is None else certificate.fingerprint(algorithm)


def certificate_name(certificate: x509.Certificate) -> str | None:
    """Who a client certificate is for: its mail address (SAN), else its common name.

    `None` where there is none, where there are several, and where it could be no account's. A
    certificate without a name is nobody's (CVE-2019-3814).
    """
    try:
        names: list[str] = []
        try:
            san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
            names = san.value.get_values_for_type(x509.RFC822Name)
        except x509.ExtensionNotFound:
            pass
        if not names:
            common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            names = [str(attribute.value) for attribute in common]
        if len(names) != 1 or not acceptable_name(names[0].encode("utf-8")):
            return None
    except ValueError:
        return None  # what OpenSSL has verified, Python's reader may still find malformed
    return names[0]


def _ask_for_certificate(context: SSL.Context, roots: list[x509.Certificate]) -> None:
    store = context.get_cert_store()
    names = []
    for root in roots:
        certificate = crypto.X509.from_cryptography(root)
        if store is not None:
            store.add_cert(certificate)
        names.append(certificate.get_subject())
    context.set_client_ca_list(names)
    context.set_session_id(SESSION_CONTEXT)
    context.set_verify(SSL.VERIFY_PEER, None)


def self_made(folder: str, hostname: str) -> str:
    """Path of a PEM file in `folder` with a self-signed certificate for `hostname` and its key.

    ECDSA P-256, for 825 days, file mode 0600. Made once and used again until it expires, since
    people tell their clients to trust it. Two processes that start together get the same one.
    Raises `ConfigError`.
    """
    path = os.path.join(folder, SELF_MADE)
    option = f"self-made certificate {path}"
    old = None
    if os.path.lexists(path):
        with as_owner(folder):
            old = _Reader(option).pair(path, path)
    now = datetime.now(UTC)
    if old is not None and now < old.leaf.not_valid_after_utc:
        return path
    # Before the rights change: this imports, maybe from where only root can read.
    text = _make(hostname, now)
    try:
        with as_owner(folder):
            _put(text, path, new=old is None)
    except OSError as error:
        raise ConfigError(
            f"{option}: cannot be made: {error.strerror}; create the folder {folder}"
            " with mode 0700 for the user that Popdrop runs as, or name a certificate"
        ) from None
    log.info("Made a self-signed certificate for {name} in {path}", name=hostname, path=path)
    return path


def _put(text: bytes, path: str, *, new: bool) -> None:
    """Make the file, whole or not at all. A `new` one is left out where there is one by now."""
    draft = f"{path}.{secrets.token_hex(8)}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        if new:
            os.link(draft, path)
        else:
            os.rename(draft, path)
    except FileExistsError:
        pass
    finally:
        if os.path.exists(draft):
            os.unlink(draft)


def _public_octets(owner: PrivateKey | x509.Certificate) -> bytes:
    return owner.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _choose_protocol(connection: SSL.Connection, offered: list[bytes]) -> bytes:
    """Called when a client offers a list: `pop3`, or alert 120 (no_application_protocol).

    pyOpenSSL sends that alert when this raises, and raises the same again from the handshake,
    where Twisted expects an `SSL.Error`.
    """
    if b"pop3" in offered:
        return b"pop3"
    raise SSL.Error([("SSL routines", "ALPN", "no application protocol")])
