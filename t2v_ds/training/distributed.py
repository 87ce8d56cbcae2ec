"""Which process am I, and how do the processes talk: launcher variables -> ranks -> process group -> collectives.

    SLURM task | deepspeed or torchrun | plain python
        -> detect_ranks(environment) -> Ranks (written back to the environment, where DeepSpeed reads them)
        -> connect() -> process group (nccl on GPU, gloo on CPU) -> Collectives

DeepSpeed is not imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed as dist

from t2v_ds.errors import ConfigError

logger = logging.getLogger(__name__)

# Saving and visuals are done by rank 0 while the others wait in a collective; the watchdog, not this limit, ends hangs.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """The place of this process among all."""

    rank: int
    local_rank: int  # on this node
    world_size: int
    nodes: int
    master_addr: str
    master_port: int

    def environment(self) -> dict[str, str]:
        """The variables that torch and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def detect_ranks(env: Mapping[str, str]) -> Ranks:
    """Map the variables of SLURM, of the `deepspeed` launcher or torchrun, or of none of them, to `Ranks`.

    A launcher's RANK and WORLD_SIZE win over SLURM's variables, because the launcher may itself be a SLURM task.

    Raises:
        ConfigError: variables that contradict one another, are missing or are not whole numbers.
    """
    launched = "RANK" in env or "WORLD_SIZE" in env
    # SLURM_PROCID alone means nothing: the batch shell has it too, outside every step.
    slurm_tasks = _integer(env, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in env else 0
    if launched:
        ranks = _launcher_ranks(env)
        if ranks.world_size == 1 and slurm_tasks > 1:
            raise ConfigError(
                f"WORLD_SIZE is 1 but the SLURM step has {slurm_tasks} tasks, so each would train alone: "
                "unset RANK and WORLD_SIZE before srun"
            )
        return ranks
    if slurm_tasks:
        return _slurm_ranks(env, slurm_tasks)
    return Ranks(0, 0, 1, 1, "127.0.0.1", free_port())


def _launcher_ranks(env: Mapping[str, str]) -> Ranks:
    for present, absent in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if present in env and absent not in env:
            raise ConfigError(f"the environment has {present}={env[present]} but no {absent}: set both or neither")
    rank, world = _integer(env, "RANK"), _integer(env, "WORLD_SIZE")
    if not 0 <= rank < world:
        raise ConfigError(f"RANK is {rank} but WORLD_SIZE is {world}; RANK must be 0 to {world - 1}")
    if world == 1:
        port = _integer(env, "MASTER_PORT") if "MASTER_PORT" in env else free_port()
        return Ranks(0, _integer(env, "LOCAL_RANK") if "LOCAL_RANK" in env else 0, 1, 1, env.get("MASTER_ADDR", "127.0.0.1"), port)
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in env:
            raise ConfigError(f"WORLD_SIZE is {world} but {name} is not set: start the ranks with deepspeed, torchrun or srun")
    per_node = _integer(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else world
    if "LOCAL_SIZE" in env and "LOCAL_WORLD_SIZE" not in env:  # the deepspeed launcher's name for it
        per_node = _integer(env, "LOCAL_SIZE")
    local = _integer(env, "LOCAL_RANK")
    if not 0 <= local <= rank:
        raise ConfigError(f"LOCAL_RANK is {local} but RANK is {rank}; LOCAL_RANK must be 0 to RANK")
    return Ranks(rank, local, world, max(1, world // max(1, per_node)), env["MASTER_ADDR"], _integer(env, "MASTER_PORT"))


def _slurm_ranks(env: Mapping[str, str], world: int) -> Ranks:
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        if name not in env:
            raise ConfigError(f"SLURM_STEP_NUM_TASKS is {world} but {name} is not set: start the ranks with srun")
    rank, local = _integer(env, "SLURM_PROCID"), _integer(env, "SLURM_LOCALID")
    if not 0 <= rank < world:
        raise ConfigError(f"SLURM_PROCID is {rank} but SLURM_STEP_NUM_TASKS is {world}; SLURM_PROCID must be 0 to {world - 1}")
    nodes = _integer(env, "SLURM_STEP_NUM_NODES") if "SLURM_STEP_NUM_NODES" in env else 1
    if world == 1:
        return Ranks(0, local, 1, nodes, "127.0.0.1", free_port())
    address = env.get("MASTER_ADDR") or _first_host(env)
    port = _integer(env, "MASTER_PORT") if env.get("MASTER_PORT") else 20000 + _integer(env, "SLURM_JOB_ID") % 20000
    return Ranks(rank, local, world, nodes, address, port)


def _first_host(env: Mapping[str, str]) -> str:
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not hosts:
        raise ConfigError("neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is set: start the ranks with srun, or set MASTER_ADDR")
    try:
        command = ["scontrol", "show", "hostnames", hosts]
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
        if lines:
            return lines[0]
    except (OSError, subprocess.SubprocessError) as error:
        if "[" not in hosts:  # a plain list needs no scontrol to be read
            return hosts.split(",")[0]
        raise ConfigError(f"'scontrol show hostnames {hosts}' failed ({error}): set MASTER_ADDR to the first host") from error
    raise ConfigError(f"'scontrol show hostnames {hosts}' named no host: set MASTER_ADDR to the first host")


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except KeyError:
        raise ConfigError(f"{name} is not set: start the ranks with deepspeed, torchrun or srun") from None
    except ValueError:
        raise ConfigError(f"{name} is {env[name]!r}; expected a whole number") from None


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Collectives:
    """What the ranks do together; every method must be called by all ranks in the same order. No-ops on one rank."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        self.device = device

    @property
    def rank(self) -> int:
        """0 to world_size - 1."""
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.ranks.world_size

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` (any shape, on `device`) over the ranks, in place, and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite `tensor` (any shape, on `device`) by rank 0's, in place, and return it."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            self.any(False)  # an all-reduce: nccl's own barrier guesses the device

    def any(self, flag: bool) -> bool:
        """Is `flag` set on any rank? The same answer on all."""
        if self.world_size == 1:
            return flag
        return bool(self.all_reduce_sum(torch.tensor(float(flag), device=self.device)).item() > 0)

    def gather_object(self, value: Any) -> list[Any]:
        """The ranks' `value`s (picklable), in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` (picklable), on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


    def noticeboard(self) -> StoreNoticeboard | None:
        """Where ranks leave short texts for each other; None on one rank. No collective."""
        return StoreNoticeboard(self.rank, self.world_size) if self.world_size > 1 else None


class StoreNoticeboard:
    """Texts of ranks in the process group's key-value store, which answers also while the ranks hang in a collective."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._store = dist.distributed_c10d._get_default_store().clone()  # a connection of its own: the other may be waiting
        self._store.set_timeout(timedelta(seconds=5))

    def post(self, text: str) -> None:
        """Replace what this rank has posted; nothing happens where the store is gone."""
        with contextlib.suppress(dist.DistError):
            self._store.set(self._key(self.rank), text)

    def read(self) -> dict[int, str]:
        """What each of the other ranks has posted last; nothing where the store is gone."""
        with contextlib.suppress(dist.DistError):
            others = [rank for rank in range(self.world_size) if rank != self.rank and self._store.check([self._key(rank)])]
            return {rank: self._store.get(self._key(rank)).decode() for rank in others}
        return {}

    @staticmethod
    def _key(rank: int) -> str:
        return f"t2v_ds/watchdog/{rank}"


_connected: Collectives | None = None


def pick_device(local_rank: int) -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # One SLURM task may see only its own GPU: then every local rank uses device 0.
    if local_rank >= count and count != 1:
        raise ConfigError(
            f"rank {local_rank} of this node has no GPU of its own: the node shows {count}; start at most {count} ranks a node"
        )
    return torch.device("cuda", local_rank if count > 1 else 0)


def connect() -> Collectives:
    """Find the ranks, join the process group and return the collectives; further calls return the same object."""
    global _connected
    if _connected is None:
        ranks = detect_ranks(os.environ)
        write_environment(ranks, os.environ)
        device = pick_device(ranks.local_rank)
        if device.type == "cpu":
            keep_freed_memory()
        initialise_process_group(device, ranks)
        _connected = Collectives(ranks, device)
        logger.info("rank %d of %d on %s", ranks.rank, ranks.world_size, device)
    return _connected


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: a step frees and takes the same gigabytes again, and otherwise pays for each page anew.

    Measured: a sixth of a CPU step of the demo's transformer. Elsewhere than on glibc nothing happens.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
    try:
        libc = ctypes.CDLL(None)
        for parameter, value in ((trim_threshold, 2**31 - 1), (top_pad, 2**28), (mmap_max, 0)):
            libc.mallopt(parameter, value)
    except (OSError, AttributeError):
        logger.debug("no mallopt here", exc_info=True)


def write_environment(ranks: Ranks, env: MutableMapping[str, str]) -> None:
    """Write the ranks where torch and DeepSpeed read them, and choose DeepSpeed's accelerator."""
    env.update(ranks.environment())
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")
    # Left alone, gloo listens where this machine's name points to: to 127.0.1.1 on many, to nowhere in some containers.
    interface = _interface_towards(ranks.master_addr)
    if interface:
        env.setdefault("GLOO_SOCKET_IFNAME", interface)


def _interface_towards(host: str) -> str | None:
    """The network interface over which this machine reaches a host, such as eth0; None if there is none to be found."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # of a datagram socket: nothing is sent
            mine = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if mine in (one.address for one in addresses):
            return str(name)
    return None


def initialise_process_group(device: torch.device, ranks: Ranks) -> None:
    """Join torch's default process group: nccl on GPU, gloo on CPU; one process alone needs no port."""
    warnings.filterwarnings("ignore", module=r"torch\.distributed.*")
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.HashStore() if ranks.world_size == 1 else None  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=COLLECTIVE_TIMEOUT)


def finish(code: int) -> NoReturn:
    """End the process with `code`.

    With several ranks about one run in ten aborts in the interpreter's finalisation (a gloo thread takes the GIL),
    so there the streams are flushed and finalisation is left out.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if dist.is_available() and dist.is_initialized():
        os._exit(code)
    sys.exit(code)
