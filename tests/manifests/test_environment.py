"""configs/gke.yaml: a mistake is refused, and named."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from deployments.errors import ConfigError, GpuTooSmall
from kuberay.render.files import render
from tests.manifests.conftest import LOCK, SOURCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Refused = Callable[..., str]

TEXT = SOURCE.read_text()


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Renders the source with a value changed; returns the error, without line breaks."""

    def run(path: str, value: object, error: type[Exception] = ConfigError) -> str:
        values: Any = yaml.safe_load(TEXT)
        node, (*steps, last) = values, path.split("|")
        for step in steps:
            node = node.setdefault(step, {})
        if value is None:
            node.pop(last)
        elif isinstance(value, dict) and isinstance(node.get(last), dict):
            node[last] |= value
        else:
            node[last] = value
        (tmp_path / "gke.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(error) as caught:
            render(tmp_path / "gke.yaml", LOCK)
        return " ".join(str(caught.value).split())

    return run


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("memory|process", "3Gig", "memory.process: Value error, '3Gig'"),
        ("memory|reserved", "4", "its unit"),
        ("memory|reserved", "26Gi", "memory.reserved leaves no memory"),
        ("cache|scratch", "10GiB", "cache.scratch"),
        ("cache|scratch", "-10Gi", "cache.scratch"),
        ("models|size|memory", "26Gig", "models.size"),
        ("models|size|memory", "-26Gi", "models.size: Value error, '-26Gi'"),
        ("models|size|memory", "31Gi", "does not fit a g2-standard-8"),
        ("head|size|cpu", "1e9999999", "not a Kubernetes quantity"),
        ("models|size|memory", None, "memory must be set"),
        ("models|size|nvidia.com/gpu", "0.5", "models.size has nvidia.com/gpu 0.5"),
        ("head|size|cpu", "two", "head.size"),
        ("head|size|cpu", "0", "head.size"),
        ("ingress|group|maxReplicas", None, "ingress.group.maxReplicas is missing"),
        ("ingress|group|maxReplicas", "four", "'four'"),
        ("ingress|group|maxReplicas", True, "True"),
        ("ingress|group|maxReplicas", 1, "does not hold"),
        ("models|group|minReplicas", -1, "-1"),
        ("serve|args|store", [1], "store"),
        ("serve|args|devise", "cpu", "devise"),
        ("serve|args|access", {"auth": "off"}, "user_config of the deployment Ingress"),
        ("serve|ingress|user_config|limits", {"max_input_px": 0}, "limits.max_input_px"),
        ("serve|args|models", "nowhere.yaml", "nowhere"),
        ("serve|models", {"cartoon": {}}, "cartoon"),
        ("serve|tracing_config", "on", "tracing_config: Input should be a valid dictionary"),
        ("timeouts_s|load_balancer", 3601, "load_balancer"),
        ("timeouts_s|engine", 0, "engine"),
        ("redis|address", "imagen-redis:6379", "redis.address: String should match"),
        ("redis|address", "redis://:password@redis:6379", "redis.address"),
        ("redis|address", "rediss://imagen-redis:6379", "has no TLS"),
        ("redis|own_ca", True, "has no TLS"),
        ("redis|disk", "8", "redis.disk"),
        ("redis", {"address": "redis://10.0.0.3:6379", "own_ca": True}, "rediss://"),
        ("cache|read_only", True, "stays empty"),
        ("cache|snapshot", "filled", "kind: claim"),
        ("cache|size", "1Ti", "kind: claim"),
        ("cache|path", "var/models", "cache.path: String should match"),
        ("cache|path", "/var", "cache.path"),
        ("cache|path", "/var/../etc", "cache.path"),
        ("cache|path", "/var/models/", "cache.path"),
        ("cache|copies", 40, "local SSD"),
        ("gpu|type", "b200", "b200"),
        ("gpu|machine", "g2-standard-9", "g2-standard-9"),
        ("images|extra", {"repository": "x/y"}, "extra"),
        ("name", "i" * 48, "name: String should have at most 47 characters"),
        ("name", "Imagen", "name: String should match pattern"),
        ("colour", "red", "colour"),
    ],
)
def test_a_wrong_value_is_named(refused: Refused, path: str, value: object, word: str) -> None:
    assert word in refused(f"base|{path}", value)


def test_a_gpu_that_is_too_small_is_named(refused: Refused) -> None:
    assert "2 x L4" in refused("base|gpu|max_nodes", 1, GpuTooSmall)


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("overlays", {"prod": None}, "overlays.prod"),
        ("overlays", {"prod": ["gke"]}, "overlays.prod"),
        ("overlays", {"../prod": {}}, "overlays.../prod.[key]: String should match"),
        ("overlays", ["prod"], "overlays: Input should be a valid dictionary"),
        ("overlay", {}, "overlay: Extra inputs"),
        ("overlays|dev|models|size|nvidia.com/gpu", "1", "dev in"),
        ("overlays|prod-hostpath|gpu|boot_disk_gb", 50, "boot_disk_gb 50"),
        ("overlays|prod-shared|cache|size", "1Gi", "Raise cache.size to 27Gi"),
    ],
)
def test_a_wrong_overlay_is_named(refused: Refused, path: str, value: Any, word: str) -> None:
    assert word in refused(path, value)


@pytest.mark.parametrize(("kind", "count"), [("models", "2"), ("models", None), ("head", "1")])
def test_pods_ask_for_the_gpus_of_a_node(refused: Refused, kind: str, count: str | None) -> None:
    assert f"{kind}.size" in refused(f"base|{kind}|size|nvidia.com/gpu", count)


@pytest.mark.parametrize("text", ["", "a: [", "base"])
def test_a_file_without_a_source_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "gke.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"gke\.yaml"):
        render(tmp_path / "gke.yaml", LOCK)


def test_a_file_of_alerts_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "monitoring").mkdir()
    (tmp_path / "monitoring" / "alerts.yaml").write_text("groups: [")
    shutil.copy(LOCK, tmp_path)
    with pytest.raises(ConfigError, match=r"alerts\.yaml"):
        render(SOURCE, tmp_path / LOCK.name)
