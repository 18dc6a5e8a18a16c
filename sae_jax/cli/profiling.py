"""`--profile`: what the device does in a few seconds of training, as an XLA trace."""

import time
from collections.abc import Callable
from pathlib import Path

import jax

from sae_jax.sweep import Look

SECONDS_TRACED, STEPS_TRACED = 3.0, 1000
"""Whichever comes first: three seconds of a tiny model are a hundred thousand steps, and gigabytes."""


class Profile:
    """Traces what follows the first look, when all is compiled, for some seconds or steps, or to the end."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self.say = folder, say
        self.began: tuple[float, Look] | None = None
        self.over = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def show(self, look: Look) -> None:
        """Start or stop, as it is time to."""
        if look.member_steps == look.total:
            self._stop()
        elif self.began is None:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of Python would slow down what is looked at
            jax.profiler.start_trace(str(self.folder), profiler_options=options)
            self.began = time.monotonic(), look
        elif time.monotonic() - self.began[0] > SECONDS_TRACED or _steps(self.began[1], look) >= STEPS_TRACED:
            self._stop()

    def _stop(self) -> None:
        if self.over:
            return
        self.over = True
        if self.began is None:
            self.say("nothing was traced: training ended with its first chunk of steps, which compiles")
            return
        seconds = time.monotonic() - self.began[0]
        jax.profiler.stop_trace()
        self.say(
            f"traced {seconds:.1f} s of training into {self.folder}: pip install xprof, then "
            f"xprof --logdir {self.folder}; or open the trace.json.gz in it at https://ui.perfetto.dev"
        )


def _steps(seen: Look, look: Look) -> float:
    """Between two looks, in all chunks of members."""
    return (look.member_steps - seen.member_steps) / (look.stop - look.first)
