"""Holds documents to the schema of their kind, strictly: what a schema does not know is refused."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator

FOLDER = Path(__file__).parents[2] / "data" / "schemas"
KUBERNETES = "1.32"
KUSTOMIZATION = "kustomize.config.k8s.io/v1beta1"


def problem(document: dict[str, Any]) -> str:
    """What its schema says against a Kubernetes object, or ""."""
    api, kind = document["apiVersion"], document["kind"]
    if api == KUSTOMIZATION:
        return "" if set(document) <= {"apiVersion", "kind", "namespace", "resources"} else "unknown key"
    if not (FOLDER / f"{kind}.json").exists():
        return _built_in(document)
    schema = _schema(kind)
    if api != schema["apiVersion"]:
        return f"apiVersion {api}, not {schema['apiVersion']}"
    own = {k: v for k, v in document.items() if k != "metadata"}
    errors = sorted(schema["validator"].iter_errors(own), key=lambda e: e.json_path)
    return "; ".join(f"{e.json_path}: {e.message[:200]}" for e in errors)


def _built_in(document: dict[str, Any]) -> str:
    logging.getLogger("kubernetes-validate").setLevel(logging.ERROR)
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:300]}"
    return ""


@functools.cache
def _schema(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{kind}.json").read_text(encoding="utf-8"))
    found["validator"] = Draft202012Validator(_strict(found["schema"]))
    return found


def _strict(node: Any) -> Any:
    """Kubernetes' dialect as plain JSON schema, with unknown keys refused where keys are named."""
    if isinstance(node, list):
        return [_strict(n) for n in node]
    if not isinstance(node, dict):
        return node
    out = {k: _strict(v) for k, v in node.items()}
    if out.get("x-kubernetes-int-or-string") is True:
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if (
        isinstance(out.get("properties"), dict)
        and "type" in out
        and not out.get("x-kubernetes-preserve-unknown-fields")
    ):
        out.setdefault("additionalProperties", False)
    if out.get("nullable") is True and isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    return out
