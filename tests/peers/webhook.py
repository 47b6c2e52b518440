"""Verifies a Standard Webhooks message: webhook.py SECRET HEADERS-AS-JSON PAYLOAD"""

import json
import sys

from standardwebhooks.webhooks import Webhook

secret, headers, payload = sys.argv[1:]
Webhook(secret).verify(payload, json.loads(headers))
