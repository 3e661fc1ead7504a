"""`imagen plan`: shares of a GPU for each model, and their way into a Serve config.

Which numbers, and why, is in deployments/placement.py; this file shows them and writes them.
"""

from __future__ import annotations

import difflib
import io
import json
import os
import re
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import ScalarString

from cli.console import Output, make_table
from deployments.errors import ConfigError, SetupError
from deployments.gpu.plan import Plan
from deployments.gpu.plan import plan as make_plan
from deployments.gpu.profiles import as_gpu
from deployments.registry import ModelSpec, load_catalogue
from deployments.settings import Settings, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.gpu.plan import Placed
    from deployments.registry import Catalogue

_APPLICATION = "serve_app.app:build"
_GIB = 2**30
_LAYOUTS = ((4, 2), (2, 0))  # (sequence, offset): dashes below their key's column, or in it
Shares = dict[str, dict[str, dict[str, Any]]]
"""Deployment name to section (`ray_actor_options`, `user_config`) to values."""


def plan(
    gpu: Annotated[str, typer.Option(help="t4, l4, a100-40, h100 or h200")],
    names: Annotated[
        list[str] | None, typer.Argument(help="Models of the registry; unset: those it serves")
    ] = None,
    models: Annotated[Path, typer.Option(help="The registry, a YAML file of models")] = Path(
        "configs/models/production.yaml"
    ),
    gpus: Annotated[
        int | None, typer.Option(min=1, max=64, help="As many; print the largest batches that fit")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="The Serve config to write")] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Put shares, batches and budgets into --config")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else")
    ] = False,
) -> None:
    """Divide GPUs among models: shares, batches and pixel budgets that fit their memory."""
    output = Output(as_json=as_json)
    try:
        if write and config is None:
            raise ConfigError("--write needs a Serve config to write to.", remedy="Add --config.")
        registry = _here(models)
        catalogue = load_catalogue(registry)
        made = make_plan(_choose(catalogue, names), as_gpu(gpu), gpus)
        _show(made, catalogue, output)
        changed: list[str] | None = None
        if write and config:
            changed = write_shares(resolve(_here(config)), _shares(made), resolve(registry))
            told = f"wrote {', '.join(changed)}" if changed else "nothing to change"
            output.say(f"{config}: {told}", "green")
        output.emit(_as_values(made) | ({} if changed is None else {"changed": changed}))
    except SetupError as error:
        output.fail(error)
        values = {"code": error.code, "message": error.message, "value": error.value}
        values["remedy"] = error.remedy
        output.emit({"error": values, "exit_code": error.exit_code})
        raise typer.Exit(error.exit_code) from error


def _here(path: Path) -> Path:
    """Relative to where the user is; else to the project, as in configuration files."""
    return path.absolute() if path.exists() else path


def _choose(catalogue: Catalogue, names: Sequence[str] | None) -> list[ModelSpec]:
    """The named models; else those served. What a licence forbids to serve may be planned."""
    if not names:
        accepted = tuple(entry.name for entry in catalogue.entries)
        everything = catalogue.model_copy(update={"accept_noncommercial": accepted})
        return list(everything.served().values())
    found = list({entry.name: entry for entry in map(catalogue.find, names)}.values())
    specs = [entry for entry in found if isinstance(entry, ModelSpec)]
    if len(specs) < len(found):
        artefacts = ", ".join(e.name for e in found if not isinstance(e, ModelSpec))
        raise ConfigError("Artefacts have no place on our GPUs.", value=artefacts)
    return specs


# ------------------------------------------------------------------------------- what it shows


