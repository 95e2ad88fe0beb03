"""A real Slurm of two virtual nodes on this machine: its own munge key, ports, spool and logs in one folder.

As root each node has namespaces of its own: it has a host name, which resolves, and killing the first process of a node
is a power cut. Without root both nodes share the host's name. Debian's slurmd may run several times on a host.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

PACKAGES = "slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel")
NODES = ("node1", "node2")
CPUS, GPUS, LARGEST_ARRAY = 32, 4, 8
# Where nodes have no namespaces, their names shall resolve all the same: ranks meet on the first of them.
HOSTS, LINE = Path("/etc/hosts"), f"127.0.0.1 {' '.join(NODES)} # batchgen's tests of jobs, in "
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CONF = """\
ClusterName=batchgen
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=20
MinJobAge=600
KillWait=5
MaxArraySize={largest_array}
GresTypes=gpu
{nodes}
PartitionName=low Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=node[1-2] Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
# cred_expire is the seconds that a requeued job waits, less one. No AccountingStorage: few clusters show users theirs.

NODE = """\
hostname "$2"; mount --bind "$1/hosts" /etc/hosts
slurmd -D -N "$2" & trap "kill -TERM $!" TERM; wait $!; wait
"""


def missing() -> list[str]:
    """Programs of Slurm that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Cluster:
    """Started by `start`, ended by `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # a short path: munge's socket may have 108 bytes
        self._line = f"{LINE}{folder}\n"
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": f"{folder}/slurm.conf"}
        # Jobs inherit it: two ranks' threads on two cores would stand in each other's way.
        self.environment["OMP_NUM_THREADS"] = "1"
        able = os.getuid() == 0 and not self._fails("unshare", "-mupf", "--mount-proc", "true")
        self.has_namespaces = able and "SLURM_PLAIN" not in os.environ
        self._daemons: list[int] = []
        self._inits: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Starts all daemons; returns when both nodes are idle."""
        self._configure()
        files = {"key-file": "munge.key", "seed-file": "munge.seed", "socket": "munge.sock", "pid-file": "munged.pid"}
        files["log-file"] = "munged.log"
        own = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._daemon("munged", "--force", *own, "--num-threads=2")
        self._daemon("slurmctld", "-c")
        if not self.has_namespaces and os.access(HOSTS, os.W_OK):
            self._resolve_nodes(True)
        for node in NODES:
            self.power_on(node)
        self.until(lambda: self.nodes("idle") == len(NODES), 60)

    def _configure(self) -> None:
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        host, port = socket.gethostname().partition(".")[0], _free_ports(1 + len(NODES))
        size = f"CPUs={CPUS} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=64000"
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + number} {size} Gres=gpu:{GPUS}"
            for number, node in enumerate(NODES, 1)
        ]
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        text = CONF.format(
            host=host, port=port, folder=self.folder, user=user, nodes="\n".join(nodes), largest_array=LARGEST_ARRAY
        )
        (self.folder / "slurm.conf").write_text(text)
        # GPUs that are none: slurmd asks for a device, and takes any.
        (self.folder / "gres.conf").write_text(
            "".join(f"NodeName=node[1-2] Name=gpu File={self._device(number)}\n" for number in range(GPUS))
        )
        hosts = ["localhost " + host, *NODES]
        (self.folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in hosts))
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()

    def _device(self, number: int) -> str:
        path = self.folder / f"nvidia{number}"
        if self._fails("mknod", str(path), "c", "1", "3"):
            return f"/dev/tty{number}"
        return str(path)

    def _fails(self, *words: str) -> bool:
        return subprocess.run(words, capture_output=True, env=self.environment).returncode != 0

    def _daemon(self, *words: str) -> None:
        # Into a file: a daemon keeps what it has inherited open.
        with (self.folder / f"{words[0]}.out").open("wb") as out:
            subprocess.run(
                words, env=self.environment, check=True, timeout=60, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def _resolve_nodes(self, wanted: bool) -> None:
        """Writes this cluster's line, or removes it; each worker of the tests may have a cluster, and a line."""
        with HOSTS.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            lines = [line for line in file if line != self._line]
            file.seek(0)
            file.writelines([*lines, self._line] if wanted else lines)
            file.truncate()

    def power_on(self, node: str) -> None:
        """Starts a node."""
        if not self.has_namespaces:
            return self._daemon("slurmd", "-N", node)
        words = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", NODE]
        with (self.folder / f"{node}.out").open("ab") as out:
            self._inits[node] = subprocess.Popen(
                [*words, "node", str(self.folder), node],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        return None

    def power_off(self, node: str) -> None:
        """Cuts a node's power: all its processes are gone at once. Slurm is told; it would notice in half a minute."""
        self._inits[node].kill()
        self._inits[node].wait()
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=powercut")

    def stop(self) -> None:
        """Cancels all jobs and ends all daemons."""
        if self._line in HOSTS.read_text():
            self._resolve_nodes(False)
        with suppress(subprocess.SubprocessError):
            self.run("scancel", "--full", "-u", str(os.getuid()), check=False)
        for init in self._inits.values():
            init.kill()  # with it, all that it has started
            init.wait()
        for path in (*self.folder.glob("slurmd.*.pid"), *map(self.folder.joinpath, ("slurmctld.pid", "munged.pid"))):
            # In a namespace, a node writes the number that it has there.
            if not path.exists() or (self.has_namespaces and path.name.startswith("slurmd.")):
                continue
            pid = int(path.read_text())
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
                _until(lambda: not Path(f"/proc/{pid}").exists(), 10)  # noqa: B023
                os.kill(pid, signal.SIGKILL)

    def run(self, *words: object, check: bool = True, timeout: float = 60) -> str:
        """The output of a command that asks the cluster."""
        done = subprocess.run(
            list(map(str, words)),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"{words}: {done.stderr}{done.stdout}"
        return done.stdout.strip()

    def nodes(self, state: str) -> int:
        """How many are in that state."""
        found = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T", check=False).splitlines()
        return sum(line.split()[1] == state for line in found)

    def state(self, job: str) -> str:
        """Slurm's word; of an array, all tasks' words."""
        words = self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T", check=False).split()
        return " ".join(sorted(set(words)))

    def wait(self, job: str, *states: str, seconds: float = 120) -> str:
        """Waits until the job is in one of `states`."""
        try:
            self.until(lambda: self.state(job) in states, seconds)
        except AssertionError:
            said = self.run("scontrol", "show", "job", job, check=False)
            raise AssertionError(f"job {job} is {self.state(job)}, not {' or '.join(states)}\n{said}") from None
        return self.state(job)

    def until(self, happened: Callable[[], bool], seconds: float = 60) -> None:
        """Waits for something."""
        assert _until(happened, seconds), "it has not happened"


def _until(happened: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _free_ports(count: int) -> int:
    """The first of several free ports in a row, below those that the system gives to clients."""

    def is_free(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0

    def candidates() -> Iterator[int]:
        while True:
            yield random.randrange(20_000, 29_000)

    return next(port for port in candidates() if all(map(is_free, range(port, port + count))))
