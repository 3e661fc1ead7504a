"""Replicas that do nothing, for what Serve's controller does for each; with our health checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray import serve

from serve_app.backends import HEALTH_CHECK_PERIOD_S

if TYPE_CHECKING:
    from ray.serve import Application


class Idle:
    """Answers every request."""

    def __call__(self, _: Any) -> str:
        return "idle"


def build(args: dict[str, int]) -> Application:
    """So many replicas as `args["replicas"]`."""
    idle: Any = serve.deployment(Idle)
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}}
    options |= {"health_check_period_s": HEALTH_CHECK_PERIOD_S}
    return idle.options(name="Idle", num_replicas=args["replicas"], **options).bind()
