"""configs/gke.yaml to files: committed as rendered, and refused where it cannot work."""

from __future__ import annotations

import copy
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.main import app
from deployments.errors import ConfigError, GpuTooSmall
from deployments.settings import ROOT
from kuberay.quantity import parse_quantity
from kuberay.render.overlay import difference
from kuberay.render.render import Files, out_of_date, render
from kuberay.render.source import load_environments, merged
from kuberay.render.yamls import GENERATED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SOURCE, FOLDER = ROOT / "configs" / "gke.yaml", ROOT / "kuberay"
LOCK = FOLDER / "images.lock"


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], object]], Files]:
    """Renders the source with something changed in its base."""

    def run(change: Callable[[dict[str, Any]], object]) -> Files:
        values = yaml.safe_load(SOURCE.read_text())
        change(values["base"])
        path = tmp_path / "gke.yaml"
        path.write_text(yaml.safe_dump(values))
        return render(path, LOCK)

    return run


def serve_config(files: Files) -> Any:
    service = yaml.safe_load(files["base/rayservice.yaml"])
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def test_what_is_committed_is_what_is_rendered() -> None:
    files = render(SOURCE, LOCK)
    assert out_of_date(files, FOLDER) == []
    commented = [text for path, text in files.items() if path.endswith(".yaml")]  # JSON has none
    assert all(text.startswith(GENERATED) for text in commented)


def test_the_command_tells_which_files_are_out_of_date(tmp_path: Path) -> None:
    folder = tmp_path / "kuberay"
    shutil.copytree(FOLDER, folder)
    (folder / "base" / "rayservice.yaml").write_text(GENERATED + "edited: true\n")
    (folder / "base" / "former.yaml").write_text(GENERATED)
    (folder / "base" / "mine.yaml").write_text("hand: written\n")
    command = ["kuberay", "render", "--folder", str(folder)]
    told = CliRunner().invoke(app, [*command, "--check"])
    assert told.exit_code == 1
    assert "base/rayservice.yaml" in told.output
    assert CliRunner().invoke(app, command).exit_code == 0
    assert CliRunner().invoke(app, [*command, "--check"]).exit_code == 0
    assert not (folder / "base" / "former.yaml").exists()
    assert (folder / "base" / "mine.yaml").exists()


def deployment(files: Files, name: str) -> dict[str, Any]:
    deployments = serve_config(files)["applications"][0]["deployments"]
    return next(one for one in deployments if one["name"] == name)


def test_the_store_knows_how_much_of_the_disk_is_its_own(changed: Any) -> None:
    def most_bytes(files: Files) -> Any:
        return serve_config(files)["applications"][0]["args"]["store"].get("max_bytes")

    as_committed = changed(lambda base: base)
    service = yaml.safe_load(as_committed["base/rayservice.yaml"])
    [group] = [g for g in groups(service) if g["groupName"] == "models"]
    [cache] = [v for v in group["template"]["spec"]["volumes"] if v["name"] == "models"]
    assert most_bytes(as_committed) == parse_quantity(cache["emptyDir"]["sizeLimit"])
    on_host = changed(lambda base: base["cache"].update(kind="hostPath"))
    assert most_bytes(on_host) is None


def groups(service: Any) -> list[dict[str, Any]]:
    return service["spec"]["rayClusterConfig"]["workerGroupSpecs"]


def test_a_model_can_have_options_of_its_own(changed: Any) -> None:
    wanted = {"user_config": {"digest": "0123456789abcdef"}}
    as_committed = changed(lambda base: base)
    files = changed(lambda base: base["serve"].update(models={"comic": wanted}))
    planned = deployment(as_committed, "Comic")["user_config"]
    assert deployment(files, "Comic")["user_config"] == planned | wanted["user_config"]
    assert deployment(files, "Aged") == deployment(as_committed, "Aged")
    with pytest.raises(ConfigError, match="cartoon"):
        changed(lambda base: base["serve"].update(models={"cartoon": wanted}))


