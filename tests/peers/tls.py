"""HTTPS servers with good and bad certificates, on OpenSSL: tls.py FOLDER [NAME...]

Writes the CA of most certificates to FOLDER/ca.pem, and prints one line of JSON: the port of each server
by its name. Each answers every request with 200 and `ok`. For each line that it reads, it prints how many
bytes of requests each server has received so far. Good certificates are for `localhost`, 127.0.0.1 and
each NAME.
"""

import datetime
import ipaddress
import json
import pathlib
import re
import ssl
import socket
import sys
import threading

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

folder = pathlib.Path(sys.argv[1])
now = datetime.datetime.now(datetime.timezone.utc)
day = datetime.timedelta(days=1)


def certificate(subject, key, issuer, issuer_key, start, end, names=(), ca=False):
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer_key or key, hashes.SHA256())


def new_key():
    return ec.generate_private_key(ec.SECP256R1())


def pem(certificate):
    return certificate.public_bytes(serialization.Encoding.PEM)


local = [x509.DNSName(name) for name in ["localhost", *sys.argv[2:]]]
local += [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
other = [x509.DNSName("another.example")]
ca_key, stranger_key = new_key(), new_key()
ca = certificate("Home CA", ca_key, None, None, now - 30 * day, now + 30 * day, ca=True)
stranger = certificate("A stranger", stranger_key, None, None, now - day, now + day, ca=True)
(folder / "ca.pem").write_bytes(pem(ca))

# By name: issuer and its key, validity, names.
kinds = {
    "good": (ca, ca_key, now - day, datetime.datetime(2049, 5, 17, tzinfo=datetime.timezone.utc), local),
    "expired": (ca, ca_key, now - 9 * day, datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.timezone.utc), local),
    "early": (ca, ca_key, datetime.datetime(2048, 2, 29, tzinfo=datetime.timezone.utc), now + 9000 * day, local),
    "misnamed": (ca, ca_key, now - day, now + day, other),
    "stranger": (stranger, stranger_key, now - day, now + day, local),
    "self_signed": (None, None, now - day, now + day, local),
}
received = dict.fromkeys(kinds, 0)


def serve(kind, listener, context):
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(kind, connection, context), daemon=True).start()


def answer(kind, connection, context):
    try:
        with context.wrap_socket(connection, server_side=True) as secure:
            # Reads everything, since closing with unread data resets the connection.
            data, end = b"", None
            while end is None or len(data) < end:
                more = secure.recv(65536)
                if not more:
                    return
                received[kind] += len(more)
                data += more
                if end is None and b"\r\n\r\n" in data:
                    head = data.index(b"\r\n\r\n") + 4
                    length = re.search(rb"(?i)content-length: *(\d+)", data)
                    end = head + int(length.group(1))
            secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
    except OSError:
        pass  # a client that refuses the certificate disconnects


ports = {}
for kind, (issuer, issuer_key, start, end, names) in kinds.items():
    if end < start:
        start = end - day
    key = new_key()
    leaf = certificate("server", key, issuer, issuer_key, start, end, names)
    path = folder / f"{kind}.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + pem(leaf)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    listener = socket.create_server(("127.0.0.1", 0))
    ports[kind] = listener.getsockname()[1]
    threading.Thread(target=serve, args=(kind, listener, context), daemon=True).start()

print(json.dumps(ports), flush=True)
for _ in sys.stdin:
    print(json.dumps(received), flush=True)
