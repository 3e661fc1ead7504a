"""The deployments of jobs: the manifests name those that the application makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from ray._common.utils import import_module_and_attr
from ray.serve._private.build_app import build_app

from deployments.tasks import Task
from kuberay.render.serve_config import JOB_POLICY
from serve_app.app import build
from serve_app.jobs.autoscaling import JobWorkerPolicy
from serve_app.jobs.connection import URL_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from kuberay.checks.manifests import Manifests

    Overlay = Callable[[str], Manifests]
URLS = {"prod": "redis://imagen-redis:6379/0", "dev": None}
# The application of these tests has the starter models, of which prod has no text to image.
NOT_SERVED = {"prod": {Task.GENERATE.deployment}, "dev": set[str]()}


def made(monkeypatch: pytest.MonkeyPatch, url: str | None) -> dict[str, Any]:
    """The deployments of the application, by name, where REDIS_URL is this."""
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    if url:
        monkeypatch.setenv(URL_VARIABLE, url)
    return {one.name: one for one in build_app(build({}), name="imagen").deployments}


@pytest.mark.parametrize("name", URLS)
def test_an_overlay_names_the_deployments_of_the_application(
    name: str, overlay: Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve refuses a config that names another one."""
    named = {one["name"] for one in overlay(name).deployments}
    assert named == made(monkeypatch, URLS[name]).keys() - NOT_SERVED[name]


def test_workers_start_at_zero_where_the_controller_can_count_jobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert import_module_and_attr(JOB_POLICY)[1] is JobWorkerPolicy
    scaled = made(monkeypatch, URLS["prod"])["JobWorker"]._deployment_config.autoscaling_config
    assert (scaled.min_replicas, scaled.policy.policy_function) == (0, JOB_POLICY)
    alone = made(monkeypatch, None)["JobWorker"]._deployment_config.autoscaling_config
    assert (alone.min_replicas, alone.max_replicas) == (1, 1)
    assert alone.policy.is_default_policy_function()
