"""Filling a node's store: one short-lived actor per node, asked by every replica that starts there.

Serve has no hook before the first replica of a node, so the replicas create the actor. It must end,
because any living actor, even one without a CPU, keeps its node from being scaled down.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import exit_actor
from ray.exceptions import RayActorError, RayTaskError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deployments.catalogue import Catalogue, load_catalogue
from deployments.errors import SetupError, SourceFailed
from deployments.gpu.target import this_target
from deployments.registry import ArtefactSpec
from deployments.store.gc import make_room
from deployments.store.lockfile import load_lock
from deployments.store.provider import Provider

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from deployments.gpu.target import Target
    from deployments.settings import Settings
    from deployments.store.events import Event

    Record = Callable[["Totals"], None]

NAMESPACE = "imagen"
PREFIX = "node-init-"
_TRIES = 5
_LOG_EVERY_S = 10.0
_PROGRESS_TIMEOUT_S = 0.5
logger = logging.getLogger("ray.serve.imagen.node_init")


Totals = list[tuple[str, str, str, int, float]]
"""Events by kind, model and stage: how many, and the sum of their amounts."""


def ensure_on_node(name: str, digest: str, settings: Settings, record: Record) -> None:
    """Have this node's actor pull a model, and wait for it.

    Does nothing if the store already holds every model that this node needs.

    Args:
        name: of the model.
        digest: which content of it.
        settings: the application's.
        record: receives the actor's totals, because the actor ends before Ray collects its metrics.

    Raises:
        SetupError: see `Provider.ensure`.
        SourceFailed: the actor was lost five times in a row.
    """
    target = _target(settings)
    if _all_there(name, digest, settings, target):
        record([("hit", name, "", 1, 0.0)])
        return
    for attempt in range(_TRIES):
        actor = _get_or_create(settings)
        try:
            ray.get(actor.ensure.remote(name, digest, target))
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, SetupError) else error from None
        except RayActorError as error:  # it was ending, or the replica that created it was lost
            logger.warning("The node init actor was lost; trying again: %s", error)
            time.sleep(0.2 * 2**attempt)
            continue
        threading.Thread(target=_end_when_done, args=(actor, record), daemon=True).start()
        return
    raise SourceFailed(
        f"The node init actor was lost {_TRIES} times in a row.",
        remedy="Read its log on this node; it may have run out of memory.",
    )


def _target(settings: Settings) -> Target | None:
    """The kind of this replica's device, which its actor does not see; None if nobody asks."""
    lock = load_lock(*settings.models)
    wanted = any(model.compiled for model in lock.models.values())
    return this_target(settings.device) if wanted else None


def _all_there(name: str, digest: str, settings: Settings, target: Target | None) -> bool:
    catalogue = load_catalogue(*settings.models)
    provider = Provider(load_lock(*settings.models), settings.store)
    with suppress(SetupError):
        prefetched = [(s.name, provider.digest(s)) for s in _prefetched(catalogue, settings)]
        return all(
            provider.store.holds(n, d) and (not target or provider.holds_compiled(n, d, target))
            for n, d in [(name, digest), *prefetched]
        )
    return False


def _prefetched(catalogue: Catalogue, settings: Settings) -> list[ArtefactSpec]:
    names = settings.store.prefetch
    if names is None:
        return list(catalogue.served(settings.serve).models)
    return [catalogue.find(name) for name in names]


