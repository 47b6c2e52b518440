"""Plays the arbiter of a Databox, on libzmq with CURVE and ZAP: arbiter.py FOLDER [ENDPOINT]

Writes to FOLDER what a Databox mounts into a container: ARBITER_TOKEN (the service's) and ZMQ_PUBLIC_KEY,
and also APP_TOKEN. Listens at ENDPOINT, or on an address that nobody else uses, and prints it as JSON. Serves
Zest's GET /store/secret and POST /token like the real one: a new secret each time it is asked, no token for
a service that has not asked since the arbiter was started, and nothing for a service that it does not know. A
GET with observe, of any path, is answered with the key of its notification socket, which changes at each
start. That socket itself does not exist here.

It reads one JSON object per line and answers with one:

{"do": "count"}                        -> how often it was asked for a secret, a token and its instance, and how many
                                          connections ZAP has admitted
{"do": "mint", "destination": URL}     -> {"token": T}, or null where it cannot mint; more fields: "target",
                                          "path", "method"
{"do": "behave", "as": KIND}           -> from now on: "well"; "late" (answers after 10 s); "mute" (never
                                          answers); "unauthorized" (129, as before the container manager has
                                          told it of the service); "unavailable" (163); "gibberish" (an
                                          answer that is not Zest); "exclusive" (ZAP admits nobody); "old"
                                          (does not know observe)
{"do": "forget"}                       -> as if the service had been deregistered and registered again
{"do": "cut"}                          -> cannot be reached, as if a cable were pulled
{"do": "mend"}                         -> can be reached again, with nothing forgotten
{"do": "stop"}                         -> as if it were killed
{"do": "start", "as": KIND}            -> up again, with everything forgotten; or without ZeroMQ: "silent"
                                          (sends nothing), "garbage" (sends nonsense), "reset" (RST to everyone)

If its input ends (</dev/null, in the background) it runs on. To get a token over Zest, as an app does:

arbiter.py token FOLDER ENDPOINT DESTINATION
"""

import json
import os
import pathlib
import random
import secrets
import socket
import struct
import sys
import threading
import time
import uuid

import zmq
from pymacaroons import MACAROON_V1, Macaroon

GET, POST = 1, 2
CREATED, CONTENT, BAD_REQUEST, UNAUTHORIZED, INTERNAL_ERROR, UNAVAILABLE = 65, 69, 128, 129, 160, 163
URI_HOST, OBSERVE, URI_PATH, CONTENT_FORMAT, MAX_AGE, PUBLIC_KEY = 3, 6, 11, 12, 14, 2048


def take(message, at):
    """Reads a value that follows its 16-bit length; returns it and where it ends."""
    (length,) = struct.unpack_from(">H", message, at)
    return message[at + 2 : at + 2 + length], at + 2 + length


def parse(message):
    code, count = message[0], message[1]
    token, at = take(message, 2)
    options = {}
    for _ in range(count):
        (number,) = struct.unpack_from(">H", message, at)
        options[number], at = take(message, at + 2)
    return code, token, options, message[at:]


def compose(code, payload=b"", token=b"", options=()):
    message = struct.pack(">BBH", code, len(options), len(token)) + token
    for number, value in options:
        message += struct.pack(">HH", number, len(value)) + value
    return message + payload


