"""The device at hand: its kind, and what code that is compiled for it depends on."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from deployments.errors import ConfigError
from deployments.gpu.profiles import Gpu, gpu_name


@dataclass(frozen=True, slots=True)
class Target:
    """What compiled code depends on beside the model.

    Attributes:
        device: GPU type and compute capability, such as h100-sm90; or cpu.
        torch: its version, build included.
        triton: its version; empty where there is none.
        machine: architecture of the host, such as x86_64; of a CPU also the vector instructions
            that torch uses there, because code for one set crashes on a CPU without it.
    """

    device: str
    torch: str
    triton: str
    machine: str


def this_target(setting: str) -> Target:
    """The target of this process. Imports torch.

    Args:
        setting: auto, cpu or cuda, as in the application's settings.
    """
    import torch

    machine = platform.machine()
    if setting != "cpu" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        device = f"{gpu_name(torch.cuda.get_device_name())}-sm{major}{minor}"
    else:
        device = "cpu"
        machine = f"{machine}-{torch.backends.cpu.get_cpu_capability().lower()}"
    return Target(device, torch.__version__, _version("triton"), machine)


def gpus_at_hand() -> tuple[Gpu, int]:
    """The type of this machine's first GPU, with its own memory, and how many GPUs there are.
    Imports torch.

    Raises:
        ConfigError: torch finds none.
    """
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("torch finds no GPU here.", remedy="Name a type, such as --gpu l4.")
    found = torch.cuda.get_device_properties(0)
    name = gpu_name(found.name)
    return Gpu(name, found.name, found.total_memory, ""), torch.cuda.device_count()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
