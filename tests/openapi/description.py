"""Prints the description as JSON, after checking that it is OpenAPI and that its examples are what it describes."""

import json
import os

import jsonschema_rs
import yaml
from openapi_spec_validator import validate

with open(os.path.join(os.path.dirname(__file__), "openapi.yaml"), encoding="utf-8") as file:
    document = yaml.safe_load(file)


def resolved(node):
    while isinstance(node, dict) and "$ref" in node:
        target = document
        for step in node["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        node = target
    return node


def check(schema, example, where):
    # The components beside the schema, for what it refers to.
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", "allOf": [schema]}
    whole["components"] = document["components"]
    for error in jsonschema_rs.validator_for(whole, validate_formats=True).iter_errors(example):
        raise SystemExit(f"an example of {where} is not what is described: {error}")


def walk(node, where):
    if isinstance(node, list):
        for number, item in enumerate(node):
            walk(item, f"{where}/{number}")
    if not isinstance(node, dict):
        return
    schema = node.get("schema")
    if schema is not None:
        if "example" in node:
            check(schema, node["example"], where)
        for name, example in node.get("examples", {}).items():
            check(schema, resolved(example)["value"], f"{where}/{name}")
    for name, item in node.items():
        if name not in ("example", "examples", "value"):
            walk(item, f"{where}/{name}")


validate(document)
walk(document, "")
print(json.dumps(document))
