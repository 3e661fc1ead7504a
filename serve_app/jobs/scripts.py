"""The Lua scripts of jobs, which Redis is sent once and then knows by their digest."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.jobs.connection import answered

if TYPE_CHECKING:
    from redis.asyncio import Redis

_FOLDER = Path(__file__).parent / "lua"


async def run_script(redis: Redis, names: tuple[str, ...], *args: object) -> Any:
    """What a script answers.

    Args:
        redis: to run it.
        names: of the files in `lua/` that make the script, in order; the last one answers.
        args: of the script; the first is the namespace.

    Raises:
        JobsUnavailable: Redis does not answer.
    """
    script: Any = redis.register_script(_source(names))
    async with answered():
        return await script(args=[str(arg) for arg in args])


@cache
def _source(names: tuple[str, ...]) -> str:
    return "".join((_FOLDER / f"{name}.lua").read_text(encoding="utf-8") for name in names)
