"""Polls for exports with Python's http.client: poll.py TASK

TASK is JSON: url, ca (null for HTTP), token, ids as [size, id], times. Prints how many milliseconds
each poll took, by size and by whether the connection was kept.
"""

import http.client
import json
import ssl
import sys
import time
import urllib.parse

task = json.loads(sys.argv[1])
url = urllib.parse.urlsplit(task["url"])
secure = ssl.create_default_context(cafile=task["ca"]) if task["ca"] else None


def connect():
    if secure:
        connection = http.client.HTTPSConnection(url.hostname, url.port, context=secure)
    else:
        connection = http.client.HTTPConnection(url.hostname, url.port)
    connection.connect()
    return connection


def poll(connection, size, id):
    start = time.perf_counter()
    # http.client sends head and body in two writes.
    connection.request("POST", url.path, json.dumps({"id": id}), {"X-Api-Key": task["token"]})
    response = connection.getresponse()
    answer = json.loads(response.read())
    took = 1000 * (time.perf_counter() - start)
    assert response.status == 200 and answer["state"] == "Finished", answer
    assert len(answer["ext_response"]["body"]) == size
    return took


times = {}
for size, id in task["ids"]:
    kept = connect()
    times[f"{size} kept"] = [poll(kept, size, id) for _ in range(task["times"])]
    times[f"{size} new"] = [poll(connect(), size, id) for _ in range(task["times"])]
print(json.dumps(times))
