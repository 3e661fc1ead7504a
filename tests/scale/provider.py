"""Fake nodes that differ as machines do: a model store and a proxy's port of their own.

Loaded by the autoscaler's process, by name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

from tests.scale.cluster import free_port


class Nodes(FakeMultiNodeProvider):
    """Ray's fake nodes. `provider` of the autoscaler's config has two keys more.

    stores: folder in which each node's model store lies.
    ports: of the proxy of a group's only node; other nodes take any.
    """

    def _create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        group = tags[TAG_RAY_USER_NODE_TYPE]
        with self.lock:
            # A node's processes take this process' environment over.
            store = Path(self.provider_config["stores"], f"{self._next_node_id + 1:05}")
            os.environ["IMAGEN_MODELS"] = str(store)
            port = self.provider_config["ports"].get(group) or free_port()
            os.environ["RAY_SERVE_WORKER_PROXY_HTTP_PORT"] = str(port)
            super()._create_node_with_resources_and_labels(
                node_config, tags, count, resources, labels
            )
