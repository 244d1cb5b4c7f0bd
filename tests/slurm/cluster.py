"""A private SLURM cluster of this machine: real slurmctld, slurmd and munge, two nodes with pretend GPUs, all in one folder.

with Cluster(Path("base")) as cluster:
    job = cluster.sbatch("--wrap", "hostname")
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.e2e.commands import ENVIRONMENT

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
NODES, CPUS, GPUS = ("n1", "n2"), 8, 2
GRACE_SECONDS, KILL_WAIT_SECONDS = 10, 15


def missing() -> str | None:
    """What this machine lacks for a cluster, with the line that mends it; None: nothing."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if absent:
        return f"{', '.join(absent)} not installed: {INSTALL}"
    return None if os.geteuid() == 0 else "pretend GPUs and host names need root"


class Cluster:
    """Starts in a second or two; stops only what it started."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.processes: dict[str, subprocess.Popen] = {}
        self.ports = dict(zip(("slurmctld", *NODES), _free_ports(1 + len(NODES)), strict=True))
        self.environment = {
            **{k: v for k, v in ENVIRONMENT.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))},
            "SLURM_CONF": str(base / "slurm.conf"),
            "PATH": f"{ENVIRONMENT['PATH']}:/usr/sbin:/sbin",
            "USER": "root",
            "SFT_DIST_BACK_OFF_SECONDS": "1",
            "SFT_DIST_ON_CPU": "1",  # its GPUs are pretended
        }

    def __enter__(self) -> Cluster:
        try:
            self._write()
            self._begin("munged", "munged", "-F", *self._munge_options())
            _until(lambda: (self.base / "munge" / "socket").exists(), "munged has a socket")
            self._begin("slurmctld", "slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
            _until(
                lambda: self.out("sinfo", "-h", "-N", "-o", "%t", check=False).split() == ["idle"] * 4, "nodes are idle"
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self.processes:
            self.out("scancel", "--user=root", "--signal=KILL", "--full", check=False)
            self.out("scancel", "--user=root", check=False)
            with contextlib.suppress(AssertionError):
                _until(lambda: not self.out("squeue", "-h", check=False), "all jobs have ended")
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()
        for path in Path("/proc").glob("[0-9]*"):  # what a node whose daemon was killed left running
            with contextlib.suppress(OSError):
                if f"SLURM_CONF={self.base}/".encode() in (path / "environ").read_bytes():
                    os.kill(int(path.name), signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, with a host name and a hosts file of its own."""
        inside = f"mount --bind {self.base}/hosts /etc/hosts && hostname {node} && exec slurmd -D -N {node}"
        self._begin(node, "unshare", "--mount", "--uts", "bash", "-c", inside)

    def kill_node(self, node: str) -> None:
        """kill -9 of its slurmd; what it started goes on, as on a real node."""
        process = self.processes.pop(node)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def out(self, *command: str, check: bool = True) -> str:
        """What a client command prints."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=check).stdout

    def sbatch(self, *arguments: str, folder: Path) -> int:
        """Submit from `folder`; returns the job's number."""
        made = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            cwd=folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stderr
        return int(made.stdout.split(";")[0])

    def state(self, job: int) -> str:
        """A job's state in one word: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT …"""
        return re.search(r"JobState=(\w+)", self.out("scontrol", "show", "job", str(job)))[1]

    def restarts(self, job: int) -> int:
        """How often it was requeued."""
        return int(re.search(r"Restarts=(\d+)", self.out("scontrol", "show", "job", str(job)))[1])

    def wait(self, job: int, *states: str, seconds: float = 90.0) -> str:
        """Wait until the job is in one of the states; fails, with what SLURM says of it, when it is not in time."""
        _until(
            lambda: self.state(job) in states,
            f"job {job} is {' or '.join(states)}",
            seconds,
            lambda: self.describe(job),
        )
        return self.state(job)

    def describe(self, job: int) -> str:
        """For a failed test."""
        tails = [
            f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in sorted(self.base.glob("*.log"))
        ]
        return "\n".join([self.out("scontrol", "show", "job", str(job), check=False), *tails])

    def _begin(self, name: str, *command: str) -> None:
        with (self.base / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def _munge_options(self) -> list[str]:
        munge = self.base / "munge"
        names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        return [f"--{option}={munge / file}" for option, file in names.items()]

    def _write(self) -> None:
        """Every file of the cluster."""
        base = self.base
        for name, mode in (("munge", 0o755), ("state", 0o700), ("dev", 0o755)):
            (base / name).mkdir(parents=True)
            (base / name).chmod(mode)
        base.chmod(0o755)
        (base / "munge" / "key").write_bytes(os.urandom(128))
        (base / "munge" / "key").chmod(0o400)
        for gpu in range(GPUS):
            os.mknod(base / "dev" / f"nvidia{gpu}", 0o666 | 0o020000, os.makedev(1, 3))  # /dev/null's number
        addresses = {node: f"127.77.0.{number}" for number, node in enumerate(NODES, 1)}
        hosts = ["127.0.0.1 localhost", *(f"{address} {node}" for node, address in addresses.items())]
        (base / "hosts").write_text("\n".join(hosts) + "\n")
        for node in NODES:
            (base / f"spool-{node}").mkdir()
        (base / "gres.conf").write_text(f"Name=gpu File={base}/dev/nvidia[0-{GPUS - 1}] Flags=nvidia_gpu_env\n")
        (base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        nodes = [
            f"NodeName={node} NodeHostname={node} NodeAddr={addresses[node]} Port={self.ports[node]} CPUs={CPUS} Gres=gpu:{GPUS}"
            for node in NODES
        ]
        host = socket.gethostname()
        tracking = "cgroup" if Path("/sys/fs/cgroup/freezer").is_dir() else "linuxproc"
        (base / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={self.ports["slurmctld"]}
AuthType=auth/munge
AuthInfo=socket={base}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait={KILL_WAIT_SECONDS}
SlurmdTimeout=5
MessageTimeout=5
InactiveLimit=0
GresTypes=gpu
{chr(10).join(nodes)}
PartitionName=preempt Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_SECONDS}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
""")


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


def _until(is_so: Callable[[], bool], what: str, seconds: float = 20.0, describe: Callable[[], str] = str) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:.0f} s: {what}\n{describe()}")
        time.sleep(0.1)
