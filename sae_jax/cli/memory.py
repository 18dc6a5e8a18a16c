"""What a run wants of the memory, as a table; and how one ends that wanted more than there was."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from sae_jax import distributed
from sae_jax.base import InputError
from sae_jax.cli.jobs import Job
from sae_jax.devices import free_memory
from sae_jax.need import Need, laid_out, needs, suggestion, told

GROUPS_SIDE_BY_SIDE = 3
"""Columns that a screen has room for."""


@contextmanager
def explained(
    job: Job, members_at_once: int | None, devices: int = 1, axes: Mapping[str, int] | None = None
) -> Iterator[None]:
    """A run inside that lacks memory ends in the table of what it wanted, and a sentence on what to try.

    One that cannot have enough is not begun: where a system promises memory that it has not, the run would
    be killed without a word.

    Args:
      job: what is to be trained.
      members_at_once, devices, axes: as for `needs`.

    Raises:
      InputError: there is not enough memory.
    """
    before = free_memory()
    wanted = needs(
        job.groups, source=job.source, available=before, devices=devices, axes=axes,
        members_at_once=members_at_once,
    )  # fmt: skip
    lacking = any(
        need.taken > before and laid_out(group, need, source=job.source) > before
        for group, need in zip(job.groups, wanted, strict=True)
    )
    if distributed.any_of(lacking):
        raise _refusal(wanted)
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise _refusal(wanted) from error


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory."""
    said = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said or "ut of memory" in said


def _refusal(wanted: Sequence[Need]) -> InputError:
    show(Console(stderr=True), [rows_of(need) for need in wanted])
    most = max(wanted, key=lambda need: need.taken)
    whose = (
        f"a member of {most.architecture}"
        if most.each == 1
        else f"{most.each} members of {most.architecture}"
    )
    return InputError(
        f"not enough memory: {whose} with d_sae {most.d_sae} and {most.batch_size} rows a step need "
        f"{told(most.taken)} on a device, and {told(most.available)} were free; {suggestion(most)}"
    )


def show(console: Console, columns: Sequence[dict[str, str]]) -> None:
    """A column per group, some side by side and the others below."""
    for first in range(0, len(columns), GROUPS_SIDE_BY_SIDE):
        some = columns[first : first + GROUPS_SIDE_BY_SIDE]
        view = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_header=False)
        view.add_column(no_wrap=True)
        for row in some[0]:
            view.add_row(row, *(column[row] for column in some))
        console.print(view)


def rows_of(need: Need) -> dict[str, str]:
    """A group's figures as a person reads them."""
    one = need.one
    return {
        "architecture": need.architecture,
        "d_sae": f"{need.d_sae:,}",
        "batch size": f"{need.batch_size:,}",
        "members": f"{need.members:,}",
        "parameters of a member": f"{need.parameters:,}",
        "bytes of a member:": "",
        "  parameters": told(one.parameters),
        "  optimizer": told(one.optimizer),
        "  gradients and updates": told(one.gradients),
        "  activations": told(one.activations),
        "  all, the state twice": told(one.total),
        "mesh: member, data, latent": " x ".join(map(str, need.mesh.values())),
        "members that fit": f"{need.fit:,}",
        "members at once": f"{need.at_once:,}" + (f", {need.chunks:,} times" if need.chunks > 1 else ""),
        "bytes of a device": f"{told(need.taken)} of {told(need.available)}",
    }
