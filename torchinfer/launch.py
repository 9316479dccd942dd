"""Which processes an engine is: this one, those of several GPUs of a machine, or those of all hosts of a TPU slice."""

from __future__ import annotations

from torchinfer.config import EngineConfig
from torchinfer.device import device_type
from torchinfer.engine import Engine
from torchinfer.errors import ConfigError
from torchinfer.hosts import Hosts, find_hosts, join
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.lockstep import Group, follow
from torchinfer.ranks import has_ranks, start_ranks
from torchinfer.startup import build_engine, check_division


def start_engine(config: EngineConfig) -> Engine:
    """Load the checkpoint, allocate the cache, compile what has to be compiled.

    Where the engine is several processes, this one leads: it starts those of other ranks, or waits until all other
    hosts of a TPU slice have called `run_follower`.

    Raises:
        CheckpointError, ConfigError, DeviceError: what does not fit, before the memory for it is taken if possible.
        EngineError: another process is not there, or has ended.
    """
    hosts = hosts_of(config)
    if hosts is not None and not hosts.leads:
        raise ConfigError(
            f"this is host {hosts.index} of {len(hosts.names)} (TPU_WORKER_ID), which does as host 0, "
            f"{hosts.names[0]}, is told: run `torchinfer serve` with the same options here, and send requests there"
        )
    checkpoint = Checkpoint.open(config.model)
    if hosts is not None:
        group = Group(True, join(hosts, config.hosts_port))
    elif has_ranks(config):
        check_division(config, checkpoint)
        group = start_ranks(config)
    else:
        return build_engine(config, checkpoint)
    try:
        return build_engine(config, checkpoint, group)
    except BaseException:
        group.close()
        raise


def hosts_of(config: EngineConfig) -> Hosts | None:
    """The hosts of the TPU slice that an engine runs on; None: this one.

    Raises:
        ConfigError: they are named wrongly.
    """
    return find_hosts() if config.tensor_parallel_size > 1 and device_type(config.device) == "xla" else None


def run_follower(config: EngineConfig, hosts: Hosts) -> None:
    """On all hosts but the first: the engine that does as the first one's, until that is closed.

    Raises what `start_engine` raises.
    """
    follow_with(config, Group(False, join(hosts, config.hosts_port)))


def follow_with(config: EngineConfig, group: Group) -> None:
    """An engine that does as the one which leads a group, until that is closed.

    Raises what `start_engine` raises.
    """
    try:
        follow(build_engine(config, Checkpoint.open(config.model), group), *group.links)
    finally:
        group.close()
