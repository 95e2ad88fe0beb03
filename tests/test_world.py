"""Rank, sizes and launch from the variables of each launcher, as the launchers set them."""

from __future__ import annotations

import pytest

from batchgen.world import World, WorldError, check_start, from_environment

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
# What `deepspeed` sets (deepspeed/launcher/launch.py): LOCAL_SIZE is its own name.
DEEPSPEED = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
# A batch script outside srun has a rank and the allocation's size, and is one process all the same.
SCRIPT = {
    "SLURM_JOB_ID": "42",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}
SRUN = SCRIPT | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_NTASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
}


def srun(rank: int, local_rank: int, node: int, **changed: str) -> dict[str, str]:
    place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local_rank), "SLURM_NODEID": str(node)}
    return {**SRUN, **place, **changed}


def without(environment: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key != name}


def placed(world: World) -> tuple[int, int, int, int]:
    return world.rank, world.local_rank, world.size, world.local_size


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 0, 1, 1)),
        ({"HOME": "/root", "MASTER_PORT": "1"}, (0, 0, 1, 1)),
        (TORCHRUN, (5, 1, 8, 4)),
        (TORCHRUN | SRUN, (5, 1, 8, 4)),  # torchrun started by srun, one a node
        (DEEPSPEED, (3, 1, 4, 2)),
        (without(DEEPSPEED, "LOCAL_SIZE"), (3, 1, 4, 2)),
        (SCRIPT, (0, 0, 1, 1)),
        (SCRIPT | {"WORLD_SIZE": "8"}, (0, 0, 1, 1)),  # exported for torchrun to come
        (srun(0, 0, 0), (0, 0, 11, 4)),
        (srun(7, 3, 1), (7, 3, 11, 4)),
        (srun(10, 2, 2), (10, 2, 11, 3)),
        (srun(10, 2, 2, WORLD_SIZE="99"), (10, 2, 11, 3)),
        (without(srun(10, 2, 2), "SLURM_STEP_TASKS_PER_NODE"), (10, 2, 11, 3)),
        (srun(0, 0, 0, SLURM_STEP_NUM_TASKS="1", SLURM_STEP_TASKS_PER_NODE="1"), (0, 0, 1, 1)),
        (srun(1, 0, 1, SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="1(x2)"), (1, 0, 2, 1)),
    ],
)
def test_the_place_that_a_launcher_gives(environment: dict[str, str], expected: tuple[int, int, int, int]) -> None:
    assert placed(from_environment(environment)) == expected


def test_a_missing_variable_of_torchrun_is_named() -> None:
    with pytest.raises(WorldError, match=r"^LOCAL_RANK is not set although this process was started as one of several"):
        from_environment(without(TORCHRUN, "LOCAL_RANK"))


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID"])
def test_a_missing_variable_of_srun_is_named(name: str) -> None:
    with pytest.raises(WorldError, match=f"^{name} is not set"):
        from_environment(without(SRUN, name))


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        (TORCHRUN, "RANK"),
        (TORCHRUN, "LOCAL_RANK"),
        (TORCHRUN, "WORLD_SIZE"),
        (TORCHRUN, "LOCAL_WORLD_SIZE"),
        (DEEPSPEED, "LOCAL_SIZE"),
        (SRUN, "SLURM_PROCID"),
        (SRUN, "SLURM_LOCALID"),
        (SRUN, "SLURM_NODEID"),
        (SRUN, "SLURM_STEP_NUM_TASKS"),
        (SCRIPT, "SLURM_RESTART_COUNT"),
        (TORCHRUN, "BATCHGEN_ATTEMPT"),
    ],
)
@pytest.mark.parametrize("text", ["", "two", "1.5"])
def test_a_variable_that_is_no_number_is_named(environment: dict[str, str], name: str, text: str) -> None:
    with pytest.raises(WorldError, match=f"^{name} is '{text}', not a number"):
        from_environment(environment | {name: text})


@pytest.mark.parametrize("text", ["", "four", "4(x", "4(x2", "4(xtwo)", "4(2)", "4,,3", "4(x2),", "-4"])
def test_a_malformed_list_of_tasks_is_shown(text: str) -> None:
    with pytest.raises(WorldError, match=r"SLURM_STEP_TASKS_PER_NODE is .*, not a list like"):
        from_environment(srun(10, 2, 2, SLURM_STEP_TASKS_PER_NODE=text))


