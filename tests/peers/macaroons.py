"""Mints and checks macaroons with pymacaroons: one JSON request per line in, one answer out.

{"do": "mint", "secret": S, "identifier": I, "caveats": [...], "version": 1|2, "json": bool,
 "location": L, "third_party": bool, "later": [...]}          -> {"token": T}
{"do": "verify", "secret": S, "token": T}                     -> {"identifier": I, "caveats": [...]}
"later" are caveats that an app adds to a token that it was given, without the secret.
"""

import json
import sys

from pymacaroons import MACAROON_V1, MACAROON_V2, Macaroon, Verifier
from pymacaroons.serializers import JsonSerializer


def mint(ask):
    macaroon = Macaroon(
        location=ask.get("location", ""),
        identifier=ask.get("identifier", ""),
        key=ask["secret"],
        version=MACAROON_V2 if ask.get("version") == 2 else MACAROON_V1,
    )
    for caveat in ask["caveats"]:
        macaroon.add_first_party_caveat(caveat)
    if ask.get("third_party"):
        macaroon.add_third_party_caveat("https://other.example/", "key of the other", "its id")
    if ask.get("later"):
        macaroon = Macaroon.deserialize(macaroon.serialize())
        for caveat in ask["later"]:
            macaroon.add_first_party_caveat(caveat)
    if ask.get("json"):
        return {"token": macaroon.serialize(JsonSerializer())}
    return {"token": macaroon.serialize()}


def verify(ask):
    macaroon = Macaroon.deserialize(ask["token"])
    seen = []
    verifier = Verifier()
    verifier.satisfy_general(lambda caveat: seen.append(caveat) or True)
    verifier.verify(macaroon, ask["secret"])
    identifier = macaroon.identifier
    if isinstance(identifier, bytes):
        identifier = identifier.decode()
    return {"identifier": identifier, "caveats": seen}


for line in sys.stdin:
    ask = json.loads(line)
    try:
        answer = {"mint": mint, "verify": verify}[ask["do"]](ask)
    except Exception as error:  # the test gets the message, and fails with it
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