def _show(made: Plan, catalogue: Catalogue, output: Output) -> None:
    table = make_table(
        *("Model", "GPU", "num_gpus", "Rows", "budget_px", "Weights", "Activations"),
        *("Autoencoder", "Context", "In all", "Source"),
        title=f"{made.gpus} x {made.gpu.label}, {_gib(made.gpu.total_bytes)} each",
    )
    for placed in made.placed:
        demand = placed.demand
        about = "" if demand.measured else "~"
        context = "" if made.context_measured else "~"
        table.add_row(
            placed.name,
            str(placed.gpu_index),
            f"{about or context}{placed.num_gpus:g}",
            f"{placed.rows}{' (reduced)' if placed.reduced else ''}",
            str(placed.budget_px),
            f"{about}{_gib(demand.profile.weights_bytes)}",
            f"{about}{_gib(demand.peak_bytes(placed.rows))}",
            f"{about}{_gib(demand.vae_peak_bytes)}",
            f"{context}{_gib(made.context_bytes)}",
            f"{about or context}{_gib(demand.need_bytes(placed.rows))}",
            _source(placed),
        )
    output.show(table)
    for i in range(made.gpus):
        here = [placed for placed in made.placed if placed.gpu_index == i]
        used = sum(placed.percent for placed in here)
        output.show(f"GPU {i}: {used / 100:.2f}  {', '.join(p.name for p in here) or 'empty'}")
    if not made.measured:
        output.show(
            f"~ is an estimate: `make profile-gpu` on a {made.gpu.label} measures it (docs/gpu.md)."
        )
    for spec in (placed.demand.spec for placed in made.placed):
        if not spec.commercial and spec.name not in catalogue.accept_noncommercial:
            output.say(f"{spec.name} is not accepted in the registry ({spec.licence}).", "yellow")


def _source(placed: Placed) -> str:
    profile = placed.demand.profile
    if placed.demand.measured:
        return f"measured {profile.measured_at}"
    if profile.source == "estimate":
        return "estimate"
    where = profile.gpu if profile.gpu != placed.demand.gpu.name else "another size"
    return f"estimate, from {where}"


def _gib(amount_bytes: int) -> str:
    return f"{amount_bytes / _GIB:.2f} GiB"


def _as_values(made: Plan) -> dict[str, Any]:
    return {
        "gpu": made.gpu.name,
        "gpus": made.gpus,
        "total_bytes": made.gpu.total_bytes,
        "context_bytes": made.context_bytes,
        "context_source": "measured" if made.context_measured else "estimate",
        "measured": made.measured,
        "models": [
            {
                "name": placed.name,
                "task": str(placed.demand.spec.task),
                "gpu_index": placed.gpu_index,
                "num_gpus": placed.num_gpus,
                "max_batch_size": placed.rows,
                "budget_px": placed.budget_px,
                "weights_bytes": placed.demand.profile.weights_bytes,
                "peak_bytes": placed.demand.peak_bytes(placed.rows),
                "vae_peak_bytes": placed.demand.vae_peak_bytes,
                "need_bytes": placed.demand.need_bytes(placed.rows),
                "reduced": placed.reduced,
                "source": _source(placed),
            }
            for placed in made.placed
        ],
    }


# ------------------------------------------------------------------------------- what it writes


def _shares(made: Plan) -> Shares:

    tasks = Counter(placed.demand.spec.task for placed in made.placed)
    if twice := [str(task) for task, count in tasks.items() if count > 1]:
        raise ConfigError("Two models of one task have one deployment.", value=", ".join(twice))
    return {
        placed.demand.spec.task.deployment: {
            "ray_actor_options": {"num_gpus": placed.num_gpus},
            "user_config": {"max_batch_size": placed.rows, "budget_px": placed.budget_px},
        }
        for placed in made.placed
    }


def write_shares(path: Path, shares: Shares, registry: Path) -> list[str]:
    """Set values of deployments in a Serve config; every other byte stays. Returns what changed.

    Args:
        registry: the models that were planned; the config must serve them.

    Raises:
        ConfigError: no Serve config of ours, another registry, a deployment that is not there, or
            a layout that cannot be kept. The file is as it was then.
    """
    try:
        text = path.read_bytes().decode()
        ending = "\r\n" if text.count("\r\n") == text.count("\n") > 0 else "\n"
        edited, changed = _with_shares(text.replace(ending, "\n"), shares, registry)
        if changed:
            _replace(path, edited.replace("\n", ending))
    except (OSError, ValueError, YAMLError, yaml.YAMLError, *_SHAPE) as error:
        reason = "it has another shape" if isinstance(error, _SHAPE) else str(error).splitlines()[0]
        raise ConfigError(
            f"The Serve config cannot be edited: {reason}.",
            value=path,
            remedy="Name a Serve YAML file, as configs/local.yaml is one.",
        ) from error
    return changed


_SHAPE = (AttributeError, KeyError, TypeError, IndexError)
"""What a file of another shape than a Serve config runs into."""


