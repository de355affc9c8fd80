"""A real Slurm of one node on this machine: munged, slurmctld and slurmd, with files and ports of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.agents import wait_until
from tests.forked import free_port
from tests.tiny import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={place}/munge.socket,cred_expire=5
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=60
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 OverSubscribe=NO
PartitionName=high Nodes={host} PriorityTier=2 PreemptMode=OFF OverSubscribe=NO
"""
"""Two partitions, of which one pre-empts the other with the signal of --signal, and puts the job back after 120 s. Such
a job starts again after cred_expire (120 s by default) when the scheduler looks next (sched_interval, 60 s)."""


def missing() -> str:
    """Return why there can be no cluster here, or an empty text."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} not there (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd needs root"


@dataclass
class Cluster:
    """The daemons, and commands that talk to them."""

    place: Path
    daemons: list[subprocess.Popen[bytes]]

    @classmethod
    def started(cls, place: Path) -> Cluster:
        """Start the daemons, and wait until the node is idle; `stop` ends them."""
        for name in ("state", "spool"):
            (place / name).mkdir()
        ports = (free_port(), free_port())
        text = SLURM_CONF.format(
            host=socket.gethostname().split(".")[0], place=place, ports=ports, cores=os.cpu_count()
        )
        (place / "slurm.conf").write_text(text)
        (place / "munge.key").write_bytes(os.urandom(128))
        (place / "munge.key").chmod(0o400)
        cluster = cls(place, [])
        try:
            cluster._start_daemons()
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def _start_daemons(self) -> None:
        place = self.place
        files = [f"--key-file={place}/munge.key", f"--socket={place}/munge.socket", f"--pid-file={place}/munge.pid"]
        files += [f"--log-file={place}/munge.log", f"--seed-file={place}/seed"]
        self._start("munged", "--foreground", "--force", *files)
        wait_until((place / "munge.socket").exists, 30)
        self._start("slurmctld", "-D")
        self._start("slurmd", "-D")
        wait_until(lambda: "idle" in self.said("sinfo", "--noheader", "--format=%T"), 60)

    def _start(self, program: str, *words: str) -> None:
        with (self.place / f"{program}.out").open("wb") as out:
            self.daemons.append(
                subprocess.Popen([program, *words], env=self.environment, stdout=out, stderr=subprocess.STDOUT)
            )

    @property
    def environment(self) -> dict[str, str]:
        own = {"SLURM_CONF": str(self.place / "slurm.conf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return {**os.environ, **own, "PATH": f"{Path(sys.executable).parent}:{_path()}"}

    def said(self, *words: str, cwd: Path | None = None) -> str:
        """Run a command of Slurm and return what it printed, errors included."""
        done = subprocess.run(
            words,
            env=self.environment,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return done.stdout

    def submit(self, words: Sequence[str], *, cwd: Path) -> str:
        """Submit a batch job and return its number."""
        said = self.said("sbatch", "--parsable", *words, cwd=cwd)
        assert said.strip().isdigit(), said
        return said.strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, ..."""
        words = self.said("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def stop(self) -> None:
        """End all jobs and the daemons."""
        self.said("scancel", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"
