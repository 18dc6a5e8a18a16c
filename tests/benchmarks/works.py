"""What every contender trains, and what the figures are to show.

A work is trained on batches that all contenders read from the same file, gone through in a ring. There are
few of them: of rows without structure an SAE learns nothing that helps with others, and losses are to fall.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

LOOP = "PyTorch loop"
STACKED = "PyTorch stacked by hand"
VMAP = "torch.vmap"
DICTIONARY = "dictionary_learning"
SAELENS = "SAELens"
SAELENS_MANY = "SAELens MultiSAETrainer"
SPARSIFY = "sparsify"
SWEEP = "sae_jax.sweep"

PACKAGES = {
    LOOP: "torch",
    STACKED: "torch",
    VMAP: "torch",
    DICTIONARY: "dictionary_learning",
    SAELENS: "sae_lens",
    SAELENS_MANY: "sae_lens",
    SPARSIFY: "sparsify",
    SWEEP: "sae_jax",
}
"""What each contender imports."""


class Work(NamedTuple):
    """One training, the same for all contenders."""

    name: str
    """Of its group, as `--works` takes it."""
    architecture: str
    """A factory of sae_jax: `relu`, `topk`, `batch_topk`."""
    d_in: int
    d_sae: int
    batch: int
    """Rows per step."""
    steps: int
    members: int
    contenders: tuple[str, ...]
    batches: int = 2
    """Distinct ones in memory; the next is taken from among their rows, so one alone would spare that."""
    k: int = 0
    l1: float = 0.1
    """Against means over all elements, as the seed has it."""
    lr: float = 1e-3
    points: int = 10
    """Of the history that a sweep keeps."""
    rows: str = "normal"
    """`normal` of unit variance, the `seed`'s eight tokens, or `synthsaebench_16k`."""
    bfloat16: bool = False
    """Matrix products round to it."""
    gpu: bool = False

    @staticmethod
    def of(values: Mapping[str, Any]) -> "Work":
        """The work that these plain values, `_asdict()` as JSON keeps it, stand for."""
        return Work(**{**values, "contenders": tuple(values["contenders"])})

    @property
    def flops(self) -> float:
        """Of the dense matrix products of one step of all members: 10 B d F each."""
        return 10.0 * self.batch * self.d_in * self.d_sae * self.members

    @property
    def parameters(self) -> int:
        """Learned numbers of one member: two matrices and two biases."""
        return 2 * self.d_in * self.d_sae + self.d_sae + self.d_in

    @property
    def arithmetic(self) -> str:
        """What a share of the peak refers to: TensorFloat-32 is what a GPU takes of float32 by default."""
        on_gpu = "bfloat16 on the GPU" if self.bfloat16 else "TensorFloat-32 on the GPU"
        return on_gpu if self.gpu else "float32 on the CPU"

    def __str__(self) -> str:
        kinds = {"relu": "ReLU", "topk": f"TopK {self.k}", "batch_topk": f"BatchTopK {self.k}"}
        many = f"{self.members:,} member{'s' * (self.members > 1)}"
        shape = f"{self.d_in} -> {self.d_sae}, batch {self.batch}, {self.steps} steps, {many}"
        return f"{kinds[self.architecture]} {shape}{', bfloat16' * self.bfloat16}"


BY_HAND = (LOOP, STACKED, VMAP)
ONE = (*BY_HAND, DICTIONARY, SAELENS, SWEEP)
MANY = (*BY_HAND, DICTIONARY, SAELENS, SAELENS_MANY, SWEEP)
TOPK = (DICTIONARY, SAELENS, SPARSIFY, SWEEP)
BATCH_TOPK = (DICTIONARY, SAELENS, SWEEP)
MEMBERS = (1, 4, 16, 64, 256, 1024)


def _seed(name: str, contenders: tuple[str, ...], sizes: tuple[int, ...]) -> tuple[Work, ...]:
    more = {"lr": 1e-2, "points": 100, "rows": "seed"}
    return tuple(Work(name, "relu", 4, 6, 8, 500, size, contenders, batches=1, **more) for size in sizes)


def _relu(name: str, d_in: int, d_sae: int, batch: int, steps: int, members: int) -> tuple[Work, ...]:
    whole = Work(name, "relu", d_in, d_sae, batch, steps, members, MANY)
    return whole, whole._replace(members=1, contenders=ONE)


WORKS = {
    "seed": _seed("seed", (*BY_HAND, SWEEP), (1, 64, 1024)),
    "small": _relu("small", 64, 256, 256, 200, 8),
    "mid": _relu("mid", 512, 2048, 1024, 20, 4),
    "big": _relu("big", 512, 4096, 4096, 5, 2),
    "topk": (Work("topk", "topk", 512, 4096, 1024, 20, 1, TOPK, k=32),),
    "topk16k": (Work("topk16k", "topk", 512, 16_384, 1024, 20, 1, TOPK, k=32),),
    "batch_topk16k": (Work("batch_topk16k", "batch_topk", 512, 16_384, 1024, 20, 1, BATCH_TOPK, k=32),),
    "members": (
        *_seed("members", (SWEEP,), MEMBERS),
        *(Work("members", "relu", 64, 256, 256, 50, size, (SWEEP,)) for size in MEMBERS),
    ),
    "gpu": (
        Work("gpu", "relu", 2304, 65_536, 8192, 20, 1, ONE[1:], bfloat16=True, gpu=True),
        Work("gpu", "topk", 2304, 65_536, 8192, 20, 1, TOPK, k=64, bfloat16=True, gpu=True),
        Work(
            "gpu", "batch_topk", 768, 4096, 1024, 200, 5, (DICTIONARY, SAELENS, SAELENS_MANY, SWEEP), 20,
            k=25, lr=3e-4, rows="synthsaebench_16k", gpu=True,
        ),
    ),
}  # fmt: skip
"""By the name of their group; within one the largest counts."""


class Goal(NamedTuple):
    """What a figure is to reach."""

    work: str
    members: int
    against: str
    """A contender, whose library's best it stands for; or one of the two below."""
    least: float
    """So many times as fast as it, or that share of the machine's peak."""


FASTEST = "the fastest peer"
PEAK = "the peak of matrix products"
GOALS = (
    Goal("seed", 1024, LOOP, 500),
    Goal("seed", 1024, STACKED, 2),
    Goal("small", 8, DICTIONARY, 8),
    Goal("small", 8, SAELENS, 60),
    Goal("small", 8, STACKED, 3.5),
    Goal("mid", 4, FASTEST, 2.5),
    Goal("mid", 4, PEAK, 0.8),
    Goal("big", 2, FASTEST, 2.5),
    Goal("big", 2, PEAK, 0.85),
    Goal("topk", 1, DICTIONARY, 4),
    Goal("topk16k", 1, DICTIONARY, 8),
    Goal("batch_topk16k", 1, DICTIONARY, 8),
    *(Goal(name, 1, FASTEST, 1) for name in WORKS if name not in ("members", "gpu")),
)
MOST_RISE = 1.05
"""Of the cost of a member from one size of the group `members` to the next."""
