"""The run folder: what the run is, who works on it, which rows are finished, and the output files made of them."""

from batchgen.checkpoint.attempt import (
    FINAL,
    HEARTBEAT_SECONDS,
    JOIN_SECONDS,
    Attempt,
    attempts,
    check_free,
    claim,
    join,
)
from batchgen.checkpoint.done import Done
from batchgen.checkpoint.files import CheckpointError, Damaged, DifferentRun, check_can_be_folder, read_json, to_json
from batchgen.checkpoint.folder import RunFolder
from batchgen.checkpoint.heartbeat import Heartbeat
from batchgen.checkpoint.heartbeats import all_heartbeats
from batchgen.checkpoint.merge import Places, merge_with, write_lines
from batchgen.checkpoint.records import Writer
from batchgen.checkpoint.status import AttemptStatus, Status, status

__all__ = [
    "FINAL",
    "HEARTBEAT_SECONDS",
    "JOIN_SECONDS",
    "Attempt",
    "AttemptStatus",
    "CheckpointError",
    "Damaged",
    "DifferentRun",
    "Done",
    "Heartbeat",
    "Places",
    "RunFolder",
    "Status",
    "Writer",
    "all_heartbeats",
    "attempts",
    "check_can_be_folder",
    "check_free",
    "claim",
    "join",
    "merge_with",
    "read_json",
    "status",
    "to_json",
    "write_lines",
]
