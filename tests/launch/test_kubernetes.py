"""The manifests, against the schemas of Kubernetes and the models of Kubeflow's training operator."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.programs import ROOT

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
FOLDER = ROOT / "launch" / "kubernetes"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def problems(value: Any, kind: str, models: tuple[Any, ...], at: str = "") -> list[str]:
    """Where a value differs from a model of an OpenAPI client: ``V1Pod``, ``list[V1EnvVar]``, ``dict(str, str)``."""
    if container := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            return [f"{at}: expected a list"]
        return [text for i, item in enumerate(value) for text in problems(item, container[1], models, f"{at}[{i}]")]
    if container := re.fullmatch(r"dict\(str, (.+)\)", kind):
        if not isinstance(value, dict):
            return [f"{at}: expected a mapping"]
        return [text for key, item in value.items() for text in problems(item, container[1], models, f"{at}.{key}")]
    plain = {"str": str, "int": int, "bool": bool, "object": object}.get(kind)
    if plain is not None:
        fits = isinstance(value, plain) or (kind == "str" and at.endswith("gpu"))  # quantities may be numbers
        return (
            [] if fits and (kind == "object" or isinstance(value, bool) == (kind == "bool")) else [f"{at}: no {kind}"]
        )
    model = next(getattr(module, kind) for module in models if hasattr(module, kind))
    fields = {model.attribute_map[name]: of for name, of in model.openapi_types.items()}
    found = []
    for key, item in value.items():
        found += problems(item, fields[key], models, f"{at}.{key}") if key in fields else [f"{at}.{key}: unknown"]
    return found


def test_indexed_job() -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    service, job = documents(FOLDER / "indexed-job.yaml")
    for document in (service, job):
        schemas.validate(document, "1.31", strict=True)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    script = container["command"][2]
    assert spec["completions"] == spec["parallelism"] == int(re.findall(r"--nnodes=(\d+)", script)[0])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(re.findall(r"--nproc-per-node=(\d+)", script)[0])
    # The name of pod 0: <job>-<index>.<subdomain>, where the subdomain is that of the headless service.
    host, port = re.findall(r"--rdzv-endpoint=(\S+):(\d+)", script)[0]
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert container["ports"] == [{"containerPort": int(port)}]
    check_pod(pod)


def test_pytorchjob() -> None:
    models = pytest.importorskip("kubeflow.training.models", reason="kubeflow-training is not installed")
    client = pytest.importorskip("kubernetes.client.models")
    (job,) = documents(FOLDER / "pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    check = (models, client)
    assert problems(job, "KubeflowOrgV1PyTorchJob", check) == []
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    assert job["spec"]["elasticPolicy"]["maxReplicas"] == worker["replicas"]
    assert job["spec"]["nprocPerNode"] == str(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    check_pod(pod)
    pod["containers"][0]["comand"] = []
    job["spec"]["elasticPolicy"]["minReplicas"] = "2"
    found = problems(job, "KubeflowOrgV1PyTorchJob", check)
    assert sorted(text.rpartition(".")[2] for text in found) == ["comand: unknown", "minReplicas: no int"]


def check_pod(pod: dict[str, Any]) -> None:
    """What both need so that a pod that is asked to stop saves, and one that is made again goes on."""
    (container,) = pod["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert "--auto-resume" in [*container["command"], *container.get("args", [])]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
