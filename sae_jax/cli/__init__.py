"""The command line: `sae-jax sweep | train | plan | eval | ...`, one function per command."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import tyro

import sae_jax
from sae_jax.base import InputError
from sae_jax.cli import (
    benchmarking,
    compilation_cache,
    conversion,
    dashboards,
    doctor,
    evaluate,
    harvesting,
    hub,
    inspection,
    labelling,
    memory,
    planning,
    reporting,
    training,
    verification,
)
from sae_jax.cli.errors import told
from sae_jax.cli.options import Training


def sweep(options: tyro.conf.OmitArgPrefixes[Training]) -> int:
    """Train an SAE for every combination of the hyper-parameters given, all at once: the main job.

    A:B:N is N log-spaced values from A to B; a,b,c is a list; every option with several values makes an
    axis, and axes multiply. Without DATA it runs on the eight tokens of the post that started this package.
    """
    return training.sweep_command(options)


def train(options: tyro.conf.OmitArgPrefixes[Training]) -> int:
    """Train one SAE; the options are those of sweep, each with one value."""
    return training.train_command(options)


def plan(options: tyro.conf.OmitArgPrefixes[planning.Planning]) -> int:
    """Tell what a sweep will take of memory and time, on this machine or another; the options are sweep's."""
    return planning.run(options)


def bench_(options: tyro.conf.OmitArgPrefixes[benchmarking.Bench]) -> int:
    """Tell how fast this machine trains: four usual works, or one of your own, in about half a minute."""
    return benchmarking.run(options)


def eval_(options: tyro.conf.OmitArgPrefixes[evaluate.Eval]) -> int:
    """Measure an SAE on data."""
    return evaluate.run(options)


def harvest(options: tyro.conf.OmitArgPrefixes[harvesting.Harvest]) -> int:
    """Store a language model's activations on text, to train on."""
    return harvesting.run(options)


def features_(options: tyro.conf.OmitArgPrefixes[dashboards.Features]) -> int:
    """Show what each feature of an SAE answers to: its contexts, neighbours, and what it writes."""
    return dashboards.run(options)


def label_(options: tyro.conf.OmitArgPrefixes[labelling.Label]) -> int:
    """Tell what the features of an SAE are called, or put labels beside it."""
    return labelling.run(options)


def report_(options: tyro.conf.OmitArgPrefixes[reporting.Report]) -> int:
    """Write the report of a finished run anew, with the dashboards and labels that have come since."""
    return reporting.run(options)


def verify(options: tyro.conf.OmitArgPrefixes[verification.Verify]) -> int:
    """Hold our architectures, or an SAE, against PyTorch; exit 1 where an error passes its bound."""
    return verification.run(options)


def doctor_(options: tyro.conf.OmitArgPrefixes[doctor.Doctor]) -> int:
    """Tell versions and devices, and probe this machine's arithmetic; exit 1 if something is wrong."""
    return doctor.run(options)


def convert_(options: tyro.conf.OmitArgPrefixes[conversion.Convert]) -> int:
    """Write an SAE in another weight format, checked before it is left there."""
    return conversion.run(options)


def inspect_(options: tyro.conf.OmitArgPrefixes[inspection.Inspect]) -> int:
    """Tell what is in a file of weights."""
    return inspection.run(options)


def push_(options: tyro.conf.OmitArgPrefixes[hub.Push]) -> int:
    """Put an SAE on the Hugging Face hub, in the SAELens layout with a model card."""
    return hub.run(options)


COMMANDS: dict[str, Callable[[Any], int]] = {
    "sweep": sweep,
    "train": train,
    "plan": plan,
    "bench": bench_,
    "eval": eval_,
    "harvest": harvest,
    "features": features_,
    "label": label_,
    "report": report_,
    "convert": convert_,
    "inspect": inspect_,
    "push": push_,
    "verify": verify,
    "doctor": doctor_,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 well, 1 a check failed, 2 bad input (one sentence on stderr)."""
    if arguments is None:  # the process is the command's, and no notebook's
        compilation_cache.keep_compiled()
        arguments = sys.argv[1:]
    arguments = list(arguments)
    if arguments == ["--version"]:
        print(sae_jax.__version__)
        sys.exit(0)
    try:
        sys.exit(
            tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="sae-jax",
                description="Sparse autoencoders in JAX: sweeps by vmap, verified against PyTorch.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
        )
    except InputError as error:
        fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        fail(told(error))
    except jax.errors.JaxRuntimeError as error:
        if not memory.ran_out(error):
            raise
        fail("not enough memory: try fewer latents, a smaller --batch-size or --members-at-once")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(sentence: str) -> None:
    """Say it on stderr and exit 2."""
    print(f"sae-jax: {sentence}", file=sys.stderr)
    sys.exit(2)
