"""Make the files beside this one from checkouts of the projects whose resources deploy/ uses.

    python tests/deploy/schemas/vendor.py ray-project/kuberay v1.7.0 CHECKOUT
    python tests/deploy/schemas/vendor.py skypilot          with an environment that has skypilot

A file holds the schemas of a project's kinds: the OpenAPI schemas of its CRDs without descriptions and defaults, as
JSON Schema, with what occurs several times (a pod template, above all) once. Fields that a CRD does not know are
dropped in silence by Kubernetes, and deprecated ones may do nothing; here both are errors.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

SOURCES = {
    "ray-project/kuberay": (
        "ray-operator/config/crd/bases/ray.io_{}.yaml",
        {"rayclusters": "v1", "rayjobs": "v1", "rayservices": "v1"},
    ),
    "kubernetes-sigs/kueue": (
        "config/components/crd/bases/kueue.x-k8s.io_{}.yaml",
        {"clusterqueues": "v1beta2", "localqueues": "v1beta2", "resourceflavors": "v1beta2"},
    ),
    "prometheus-operator/prometheus-operator": (
        "example/prometheus-operator-crd/monitoring.coreos.com_{}.yaml",
        {"podmonitors": "v1"},
    ),
}
KEPT = {"type", "properties", "required", "items", "enum", "pattern", "minimum", "maximum", "minItems", "maxItems"}
KEPT |= {"minLength", "maxLength", "additionalProperties", "anyOf", "oneOf", "allOf", "not"}
SHARED_FROM = 300
"""Length in JSON from which a part that occurs several times is written once."""


def trimmed(schema: Any) -> Any:
    """Return an OpenAPI schema of a CRD as a JSON Schema that knows no other fields."""
    if not isinstance(schema, dict):
        return schema
    found = {key: value for key, value in schema.items() if key in KEPT}
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("anyOf", None)
        found["type"] = ["integer", "string"]
    if "properties" in found:
        current = {name: inner for name, inner in found["properties"].items() if not is_deprecated(inner)}
        found["properties"] = {name: trimmed(inner) for name, inner in current.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found["additionalProperties"] = False
    for key in ("items", "additionalProperties", "not"):
        if isinstance(found.get(key), dict):
            found[key] = trimmed(found[key])
    return found


def is_deprecated(schema: dict[str, Any]) -> bool:
    """Whether a field is one that nothing reads any more, such as RayService's serviceUnhealthySecondThreshold."""
    return str(schema.get("description", "")).lower().startswith("deprecated")


def shared(schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the schemas with parts that occur several times moved to `$defs`."""
    texts: Counter[str] = Counter()

    def count(part: Any) -> None:
        for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            count(inner)
        if isinstance(part, dict) and ("properties" in part or "items" in part):
            texts[json.dumps(part, sort_keys=True)] += 1

    count(schemas)
    names = {text: f"part{n}" for n, (text, times) in enumerate(texts.items()) if times > 1 and len(text) > SHARED_FROM}

    def referred(part: Any, *, top: bool = False) -> Any:
        if isinstance(part, list):
            return [referred(inner) for inner in part]
        if not isinstance(part, dict):
            return part
        name = names.get(json.dumps(part, sort_keys=True)) if "properties" in part or "items" in part else None
        if name and not top:
            return {"$ref": f"#/$defs/{name}"}
        return {key: referred(inner) for key, inner in part.items()}

    parts = {name: referred(json.loads(text), top=True) for text, name in names.items()}
    return {"kinds": referred(schemas), "$defs": parts}


def main(project: str, version: str, checkout: str) -> None:
    path, kinds = SOURCES[project]
    schemas = {}
    for plural, api in kinds.items():
        shown = subprocess.run(
            ["git", "-C", checkout, "show", f"{version}:{path.format(plural)}"],
            check=True,
            capture_output=True,
            text=True,
        )
        spec = yaml.safe_load(shown.stdout)["spec"]
        (schema,) = (one["schema"]["openAPIV3Schema"] for one in spec["versions"] if one["name"] == api)
        found = trimmed(schema)
        found["properties"]["metadata"] = {"type": "object"}
        schemas[f"{spec['group']}/{api} {spec['names']['kind']}"] = found
    file = Path(__file__).with_name(f"{project.partition('/')[2]}.json")
    head = {"source": f"https://github.com/{project}", "version": version, "license": "Apache-2.0"}
    file.write_text(json.dumps({**head, **shared(schemas)}, separators=(",", ":"), sort_keys=True) + "\n")
    print(f"{file.name}: {len(schemas)} kinds, {file.stat().st_size / 1024:.0f} KiB")


def skypilot() -> None:
    """Write the JSON Schemas by which SkyPilot judges a task, its resources and its service."""
    from importlib.metadata import version

    from sky.utils import schemas

    parts = {
        "task": schemas.get_task_schema(),
        "resources": schemas.get_resources_schema(),
        "service": schemas.get_service_schema(),
    }
    head = {"source": "https://github.com/skypilot-org/skypilot", "version": f"v{version('skypilot')}"}
    file = Path(__file__).with_name("skypilot.json")
    file.write_text(
        json.dumps({**head, "license": "Apache-2.0", **parts}, separators=(",", ":"), sort_keys=True) + "\n"
    )
    print(f"{file.name}: {file.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    if sys.argv[1:] == ["skypilot"]:
        sys.exit(skypilot())
    if len(sys.argv) != 4 or sys.argv[1] not in SOURCES:
        sys.exit(__doc__)
    main(*sys.argv[1:])
