"""The process of another rank than the first: python -m torchinfer.rank_process FILE_DESCRIPTOR, of the link to it."""

from __future__ import annotations

import logging
import socket
import sys

from torchinfer.config import EngineConfig
from torchinfer.errors import TorchinferError
from torchinfer.launch import follow_with
from torchinfer.link import Link
from torchinfer.lockstep import Group
from torchinfer.parallel import Shard
from torchinfer.ranks import Rank, leave

logger = logging.getLogger(__name__)


def main() -> int:
    """Compute what the first rank is asked, until it ends; 1 if something else ends this process."""
    link = Link(socket.socket(fileno=int(sys.argv[1])), "rank 0")
    try:
        fields, (rank, world, device, store), log_level = link.receive()
        logging.basicConfig(stream=sys.stderr, format=f"%(asctime)s %(levelname)s rank {rank}: %(name)s: %(message)s")
        logging.getLogger("torchinfer").setLevel(log_level)
        Rank(Shard(rank, world), device, store).join()
        follow_with(EngineConfig(**fields | {"progress": False}), Group(False, [link]))
    except TorchinferError as error:
        logger.error("%s", error)
        return 1
    finally:
        leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