def _get_or_create(settings: Settings) -> Any:
    node = ray.get_runtime_context().get_node_id()
    # Applications with other settings have actors of their own.
    variant = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]
    actor: Any = ray.remote(NodeInit)
    return actor.options(
        name=f"{PREFIX}{node}-{variant}",
        namespace=NAMESPACE,
        get_if_exists=True,
        num_cpus=0,
        max_concurrency=64,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote(settings)


def _end_when_done(actor: Any, record: Record) -> None:
    """Wait until the actor's work is done, then end it; several replicas may do so."""
    with suppress(RayActorError):
        record(ray.get(actor.complete.remote()))
        ray.get(actor.close.remote())


class NodeInit:
    """Pulls models into its node's store. An actor; its methods run in threads.

    Args:
        settings: the application's.
    """

    def __init__(self, settings: Settings) -> None:
        self._catalogue = load_catalogue(*settings.models)
        lock = load_lock(*settings.models)
        self._provider = Provider(lock, settings.store, self._on_event)
        self._settings = settings
        self._condition = threading.Condition()
        self._waiting = 0
        self._asked = False
        self._targets: set[Target] = set()
        self._amounts: defaultdict[tuple[str, str, str], float] = defaultdict(float)
        self._counts = Counter[tuple[str, str, str]]()
        self._total_bytes: dict[str, float] = {}
        self._pulled_bytes = Counter[str]()
        self._logged_s = time.monotonic()
        self._prefetch = threading.Thread(target=self._prefetch_all, daemon=True)
        self._prefetch.start()

    def ensure(self, name: str, digest: str, target: Target | None = None) -> None:
        """Pull a model that a replica waits for, before the models that none waits for.

        Args:
            name: of the model.
            digest: which content of it.
            target: the kind of the replica's device, for which compiled artefacts are pulled too,
                as for each model that comes after this one; None for none.

        Raises:
            SetupError: see `Provider.ensure`.
        """
        with self._replica_waiting(target):
            self._pull(self._catalogue.find(name), digest)

    def progress(self) -> dict[str, float]:
        """Percent done of each pull under way, by model."""
        with self._condition:
            return {
                m: 100 * self._pulled_bytes[m] / max(n, 1) for m, n in self._total_bytes.items()
            }

    def complete(self) -> Totals:
        """Wait until nothing is left to pull; the events since the last call."""
        self._prefetch.join()
        with self._condition:
            self._condition.wait_for(lambda: self._waiting == 0)
            totals = [(*key, self._counts[key], self._amounts[key]) for key in self._counts]
            self._counts.clear()
            self._amounts.clear()
        return totals

    def close(self) -> None:
        """End this actor; calls under way are answered first."""
        exit_actor()

    def _prefetch_all(self) -> None:
        with ThreadPoolExecutor(self._settings.store.models_at_once) as pool:
            list(pool.map(self._prefetch_one, _prefetched(self._catalogue, self._settings)))

    def _prefetch_one(self, spec: ArtefactSpec) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._asked and self._waiting == 0)
        try:
            self._pull(spec, self._provider.digest(spec))
        except SetupError as error:
            logger.warning("A prefetch failed: %s", error)

    def _pull(self, spec: ArtefactSpec, digest: str) -> None:
        self._catalogue.check_licence(spec)
        try:
            if not self._provider.store.holds(spec.name, digest):
                keep = {digest, *self._provider.locked_digests}
                make_room(self._provider.store, keep, self._settings.store)
            self._provider.ensure(spec, digest)
            for target in self._wanted():
                self._provider.ensure_compiled(spec, digest, target)
        finally:
            with self._condition:
                self._total_bytes.pop(spec.name, None)

    @contextmanager
    def _replica_waiting(self, target: Target | None) -> Generator[None]:
        with self._condition:
            self._waiting += 1
            self._targets |= {target} if target else set()
            self._asked = True
        try:
            yield
        finally:
            with self._condition:
                self._waiting -= 1
                self._condition.notify_all()

    def _wanted(self) -> set[Target]:
        with self._condition:
            return set(self._targets)

    def _on_event(self, event: Event) -> None:
        key = (event.kind, event.model, event.stage)
        with self._condition:
            self._counts[key] += 1
            self._amounts[key] += event.amount
            if event.kind == "miss":
                self._total_bytes[event.model] = event.amount
                self._pulled_bytes[event.model] = 0
            if event.kind in ("bytes", "adopted"):
                self._pulled_bytes[event.model] += int(event.amount)
            if event.kind == "done":
                self._total_bytes.pop(event.model, None)
        if time.monotonic() - self._logged_s > _LOG_EVERY_S:
            self._logged_s = time.monotonic()
            done = self.progress().items()
            logger.info("Pulling: %s", ", ".join(f"{model} {share:.0f} %" for model, share in done))


async def pulling() -> dict[str, float]:
    """Percent done of each pull under way in the cluster; of each model, on the slowest node.

    Takes half a second at most. Nodes that do not answer in time are left out.
    """
    percent: dict[str, float] = {}
    actors = await asyncio.to_thread(_actors)
    answers = await asyncio.gather(
        *(asyncio.wait_for(actor.progress.remote(), _PROGRESS_TIMEOUT_S) for actor in actors),
        return_exceptions=True,
    )
    for answer in answers:
        if not isinstance(answer, BaseException):
            for model, share in answer.items():
                percent[model] = min(share, percent.get(model, 100.0))
    return percent


def _actors() -> list[Any]:
    actors: list[Any] = []
    everything: list[Any] = list_named_actors(all_namespaces=True)
    for named in everything:
        if named["namespace"] == NAMESPACE and named["name"].startswith(PREFIX):
            with suppress(ValueError):  # it has just ended
                actors.append(ray.get_actor(named["name"], NAMESPACE))
    return actors