class Arbiter:
    def __init__(self, folder, endpoint=None):
        # Nobody else uses this address, so the port is still free after a restart.
        bytes_ = [127] + [random.randrange(1, 255) for _ in range(3)]
        self.endpoint = endpoint or "tcp://%d.%d.%d.%d:4444" % tuple(bytes_)
        public, self.private = zmq.curve_keypair()
        # The tests search the logs for this mark.
        self.tokens = {f"MARK-secret-{secrets.token_urlsafe(24)}".encode(): name for name in ("export-service", "app")}
        folder.mkdir(parents=True, exist_ok=True)
        for token, name in self.tokens.items():
            file = {"export-service": "ARBITER_TOKEN", "app": "APP_TOKEN"}[name]
            (folder / file).write_bytes(token)
        (folder / "ZMQ_PUBLIC_KEY").write_bytes(public + b"\n")
        self.secrets = {}
        self.count = {"secrets": 0, "tokens": 0, "instances": 0, "connections": 0}
        self.kind = "well"
        self.stopping = threading.Event()
        self.threads = []
        self.start("well")

    def start(self, kind):
        self.secrets = {}
        self.instance, _ = zmq.curve_keypair()
        self.open(kind)

    def open(self, kind):
        self.stopping = threading.Event()
        if kind in ("silent", "garbage", "reset"):
            self.run(self.play, kind)
            return
        self.kind = kind
        context = zmq.Context()
        access = context.socket(zmq.REP)
        access.linger = 0
        access.bind("inproc://zeromq.zap.01")
        server = context.socket(zmq.ROUTER)
        server.linger = 0
        server.curve_server = True
        server.curve_secretkey = self.private
        server.zap_domain = b"databox"
        # A client that does not answer PINGs would lose its connection.
        server.heartbeat_ivl, server.heartbeat_timeout = 1000, 8000
        server.bind(self.endpoint)
        self.run(self.serve, context, access, server)

    def run(self, what, *arguments):
        thread = threading.Thread(target=what, args=(*arguments, self.stopping), daemon=True)
        thread.start()
        self.threads.append(thread)

    def stop(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join()
        self.threads = []

    def serve(self, context, access, server, stopping):
        poller = zmq.Poller()
        poller.register(access, zmq.POLLIN)
        poller.register(server, zmq.POLLIN)
        late = []
        while not stopping.is_set():
            ready = dict(poller.poll(20))
            if access in ready:
                version, request, *_ = access.recv_multipart()
                admitted = self.kind != "exclusive"
                self.count["connections"] += admitted
                status = [b"200", b"OK"] if admitted else [b"400", b"not you"]
                access.send_multipart([version, request, *status, b"", b""])
            if server in ready:
                *route, message = server.recv_multipart()
                answer = self.answer(message)
                if self.kind == "late":
                    late.append((time.monotonic() + 10, [*route, answer]))
                elif self.kind == "gibberish":
                    server.send_multipart([*route, b"\x45\xffgibberish"])
                elif self.kind != "mute":
                    server.send_multipart([*route, answer])
            while late and late[0][0] <= time.monotonic():
                server.send_multipart(late.pop(0)[1])
        context.destroy(linger=0)

    def play(self, kind, stopping):
        host, port = self.endpoint.removeprefix("tcp://").rsplit(":", 1)
        listener = socket.create_server((host, int(port)))
        listener.settimeout(0.02)
        open_ = []
        while not stopping.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            self.count["connections"] += 1
            if kind == "garbage":
                connection.sendall(b"\xff" + os.urandom(200))
            if kind == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
            else:
                open_.append(connection)
        listener.close()
        for connection in open_:
            connection.close()

    def answer(self, message):
        code, token, options, payload = parse(message)
        name, path = self.tokens.get(token), options.get(URI_PATH)
        observed = code == GET and OBSERVE in options and self.kind != "old"
        asked = {(GET, b"/store/secret"): "secrets", (POST, b"/token"): "tokens"}.get((code, path))
        if observed or asked:
            self.count["instances" if observed else asked] += 1
        if self.kind == "unavailable":
            return compose(UNAVAILABLE)
        if not {URI_PATH, URI_HOST, CONTENT_FORMAT} <= options.keys():
            return compose(INTERNAL_ERROR)
        if name is None or options[URI_HOST] != name.encode():
            return compose(UNAUTHORIZED)
        if self.kind == "unauthorized" and name == "export-service":
            return compose(UNAUTHORIZED)
        if observed:
            # Before the path is looked at.
            if options[OBSERVE] not in (b"", b"data", b"audit") or len(options.get(MAX_AGE, b"")) != 4:
                return compose(INTERNAL_ERROR)
            key = [(CONTENT_FORMAT, b"\0\0"), (PUBLIC_KEY, self.instance)]
            return compose(CONTENT, str(uuid.uuid4()).encode(), options=key)
        if (code, path) == (GET, b"/status"):
            return compose(CREATED)
        if asked == "secrets":
            self.secrets[name] = "MARK-secret-" + secrets.token_hex(16)
            return compose(CONTENT, self.secrets[name].encode())
        if asked == "tokens":
            minted = self.mint(json.loads(payload))
            return compose(CONTENT, minted.encode()) if minted else compose(UNAUTHORIZED)
        return compose(BAD_REQUEST)

    def mint(self, ask):
        secret = self.secrets.get(ask.get("target", "export-service"))
        if secret is None:
            return None
        macaroon = Macaroon(location="", identifier="", key=secret, version=MACAROON_V1)
        macaroon.add_first_party_caveat("path = " + ask.get("path", "/*"))
        macaroon.add_first_party_caveat("method = " + ask.get("method", "POST"))
        macaroon.add_first_party_caveat("target = " + ask.get("target", "export-service"))
        macaroon.add_first_party_caveat("destination = " + ask["destination"])
        token = macaroon.serialize()
        return token + "=" * (-len(token) % 4)

    def obey(self, ask):
        if ask["do"] == "mint":
            return {"token": self.mint(ask)}
        if ask["do"] == "behave":
            self.kind = ask["as"]
        elif ask["do"] == "forget":
            self.secrets = {}
        elif ask["do"] in ("cut", "stop"):
            self.stop()
        elif ask["do"] == "mend":
            self.open(self.kind)
        elif ask["do"] == "start":
            self.start(ask.get("as", "well"))
        return self.count


def token_of(folder, endpoint, destination):
    client = zmq.Context().socket(zmq.REQ)
    client.curve_serverkey = (folder / "ZMQ_PUBLIC_KEY").read_bytes().strip()
    client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
    client.rcvtimeo = 10_000
    client.linger = 0
    client.connect(endpoint)
    ask = {"target": "export-service", "path": "/lp/export", "method": "POST", "destination": destination}
    options = [(URI_PATH, b"/token"), (URI_HOST, b"app"), (12, struct.pack(">H", 50))]
    token = (folder / "APP_TOKEN").read_bytes()
    client.send(compose(POST, json.dumps(ask).encode(), token, options))
    try:
        code, _, _, payload = parse(client.recv())
    except zmq.Again:
        sys.exit(f"no arbiter with the key in {folder} answers at {endpoint}")
    if code != CONTENT:
        sys.exit(f"the arbiter answered {code}: it mints once export-service has asked for its secret")
    return payload.decode()


def main():
    if sys.argv[1] == "token":
        print(token_of(pathlib.Path(sys.argv[2]), sys.argv[3], sys.argv[4]))
        return
    arbiter = Arbiter(pathlib.Path(sys.argv[1]), *sys.argv[2:3])
    print(json.dumps({"endpoint": arbiter.endpoint}), flush=True)
    for line in sys.stdin:
        print(json.dumps(arbiter.obey(json.loads(line))), flush=True)
    while True:
        time.sleep(3600)


main()
