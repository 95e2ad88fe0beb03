"""How a start begins: it opens the input, checks or makes the run folder, and claims or joins the attempt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from batchgen import checkpoint
from batchgen.checkpoint import Attempt, CheckpointError, RunFolder
from batchgen.formats.input import files_of
from batchgen.runs.engine_setup import check_engine
from batchgen.runs.manifest import identity, provenance
from batchgen.runs.prepare import Ready, check_all, prepare
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
    if not folder.has_input(identity(ready)):
        # Between the look at it and the claim. Those who work from now on know the same rows.
        sentence = f"rows have been appended to the input of {folder.path} by another start meanwhile. Start again"
        attempt.end(sentence)
        raise CheckpointError(sentence)
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
    if not folder.has_manifest():
        check_engine(ready, role)
        folder.check_or_create(wanted, recorded, ready.source.originals)
        return
    digest, rows = ready.source.began_with
    before = {**wanted, "input": digest, "rows": rows}
    folder.check_or_create(before, recorded)
    part = folder.done(len(ready.source), verify=False).part(host.shard)
    if part.has_rows_to_do:
        check_engine(ready, role)
    if ready.source.has_grown:
        _check_nobody_works(folder, wanted, role)
        folder.append_input(before, wanted, ready.source.originals)


def _check_nobody_works(folder: RunFolder, wanted: Mapping[str, object], role: Role) -> None:
    """Checks that no other shard of the run, which would know fewer rows, is being worked on.

    Raises:
        CheckpointError: one is, and it does not know the rows that have been appended.
    """
    try:
        checkpoint.check_free(folder, role.world)
    except CheckpointError as error:
        if not folder.has_input(wanted):
            raise CheckpointError(
                f"rows have been appended to the input, and the run goes on with them once no start works: {error}"
            ) from error
