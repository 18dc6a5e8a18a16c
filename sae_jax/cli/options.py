"""The options of `sae-jax sweep`, `train` and `plan`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sae_jax.cli.processes import Processes
from sae_jax.train import SECONDS_BETWEEN_CHECKPOINTS


def _left_out(metavar: str) -> Any:
    """An option that may be left out, whose help says itself what is then taken."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


MaybeText = Annotated[str | None, _left_out("VALUES")]
MaybeCount = Annotated[int | None, _left_out("N")]
MaybePath = Annotated[Path | None, _left_out("FOLDER")]


@dataclass
class Training:
    """What to train on what, and where to put it."""

    data: Annotated[tyro.conf.Positional[str | None], _left_out("DATA")] = None
    """A .npy, .npz or .safetensors array [n, d_in], or a store: a folder or URL that sae-jax harvest filled.
    Default: the eight tokens."""
    array: Annotated[str | None, _left_out("NAME")] = None
    """Which array of the file, where it holds several."""
    site: Annotated[str | None, _left_out("NAMES")] = None
    """Which site of a store. Of several with commas between, each is swept by itself, in a folder of its own;
    --arch crosscoder reads them all."""
    target_site: Annotated[str | None, _left_out("NAME")] = None
    """The site of the same store that a transcoder is to give."""
    stream: bool = False
    """Read a .npy, .safetensors or .pt file, or a folder of Arrow files, as training goes on and not at once.
    A store always is."""
    window_rows: Annotated[int | None, _left_out("N")] = None
    """Rows of a stream that are mixed among one another. Default: 65536."""
    world: Annotated[str | None, _left_out("NAME")] = None
    """In place of DATA a world whose features are known: toy_superposition, forty_in_five, hedging,
    sharkey_uncorrelated, sharkey_correlated, sparse_but_wrong, matryoshka_tree, synthsaebench_1k,
    synthsaebench_16k."""
    world_args: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """NAME=VALUE ...: arguments of the world, such as features=512 d_in=64 seed=1."""
    target: MaybePath = None
    """A file of rows [n, d_out] that a transcoder is to give."""
    arch: str = "relu"
    """Architectures, with commas between: relu, topk, batch_topk, jumprelu, gated, matryoshka, transcoder,
    crosscoder."""
    d_sae: MaybeText = None
    """Number of latents, or several with commas between. Default: 6 on the tokens, 4 * d_in on data, as many
    as there are features in a world."""
    l0: MaybeText = None
    """Active latents per row to arrive at: the k of TopK's family, the target L0 of the others."""
    l1: MaybeText = None
    """Weight of the L1 penalty. Default: 0.001:1:16 on the tokens, 0.0001:0.1:8 on data; train: 0.1."""
    lr: MaybeText = None
    """Adam's learning rate. Default: 0.01 on the tokens, 0.001 on data."""
    seeds: MaybeCount = None
    """How many seeds draw initial weights: 0, 1, ... Default: 16 on the tokens, 1 on data, 3 in a
    world; train: 1."""
    arg: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUES: any other argument of the architectures that take it, or of Adam (b1, b2, eps):
    tied=True, k=4,8,16, auxk_loss=auxk.saelens, of=topk, b1=0,0.9."""
    zip: Annotated[str | None, _left_out("AXES")] = None
    """Axes to walk together instead of multiplying, such as l1,lr."""
    normalise: Annotated[
        Literal["mean_norm", "unit_mean_square", "centring", "whitening", "layer_norm"] | None,
        tyro.conf.arg(help_behavior_hint=""),
    ] = None
    """Normalise the data; what is saved takes the data as they are. Default: not at all."""
    unit_norm_decoder: bool = False
    """Keep every decoder row at norm 1."""
    batch_size: MaybeCount = None
    """Rows per step; all rows where there are fewer. Default: 1024, or what the world says."""
    steps: MaybeCount = None
    """Training steps. Default: 500 on the tokens, 5000 on data."""
    data_seed: int = 0
    """Names the order of the rows, or the rows of a world."""
    members_at_once: MaybeCount = None
    """How many members train side by side. Default: as many as fit in half of the free memory, and on
    a CPU about in its cache."""
    precision: Annotated[
        Literal["bfloat16", "tensorfloat32", "highest"] | None, tyro.conf.arg(help_behavior_hint="")
    ] = None
    """To what factors of matrix products are rounded; weights, moments and thresholds stay float32. Default:
    what JAX does on the device."""
    patience: MaybeCount = None
    """Stop a member whose mean loss has not fallen by a thousandth for so many steps. Default: never."""
    keep_best: MaybeCount = None
    """Halve the grid after steps / 2^r, ..., steps / 2 until so many members are left, the frontier of L0
    against unexplained variance first; those that are left train side by side. Each architecture and width by
    itself. Default: all."""
    mesh: Annotated[str | None, _left_out("AXES")] = None
    """Devices to spread over: member=2,data=2,latent=2, or some of these, or auto. Default: one device; of
    several processes auto."""
    hosts: tyro.conf.OmitArgPrefixes[Processes] = field(default_factory=Processes)
    checkpoint_seconds: Annotated[float, tyro.conf.arg(metavar="S")] = SECONDS_BETWEEN_CHECKPOINTS
    """Between two checkpoints."""
    keep_checkpoints: Annotated[int, tyro.conf.arg(metavar="N")] = 2
    """How many of the newest checkpoints to keep while training."""
    keep_best_checkpoints: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """How many of the lowest mean loss to keep beside them, and after training too."""
    out: MaybePath = None
    """Folder for the results. Default: runs/NAME-N, the first N that is free."""
    save: Annotated[Literal["all", "frontier", "none"] | None, _left_out("{all,frontier,none}")] = None
    """Whose weights to keep. Default: all up to 256 members, the frontier beyond."""
    overwrite: bool = False
    """Replace a finished or interrupted run in the folder."""
    resume: bool = False
    """Go on with an interrupted run in the folder."""
    tensorboard: bool = False
    """Write curves for TensorBoard, too."""
    wandb: Annotated[str | None, _left_out("PROJECT")] = None
    """Send curves to a project of Weights & Biases, too."""
    profile: bool = False
    """Trace some seconds of training, for xprof or Perfetto."""
    live: bool = False
    """Show the run in a browser while it trains, by a page that this command serves."""
    live_port: MaybeCount = None
    """Where the page is served, 0 for any port that is free. Default: 8765."""
    live_host: Annotated[str | None, _left_out("ADDRESS")] = None
    """An address of this machine at which others reach the page: whoever reaches it sees the run. Default:
    127.0.0.1, this machine alone."""
    quiet: bool = False
    """No progress, no table."""
    as_json: Annotated[bool, tyro.conf.arg(name="json", help="print the result as JSON on stdout")] = False
