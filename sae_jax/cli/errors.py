"""Errors of the machine as a sentence."""

import errno


def told(error: OSError) -> str:
    """An operating-system error as a sentence."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{where}the disk is full; nothing was left half-written"
    return f"{where}{error.strerror or error}"
