"""The one private name of Ray in kuberay/: it exists, and nothing public does the same."""

from __future__ import annotations

import inspect
from types import FunctionType

from ray.autoscaler._private.kuberay import autoscaling_config


def test_ray_offers_no_public_function_for_the_autoscalers_config() -> None:
    """If this fails, kuberay/checks/autoscaler.py should use the public name."""
    functions = {
        name: one
        for name, one in vars(autoscaling_config).items()
        if isinstance(one, FunctionType) and one.__module__ == autoscaling_config.__name__
    }
    assert "_derive_autoscaling_config_from_ray_cr" in functions
    takes_a_cluster = {
        name for name, one in functions.items() if "ray_cr" in inspect.signature(one).parameters
    }
    public = {name for name in functions if not name.startswith("_")}
    assert public & takes_a_cluster == set()
    assert [name for name in public if "autoscaling_config" in name] == []
