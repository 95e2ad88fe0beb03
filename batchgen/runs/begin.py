"""How a start begins: it opens the input, checks or makes the run folder, and claims or joins the attempt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from batchgen import checkpoint
from batchgen.checkpoint import Attempt, RunFolder
from batchgen.formats.input import files_of
from batchgen.runs.manifest import identity, provenance
from batchgen.runs.prepare import Ready, check_all, check_engine, prepare
from batchgen.runs.role import Role
from batchgen.runs.settings import Host, RunSettings


def begin(
    inputs: Sequence[str], folder: RunFolder, settings: RunSettings, role: Role, host: Host
) -> tuple[Ready, Attempt]:
    """Opens the input and claims the run folder, in the one process that speaks for the run. A start that is refused
    leaves nothing in the folder.

    Raises:
        UserError: the run cannot start, or the folder holds another run.
    """
    folder.check_apart(files_of(inputs))
    new = folder.make()
    try:
        before = checkpoint.check_free(folder, role.world, host.shard)
        with folder.scanning() as scratch:
            ready = prepare(inputs, folder, settings, role, scan_into=scratch)
            if settings.strict:
                check_all(ready)
            recorded = provenance(ready, role)
            _check_or_create(folder, ready, role, host, recorded)
            ready.source.keep()
    except BaseException:
        for made in new:
            with suppress(OSError):  # it is in use
                made.rmdir()
        raise
    attempt = checkpoint.claim(folder, role.world, recorded, host.heartbeat_seconds, before, host.shard)
    if host.shard.count == 1:
        folder.sweep()  # nobody else works here
    return ready, attempt


def join(inputs: Sequence[str], folder: RunFolder, settings: RunSettings, role: Role) -> tuple[Ready, Attempt]:
    """Opens the input and joins the attempt that another process has claimed for all ranks.

    Raises:
        UserError: there is no such attempt, or this rank cannot take part.
    """
    attempt = checkpoint.join(folder, role.world)
    return prepare(inputs, folder, settings, role, claim=attempt.claim), attempt


def _check_or_create(folder: RunFolder, ready: Ready, role: Role, host: Host, recorded: Mapping[str, object]) -> None:
    """Begins the run, or checks that it is the one that has begun; writes nothing before everything has been checked.

    Raises:
        UserError: it is another one, or the engine has something to do and cannot run here.
    """
    wanted = identity(ready)
    exists = folder.has_manifest()
    work_left = True
    if exists:
        folder.check_or_create(wanted, recorded)
        part = folder.done(len(ready.source), verify=False).part(host.shard)
        work_left = part.good < len(part.states)
    if work_left:
        check_engine(ready, role)
    if not exists:
        folder.check_or_create(wanted, recorded, ready.source.originals)
