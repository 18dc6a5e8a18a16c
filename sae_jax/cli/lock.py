"""A folder that one process at a time writes to."""

import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sae_jax.base import InputError

LOCK = ".lock"
NOT_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
"""What a file system without locks answers."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes. The kernel lets go of it when this one ends, however it ends.

    Args:
      folder: exists.

    Raises:
      InputError: another process holds it.
    """
    file = _opened(folder)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        file.close()


def _opened(folder: Path) -> BinaryIO:
    path = folder / LOCK
    while True:
        file = path.open("ab+", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode() or "another process"
            file.close()
            raise InputError(f"{folder} is in use by {holder}: wait for it, or give another folder") from None
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            warnings.warn(
                f"{folder} lies on a file system without locks ({error.strerror}): "
                "nothing keeps a second run from writing there",
                stacklevel=2,
            )
            return file
        # who held it before may have removed the file between its opening and its locking
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()
