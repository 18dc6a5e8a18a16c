"""What goes on beside training: the display, the records, the page of `--live`, and a trace."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from sae_jax import distributed, recording
from sae_jax.cli.folder import METRICS, Run
from sae_jax.cli.live import Live
from sae_jax.cli.profiling import Profile
from sae_jax.cli.progress import Ticker
from sae_jax.recording import Recorder
from sae_jax.sweep import Look


@contextmanager
def observed(
    ticker: Ticker,
    run: Run,
    asked: dict[str, Any],
    *,
    resume: bool,
    tensorboard: bool,
    wandb: str | None,
    profile: bool,
    page: Live,
) -> Iterator[Callable[[Look], None]]:
    """Show, record and trace a run; of several processes only the first does.

    Args:
      ticker: the display.
      run: its folder. `metrics.jsonl` grows beside the checkpoints that it must agree with, and what other
        programs look at while it grows lies in the folder itself.
      asked: the run's request.
      resume: whether what was recorded of the run goes on.
      tensorboard: whether to write its files.
      wandb: a project of Weights & Biases, or None.
      profile: whether to trace.
      page: what `--live` serves.

    Yields:
      What is to be called between chunks of steps.

    Raises:
      InputError: what is to be written needs a package or a key that is not there.
    """
    if not distributed.first():
        yield ticker.show
        return
    curves = run.out / "tensorboard"
    if not resume and curves.exists():
        shutil.rmtree(curves)
    writers = [recording.json_lines(run.checkpoints / METRICS)]
    if tensorboard:
        writers.append(recording.tensorboard(curves, asked["members"]))
    if wandb is not None:
        writers.append(recording.wandb(wandb, run.out, asked["members"], asked))
    with ExitStack() as stack:
        shows = [ticker.show, stack.enter_context(Recorder(writers)).show]
        if page.serves:
            shows.append(page.show)
        if profile:
            shows.append(stack.enter_context(Profile(run.out / "profile", ticker.say)).show)

        def show(look: Look) -> None:
            for each in shows:
                each(look)

        yield show