def _with_shares(text: str, shares: Shares, registry: Path) -> tuple[str, list[str]]:
    """The text with the shares in it, and whose changed."""
    values = yaml.safe_load(text)
    application = _application(values, registry)
    deployments = {entry["name"]: entry for entry in application.get("deployments") or []}
    if missing := [name for name in shares if name not in deployments]:
        raise ConfigError(
            "The Serve config names no such deployment.",
            value=", ".join(missing),
            remedy="Add an entry for it under `deployments`.",
        )
    shares = {name: _whole(shares[name], deployments[name], application) for name in shares}
    wanted = {name: _differing(deployments[name], shares[name]) for name in shares}
    wanted = {name: sections for name, sections in wanted.items() if sections}
    if not wanted:
        return text, []
    edited = _edit(_with_lines(text, wanted), wanted)
    _check(values, edited, text, shares)
    return edited, list(wanted)


def _application(values: Any, registry: Path) -> Any:
    """The entry of our application; it must serve the models that were planned."""
    ours = [a for a in values["applications"] if a.get("import_path") == _APPLICATION]
    if len(ours) != 1:
        raise ConfigError(
            f"The Serve config must have one application with import_path {_APPLICATION}.",
            value=len(ours),
        )
    served = Path((ours[0].get("args") or {}).get("models", Settings().models))
    if resolve(served).resolve() != registry.resolve():
        raise ConfigError(
            "The Serve config serves other models than were planned.",
            value=served,
            remedy=f"Plan with --models {served}, or change args.models.",
        )
    return ours[0]


def _whole(
    sections: dict[str, dict[str, Any]], entry: Any, application: Any
) -> dict[str, dict[str, Any]]:
    """Beside a new `ray_actor_options`, which replaces the application's own, the CPUs of that."""
    if "ray_actor_options" in entry:
        return sections
    cpus = (application.get("args") or {}).get("model_num_cpus", Settings().model_num_cpus)
    return sections | {"ray_actor_options": {"num_cpus": cpus} | sections["ray_actor_options"]}


