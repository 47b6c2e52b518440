"""Plays another machine: a process in a separate network namespace, controlled by lines of JSON

It prints a line once the namespace exists, so that one end of a link can be moved there. Then it reads one
JSON object per line and answers with one:

{"run": SCRIPT}      -> runs a shell script there
{"serve": PORT}      -> from now on, answers every POST to that port of all its addresses with 200
{"arrivals": true}   -> {"arrivals": [...]}, the `webhook-id`s of all POSTs so far
"""

import ctypes
import http.server
import json
import socket
import subprocess
import sys
import threading

CLONE_NEWNET = 0x40000000

arrivals = []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        arrivals.append(self.headers["webhook-id"])
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    # For both families: an IPv6 socket that accepts IPv4 too.
    address_family = socket.AF_INET6


def obey(ask):
    if "run" in ask:
        done = subprocess.run(["sh", "-ec", ask["run"]], capture_output=True, text=True)
        return {"error": done.stderr} if done.returncode else {}
    if "serve" in ask:
        server = Server(("::", ask["serve"]), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return {}
    return {"arrivals": arrivals}


libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(CLONE_NEWNET) != 0:
    sys.exit(f"no network namespace: error {ctypes.get_errno()}")
print("{}", flush=True)
for line in sys.stdin:
    print(json.dumps(obey(json.loads(line))), flush=True)
