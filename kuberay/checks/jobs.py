"""Jobs: the Redis and the storage that all their processes share, and the time to finish them.

Each mistake starts well: jobs wait for ever, or are lost with a pod, later on.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from deployments.errors import ConfigError
from deployments.settings import Settings, parse_settings
from kuberay.checks.manifests import Document, Finding, Manifests, PodView, where
from kuberay.checks.timeouts import may_hold
from kuberay.render.serve_config import JOB_POLICY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.settings import JobSettings

_URL = "REDIS_URL"
_REFERENCE = re.compile(r"\$\(([^)]*)\)")
_PASSWORD = re.compile(r"://[^/@]*:([^@]*)@")
_WITHOUT_WORK = frozenset({"Ingress", "Redis"})


def check(manifests: Manifests) -> Iterator[Finding]:
    """Every mistake that loses, cuts off or forgets jobs."""
    for application in manifests.serve_config.get("applications") or []:
        try:
            jobs = parse_settings(Settings, application.get("args") or {}, "args").jobs
        except ConfigError:
            continue  # a finding of the check of the Serve config
        if jobs.enabled:
            yield from _redis(manifests)
            yield from _one_pod(manifests, jobs)
            yield from _grace(manifests, jobs)
            yield from _scaling(manifests, jobs)


def _redis(manifests: Manifests) -> Iterator[Finding]:
    """All who read it have the same REDIS_URL, or all use the application's own."""
    users = [pod for pod in manifests.pods if pod.role == "head" or _has_jobs(manifests, pod)]
    urls = {pod.where: pod.environment.get(_URL) for pod in users if _URL in pod.environment}
    for pod in users:
        if urls and pod.where not in urls:
            message = f"{_URL} is missing: it would look for jobs where no other pod puts them"
            yield Finding("redis-url", pod.where, message)
        elif urls:
            yield from _url(pod)
    if len(set(urls.values())) > 1:
        message = f"pods have different values of {_URL}: {sorted(map(str, set(urls.values())))}"
        yield Finding("redis-url", where(manifests.service), message)
    own = any(one.get("name") == "Redis" for one in manifests.deployments)
    if urls and own:
        message = f"with {_URL} the application has no deployment Redis: Serve would refuse it"
        yield Finding("redis-url", f"{where(manifests.service)} Redis", message)
    elif not (urls or own):
        message = f"without {_URL}, give the deployment Redis a label_selector: one pod has all"
        yield Finding("redis-url", f"{where(manifests.service)} Redis", message)


def _url(pod: PodView) -> Iterator[Finding]:
    """Kubernetes fills in a variable that stands above; it leaves any other as it is."""
    names, url = list(pod.environment), pod.environment[_URL] or ""
    above = names[: names.index(_URL)]
    if unknown := [name for name in _REFERENCE.findall(url) if name not in above]:
        message = f"{_URL} has $({unknown[0]}), and no variable of that name stands above it"
        yield Finding("redis-url", pod.where, message)
    password = _PASSWORD.search(url)
    if password and not _REFERENCE.fullmatch(password[1]):
        message = f"{_URL} shows a password: take it from a Secret, as $(NAME) of a variable above"
        yield Finding("redis-url", pod.where, message)


def _one_pod(manifests: Manifests, jobs: JobSettings) -> Iterator[Finding]:
    """Files on a disk, and a Redis on loopback, are for one pod alone."""
    groups = {group["groupName"]: group.get("maxReplicas", 1) for group in manifests.groups}
    pods = [pod for pod in manifests.pods if pod.role == "worker" and _has_jobs(manifests, pod)]
    most = sum(groups[pod.group] for pod in pods)
    place = where(manifests.service)
    if most > 1 and (jobs.storage or "file://").startswith("file://"):
        message = f"jobs.storage is on the disk of a pod, and up to {most} pods need it: set a"
        yield Finding("job-storage", place, f"{message} bucket, gs://… or s3://…")
    own = any(one.get("name") == "Redis" for one in manifests.deployments)
    if most > 1 and own:
        message = f"the application's own Redis answers in its pod only, and up to {most} pods"
        yield Finding("job-redis", place, f"{message} need it: set {_URL}")


def _grace(manifests: Manifests, jobs: JobSettings) -> Iterator[Finding]:
    """Whoever is scaled down finishes its jobs. What is not set follows from the code."""
    for one in manifests.deployments:
        grace_s = one.get("graceful_shutdown_timeout_s", jobs.run_timeout_s)
        if one.get("name") not in _WITHOUT_WORK and grace_s < jobs.run_timeout_s:
            message = f"graceful_shutdown_timeout_s {grace_s:g} cuts off jobs, which may run for"
            place = f"{where(manifests.service)} {one.get('name')}"
            yield Finding("job-grace", place, f"{message} {jobs.run_timeout_s:g} s")


def _scaling(manifests: Manifests, jobs: JobSettings) -> Iterator[Finding]:
    """By itself, Serve counts requests, and a worker gets none."""
    for one in (one for one in manifests.deployments if one.get("name") == "JobWorker"):
        place = f"{where(manifests.service)} JobWorker"
        scaling: Document = one.get("autoscaling_config") or {}
        policy: Document = scaling.get("policy") or {}
        namespace = (policy.get("policy_kwargs") or {}).get("namespace")
        if policy and (policy.get("policy_function"), namespace) != (JOB_POLICY, jobs.namespace):
            message = f"its policy does not count the jobs of {jobs.namespace}: {policy}"
            yield Finding("job-scaling", place, message)
        elif scaling and not policy and not scaling.get("min_replicas", 1):
            message = "min_replicas is 0 and there is no policy: no job would ever wake a worker"
            yield Finding("job-scaling", place, message)


def _has_jobs(manifests: Manifests, pod: PodView) -> bool:
    """Whether a pod may hold a replica that takes or carries jobs."""
    return pod.role == "worker" and any(
        one.get("name") in ("Ingress", "JobWorker") and may_hold(pod, one)
        for one in manifests.deployments
    )