def _differing(entry: Any, sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is not yet as wanted."""
    different: dict[str, dict[str, Any]] = {}
    for section, values in sections.items():
        present = entry.get(section) or {}
        if new := {key: value for key, value in values.items() if present.get(key) != value}:
            different[section] = new
    return different


def _with_lines(text: str, wanted: Shares) -> str:
    """Give entries the sections and keys they lack, each on a line of its own right below a short
    one: comments further down stay with what they speak of.
    """
    lines = text.splitlines(keepends=True)
    _, document = _load(text)
    holders = _holders(document)
    for entry in _entries(document, wanted):
        for section, values in wanted[entry["name"]].items():
            present = entry.get(section)
            if section not in entry and not entry.fa.flow_style():
                line, column = entry.lc.key("name")
                flow = ", ".join(f"{key}: {value}" for key, value in values.items())
                new = [f"{section}: {{{flow}}}"]
            elif present and len(holders[id(present)]) == 1 and not present.fa.flow_style():
                line, column = _after_short(present)
                new = [f"{key}: {value}" for key, value in values.items() if key not in present]
            else:
                continue
            added = "".join(f"{' ' * column}{one}\n" for one in new)
            lines[line] = lines[line].rstrip("\n") + "\n" + added if added else lines[line]
    return "".join(lines)


def _after_short(section: Any) -> tuple[int, int]:
    """Line and column of a key whose value is on its line; else the line above the first key."""
    for key, value in section.items():
        if key in section.lc.data and isinstance(value, int | float | str) and value != "":
            line, column = section.lc.key(key)
            if section.lc.value(key)[0] == line and not isinstance(value, ScalarString):
                return line, column
    line, column = section.lc.key(next(iter(section.lc.data)))
    return line - 1, column


def _edit(text: str, wanted: Shares) -> str:
    """The text with the wanted values; lines that need no change are taken as they are."""
    parser, document = _load(text)
    former = _dump(parser, document).splitlines(keepends=True)
    holders = _holders(document)
    for entry in _entries(document, wanted):
        for section, values in wanted[entry["name"]].items():
            if not entry.get(section):
                entry[section] = _own({})
            _part(entry, section, holders[id(entry[section])])
            for key, value in values.items():
                entry[section][key] = value
    edited = _dump(parser, document).splitlines(keepends=True)
    lines = text.splitlines(keepends=True)
    result: list[str] = []
    for change, start, end, new_start, new_end in difflib.SequenceMatcher(
        None, former, edited, autojunk=False
    ).get_opcodes():
        result += lines[start:end] if change == "equal" else edited[new_start:new_end]
    return "".join(result)


def _load(text: str) -> tuple[YAML, Any]:
    """The document, and a parser that writes it back line for line.

    Raises:
        ConfigError: it would break or indent lines anew.
    """
    for sequence, offset in _LAYOUTS:
        parser = YAML()
        parser.preserve_quotes = True
        parser.width = 2**20
        parser.indent(mapping=2, sequence=sequence, offset=offset)
        document = parser.load(text)
        _keep_anchors(document)
        again = _dump(parser, document).splitlines()
        if [_indent(line) for line in again] == [_indent(line) for line in text.splitlines()]:
            return parser, document
    raise ConfigError(
        "The Serve config has a layout that cannot be kept.",
        remedy="Indent mappings by two spaces and sequences alike throughout, keep texts on one"
        " line, or enter the printed values by hand.",
    )


def _dump(parser: YAML, document: Any) -> str:
    stream = io.StringIO()
    parser.dump(document, stream)
    return stream.getvalue()


def _indent(line: str) -> int | None:
    return len(line) - len(line.lstrip()) if line.strip() else None


def _entries(document: Any, wanted: Shares) -> list[Any]:
    """The wanted entries of our application."""
    ours = [a for a in document["applications"] if a.get("import_path") == _APPLICATION]
    entries = [entry for application in ours for entry in application.get("deployments") or []]
    return [entry for entry in entries if entry["name"] in wanted]


def _holders(document: Any) -> dict[int, list[tuple[Any, Any]]]:
    """Where each node is held, by its id: node and key, the key None for a merge. More than one
    place where something refers to it; the first is where it is written out.
    """
    holders: dict[int, list[tuple[Any, Any]]] = defaultdict(list)
    waiting = [document]
    while waiting:
        node = waiting.pop(0)
        pairs: list[tuple[Any, Any]] = list(
            node.items() if isinstance(node, dict) else enumerate(node)
        )
        pairs += [(None, source) for source in getattr(node, "merge", [])]
        for key, child in pairs:
            holders[id(child)].append((node, key))
            if isinstance(child, dict | list) and len(holders[id(child)]) == 1:
                waiting.append(child)
    return holders


def _keep_anchors(document: Any) -> None:
    """Also those that nothing refers to, or nothing any more."""
    for node, key in (place for places in _holders(document).values() for place in places):
        anchor = None if key is None else getattr(node[key], "anchor", None)
        if anchor is not None and anchor.value:
            anchor.always_dump = True


def _part(entry: Any, section: str, places: Sequence[tuple[Any, Any]]) -> None:
    """Let the entry's section change without changing anybody else's."""
    if len(places) < 2:
        return
    others = [(node, key) for node, key in places if node is not entry]
    if places[0][0] is entry and all(key is not None for _, key in others):
        for node, key in others:
            node[key] = _own(entry[section])
            node.ca.items.pop(key, None)  # a comment of the place it refers to, read as its own
        return
    if places[0][0] is not entry:
        entry.ca.items.pop(section, None)
    entry[section] = _own(entry[section])


def _own(value: Any) -> Any:
    """A copy without anchors and comments, so that nobody else's changes with it."""
    if isinstance(value, dict):
        own = CommentedMap({key: _own(item) for key, item in value.items()})
        if not isinstance(value, CommentedMap) or value.fa.flow_style():
            own.fa.set_flow_style()
        return own
    if isinstance(value, list):
        return [_own(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _check(before: Any, edited: str, text: str, shares: Shares) -> None:
    """Hold the result to its promise, before it replaces anything."""
    expected = json.loads(json.dumps(before, default=str))
    for entry in _entries(expected, shares):
        for section, values in shares[entry["name"]].items():
            entry[section] = {**(entry.get(section) or {}), **values}
    found = json.loads(json.dumps(yaml.safe_load(edited), default=str))
    kept = iter(_comments(edited))
    if found != expected or not all(comment in kept for comment in _comments(text)):
        raise ConfigError(
            "The Serve config cannot be written without changing something else in it.",
            remedy="Enter the printed values by hand.",
        )


def _comments(text: str) -> list[str]:
    return re.findall(r"(?:^|(?<=\s))#.*$", text, re.MULTILINE)


def _replace(path: Path, text: str) -> None:
    """Put the text in the file's place at once; through a symbolic link, at its target."""
    target = path.resolve()
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(target.stat().st_mode & 0o777)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