def test_shares_batches_and_budgets_follow_the_gpu(changed: Any) -> None:
    def on_t4(base: dict[str, Any]) -> None:
        base["gpu"] |= {"type": "t4", "machine": "n1-highmem-8"}

    def comic(files: Files) -> dict[str, Any]:
        return deployment(files, "Comic")

    l4, t4 = comic(changed(lambda base: None)), comic(changed(on_t4))
    assert t4["ray_actor_options"]["num_gpus"] > l4["ray_actor_options"]["num_gpus"] > 0
    assert l4["user_config"].keys() == {"max_batch_size", "budget_px"}


def test_a_disk_that_is_filled_before_is_read_only_and_needs_no_root(changed: Any) -> None:
    disk = {"kind": "hostPath", "path": "/mnt/disks/models", "read_only": True}
    files = changed(lambda base: base["cache"].update(disk))
    service = yaml.safe_load(files["base/rayservice.yaml"])
    pod = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["template"]["spec"]
    assert pod["volumes"][0]["hostPath"] == {"path": "/mnt/disks/models", "type": "Directory"}
    assert pod["containers"][0]["volumeMounts"][0]["readOnly"]
    assert "initContainers" not in pod


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        (lambda b: b["gpu"].update(type="b200"), ConfigError, "b200"),
        (lambda b: b["gpu"].update(machine="g2-standard-9"), ConfigError, "g2-standard-9"),
        (lambda b: b["gpu"].update(max_nodes=1), GpuTooSmall, "2 x L4"),
        (lambda b: b["models"]["size"].update(memory="31Gi"), ConfigError, "does not fit"),
        (lambda b: b["memory"].update(reserved="26Gi"), ConfigError, "leaves nothing"),
        (lambda b: b.update(name="i" * 48), ConfigError, "47"),
        (lambda b: b.update(name="Imagen"), ConfigError, "letter"),
        (lambda b: b["images"].update(extra={"repository": "x/y"}), ConfigError, "extra"),
        (lambda b: b.update(colour="red"), ConfigError, "colour"),
        (lambda b: b["serve"]["args"].update(devise="cpu"), ConfigError, "devise"),
        (lambda b: b["serve"]["args"].update(models="nowhere.yaml"), ConfigError, "nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    changed: Any, change: Any, error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        changed(change)


def test_an_overlay_builds_upon_another() -> None:
    environments = load_environments(SOURCE)
    prod, disk = environments["prod"], environments["prod-hostpath"]
    assert disk.models.pod == prod.models.pod
    assert (prod.cache.kind, disk.cache.kind) == ("emptyDir", "hostPath")


def test_merging_removes_what_is_null_and_replaces_lists() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    over = {"a": {"b": None, "c": [3]}, "e": {"f": None, "g": 1}}
    assert merged(base, over) == {"a": {"c": [3]}, "d": 1, "e": {"g": 1}}


VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("ab/~", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=12,
)
MAPPINGS = st.dictionaries(st.text("ab/~", min_size=1, max_size=2), VALUES, max_size=4)


def patched(document: Any, operations: list[dict[str, Any]]) -> Any:
    """RFC 6902, as far as `difference` uses it."""
    document = copy.deepcopy(document)
    for one in operations:
        *steps, last = (
            step.replace("~1", "/").replace("~0", "~") for step in one["path"].split("/")[1:]
        )
        node = document
        for step in steps:
            node = node[int(step)] if isinstance(node, list) else node[step]
        key: Any = int(last) if isinstance(node, list) else last
        if one["op"] == "remove":
            del node[key]
        else:
            node[key] = one["value"]
    return document


@given(MAPPINGS, MAPPINGS)
def test_a_patch_makes_one_of_the_other(one: Any, other: Any) -> None:
    assert patched(one, difference(one, other)) == other


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 0.5), ("4Gi", 4 * 2**30), ("4", 4), ("1.5k", 1500), ("1e3", 1000)]
)
def test_quantities_are_read(text: str, value: float) -> None:
    assert float(parse_quantity(text)) == value


@pytest.mark.parametrize("text", ["", "4gi", "26Gig", "Gi", "1 Gi", "four", True])
def test_what_is_no_quantity_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="no Kubernetes quantity"):
        parse_quantity(text)