def test_a_list_of_tasks_without_this_node_is_shown() -> None:
    with pytest.raises(WorldError, match=r"SLURM_STEP_TASKS_PER_NODE is '4\(x2\)': it does not say"):
        from_environment(srun(10, 2, 2, SLURM_STEP_TASKS_PER_NODE="4(x2)"))


@pytest.mark.parametrize(
    "changed",
    [
        {"RANK": "8"},
        {"RANK": "-1"},
        {"LOCAL_RANK": "4"},
        {"LOCAL_WORLD_SIZE": "9"},
        {"WORLD_SIZE": "0"},
        {"LOCAL_RANK": "-1"},
    ],
)
def test_variables_that_contradict_each_other_are_refused(changed: dict[str, str]) -> None:
    with pytest.raises(WorldError, match="do not fit together"):
        from_environment(TORCHRUN | changed)


def test_all_ranks_of_one_start_have_the_same_launch_and_another_start_has_another() -> None:
    launch = from_environment(srun(0, 0, 0)).launch
    assert from_environment(srun(10, 2, 2)).launch == launch
    for changed in ({"SLURM_JOB_ID": "43"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}):
        assert from_environment(SRUN | changed).launch != launch
    for name in ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        assert from_environment(TORCHRUN | {name: "7"}).launch != from_environment(TORCHRUN).launch


def test_the_job_and_its_restarts() -> None:
    first = from_environment(SCRIPT)
    again = from_environment(SRUN | {"SLURM_RESTART_COUNT": "2"})
    assert (first.job, first.restarts) == ("42", 0)
    assert (again.job, again.restarts) == ("42", 2)


def test_the_attempt_of_the_starter_counts_for_its_ranks_alone() -> None:
    assert from_environment(TORCHRUN | {"BATCHGEN_ATTEMPT": "3"}).attempt == 3
    # A run that a rank's environment reached by accident is a run of its own.
    assert from_environment(SCRIPT | {"BATCHGEN_ATTEMPT": "3"}).attempt is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[07-09,12],login", "gpu07"),
        ("node1", "node1"),
        ("a,b", "a"),
        ("rack2-n[3]-ib,x", "rack2-n3-ib"),
        ("n[1,5-7]", "n1"),
    ],
)
def test_under_plain_srun_the_ranks_meet_on_the_first_node(nodes: str, first: str) -> None:
    world = from_environment(srun(3, 3, 0, SLURM_STEP_NODELIST=nodes))
    host, _, port = world.master.rpartition(":")
    assert host == first
    assert 12_000 <= int(port) < 32_000
    assert from_environment(srun(9, 1, 2, SLURM_STEP_NODELIST=nodes)).master == world.master


def test_steps_and_jobs_do_not_meet_each_other() -> None:
    changes = ({}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "43"}, {"SLURM_JOB_ID": "43", "SLURM_STEP_ID": "1"})
    assert len({from_environment(srun(0, 0, 0, SLURM_STEP_NODELIST="n1", **change)).master for change in changes}) == 4


def test_what_the_launcher_says_about_the_meeting_place_goes_first() -> None:
    assert from_environment(TORCHRUN).master == from_environment(DEEPSPEED).master == "node1:29500"
    said = srun(0, 0, 0, SLURM_STEP_NODELIST="n[1-3]", MASTER_ADDR="fast", MASTER_PORT="1234")
    assert from_environment(said).master == "fast:1234"
    assert from_environment({"MASTER_ADDR": "fast", "MASTER_PORT": "1234"}).master == ""
    assert from_environment(without(TORCHRUN, "MASTER_PORT")).master == ""


JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NNODES": "1"}


@pytest.mark.parametrize(("changed", "ranks"), [({}, 1), ({"SLURM_NNODES": "2"}, 1), ({"SLURM_NNODES": "2"}, 4)])
def test_a_job_with_room_for_several_is_not_left_to_one_process(changed: dict[str, str], ranks: int) -> None:
    with pytest.raises(WorldError, match=r"job 7 has . node\(s\) and 4 tasks, .*Put srun in front"):
        check_start({**JOB, **changed}, ranks)


@pytest.mark.parametrize(
    ("changed", "ranks"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, 1),
        ({"RANK": "0", "WORLD_SIZE": "4"}, 1),
        ({"SLURM_NTASKS": "1"}, 1),
        ({}, 4),
    ],
)
def test_other_starts_in_a_job_are_let_through(changed: dict[str, str], ranks: int) -> None:
    check_start({**JOB, **changed}, ranks)
    check_start({}, ranks)
