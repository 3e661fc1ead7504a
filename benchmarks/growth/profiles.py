"""What is simulated: a model's measured times, and the service around it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.output import RESULTS

KNOWN_S: Final = 10.0
"""How long Serve's routers go by a length as they last heard of it, unless they are told."""
H100: Final = RESULTS / "gpu-nvidia-h100-80gb-hbm3-2026-11-26.json"


@dataclass(frozen=True, slots=True)
class Work:
    """What one image takes.

    Attributes:
        model: its name.
        steps: passes.
        pass_s: seconds of a pass, by the number of pictures in it, from one on. Its length is the
            largest group.
        begin_s, finish_s: seconds of the GPU before the first pass and after the last one.
        file_s: seconds of a core for decoding and encoding, together.
        front_s: seconds that a request takes beside all of that on an idle service.
    """

    model: str
    steps: int
    pass_s: tuple[float, ...]
    begin_s: float
    finish_s: float
    file_s: float = 0.03
    front_s: float = 0.02

    @property
    def alone_s(self) -> float:
        """Of a request to an idle replica."""
        return self.steps * self.pass_s[0] + self.begin_s + self.finish_s + self.file_s

    @property
    def capacity_per_s(self) -> float:
        """Images that a GPU of its own makes a second, in the groups that pay most."""
        best = min(seconds / rows for rows, seconds in enumerate(self.pass_s, 1))
        return 1 / (self.steps * best + self.begin_s + self.finish_s)


def refiner_on_h100() -> Work:
    """The SDXL refiner at 1024 px, 30 steps at strength 0.3 with guidance, from the benchmark.

    A picture with guidance is two rows. The autoencoder's times are those of docs/gpu.md.
    """
    rows: dict[str, Any] = json.loads(H100.read_text(encoding="utf-8"))["cells"]
    seconds = rows["enhance-1024/unet"]["seconds_by_rows"]
    return Work("enhance-sdxl-refiner", 9, (seconds["2"], seconds["4"]), 0.055, 0.091)


@dataclass(frozen=True, slots=True)
class Service:
    """The service around the models.

    Attributes:
        ingress_pods: each has a proxy and an Ingress replica, one thread each.
        proxy_s, ingress_s: CPU seconds of a request there.
        timeout_s: of a request.
        pixel_threads: of a replica, for files.
        seats: pictures that a replica works on at a time.
        known_s: how long an Ingress goes by a replica's queue as it last heard of it, or 0 to ask
            each time: RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S.
    """

    ingress_pods: int = 2
    proxy_s: float = 0.005
    ingress_s: float = 0.006
    timeout_s: float = 60.0
    pixel_threads: int = 4
    seats: int = 16
    known_s: float = KNOWN_S


@dataclass(frozen=True, slots=True)
class Scaling:
    """How replicas and nodes follow requests; the defaults are those of configs/gke.yaml.

    Attributes:
        least, most: GPUs. Equal ones neither start nor stop.
        first: GPUs at the beginning.
        target_ongoing: requests for each replica.
        upscale_delay_s, downscale_delay_s: before a decision counts.
        node_stays_s: a node without a replica.
        node_start_s: from and to, drawn evenly: a machine, its image.
        load_s: until a replica on a node is ready.
        spot_life_s: mean life of a node; None without losses.
    """

    least: int = 1
    most: int = 1
    first: int = 1
    target_ongoing: float = 4.0
    upscale_delay_s: float = 15.0
    downscale_delay_s: float = 600.0
    node_stays_s: float = 600.0
    node_start_s: tuple[float, float] = (60.0, 300.0)
    load_s: float = 60.0
    spot_life_s: float | None = None


def fixed(gpus: int) -> Scaling:
    """So many GPUs from the start to the end."""
    return Scaling(gpus, gpus, gpus)
