"""The contenders: each is `(work, x) -> build`, where `build(seeds) -> fit` makes the call that is timed.

`x` holds the batches, [batches, batch, d_in]. Where a library's own call builds its models (`trainSAE`,
`sweep`), that is within `fit`; elsewhere models and optimizers are there before it. Libraries are imported
inside, because a process holds one contender.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from works import (
    DICTIONARY,
    LOOP,
    SAELENS,
    SAELENS_MANY,
    SPARSIFY,
    STACKED,
    SWEEP,
    VMAP,
    Work,
)


class Outcome(NamedTuple):
    """What a training tells, to see that it was one."""

    first: list[float]
    """Loss per member, the earliest that is known."""
    last: list[float]
    """That of the last step, before its update."""
    parameters: int
    """Of one member."""
    steps: int
    seconds_per_step: float | None = None
    """Of all members, without what a call does before its first step ends and after its last; None where the
    contender does not tell."""


Fit = Callable[[], Outcome]
Build = Callable[..., Fit]
"""`(seeds) -> fit`; those by hand also take `weights` to start from, one state dict of the seed's module per
member."""
Weights = list[dict[str, np.ndarray]]


# By hand in PyTorch


def torch_loop(work: Work, x: np.ndarray) -> Build:
    """The seed's way, as a post would write it: a module per member, a Python loop over steps."""
    import torch
    from torch import nn

    batches = _batches(work, x)

    def train_one(model: nn.Module) -> list[torch.Tensor]:
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=work.lr), []
        for batch in itertools.islice(itertools.cycle(batches), work.steps):
            optimizer.zero_grad()
            x_hat, f = model(batch)
            loss = nn.functional.mse_loss(x_hat, batch) + work.l1 * f.abs().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    def build(seeds: range, weights: Weights | None = None) -> Fit:
        models = _modules(work, seeds, weights)
        return lambda: _told_each([train_one(model) for model in models], models[0])

    return build


def torch_stacked(work: Work, x: np.ndarray) -> Build:
    """What a careful PyTorch user can do by hand: every parameter [members, ...], one fused Adam."""
    import torch

    batches = _batches(work, x)

    def build(seeds: range, weights: Weights | None = None) -> Fit:
        models = _modules(work, seeds, weights)
        # the module's weights are [out, in], those here [in, out]; a bias becomes [members, 1, out]
        stacked = [torch.stack(same).detach() for same in zip(*map(_leaves, models), strict=True)]
        leaves = [leaf[:, None] if leaf.ndim == 2 else leaf.mT for leaf in stacked]
        W_enc, b_enc, W_dec, b_dec = params = [leaf.contiguous().requires_grad_() for leaf in leaves]
        optimizer = torch.optim.Adam(params, lr=work.lr, fused=True)

        def losses_of(batch: torch.Tensor) -> torch.Tensor:
            rows = batch.expand(len(seeds), -1, -1)
            f = torch.baddbmm(b_enc, rows, W_enc).relu()
            x_hat = torch.baddbmm(b_dec, f, W_dec)
            return (x_hat - rows).square().mean(dim=(1, 2)) + work.l1 * f.abs().mean(dim=(1, 2))

        def fit() -> Outcome:
            history = []
            for batch in itertools.islice(itertools.cycle(batches), work.steps):
                optimizer.zero_grad()
                with _rounded(work):
                    losses = losses_of(batch)
                # summed, not averaged: each member gets the gradient that it would have alone
                losses.sum().backward()
                optimizer.step()
                history.append(losses.detach())
            return _told(history, models[0])

        return fit

    return build


def torch_vmap(work: Work, x: np.ndarray) -> Build:
    """PyTorch's own ensembles: `functional_call` under `vmap` and `grad`, one fused Adam."""
    import torch
    from torch.func import functional_call, grad_and_value, stack_module_state, vmap

    batches = _batches(work, x)

    def build(seeds: range, weights: Weights | None = None) -> Fit:
        models = _modules(work, seeds, weights)
        # detached: `grad_and_value` would otherwise be recorded for a second derivative
        params = {name: leaf.detach() for name, leaf in stack_module_state(models)[0].items()}
        optimizer = torch.optim.Adam(params.values(), lr=work.lr, fused=True)

        def loss_of(one: dict[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
            x_hat, f = functional_call(models[0], one, (batch,))
            return torch.nn.functional.mse_loss(x_hat, batch) + work.l1 * f.abs().mean()

        gradients = vmap(grad_and_value(loss_of), in_dims=(0, None))

        def fit() -> Outcome:
            history = []
            for batch in itertools.islice(itertools.cycle(batches), work.steps):
                with _rounded(work):
                    grads, losses = gradients(params, batch)
                for name, leaf in params.items():
                    leaf.grad = grads[name]
                optimizer.step()
                history.append(losses.detach())
            return _told(history, models[0])

        return fit

    return build


def _leaves(model: Any) -> list[Any]:
    return list(model.parameters())


def _modules(work: Work, seeds: range, weights: Weights | None) -> list[Any]:
    """The seed's module per member, drawn as `nn.Linear` draws it, or with given weights."""
    import torch
    from torch import nn

    class SparseAutoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(work.d_in, work.d_sae), nn.ReLU())
            self.decoder = nn.Sequential(nn.Linear(work.d_sae, work.d_in))

        def forward(self, x):
            f = self.encoder(x)
            return self.decoder(f), f

    models = []
    for number, seed in enumerate(seeds):
        torch.manual_seed(seed)
        model = SparseAutoencoder()
        if weights is not None:
            model.load_state_dict({name: torch.tensor(leaf) for name, leaf in weights[number].items()})
        models.append(model.to(_device(work)))
    return models


# Libraries


def dictionary_learning(work: Work, x: np.ndarray) -> Build:
    """`trainSAE` with a trainer per member; it builds them itself."""
    import torch

    # its files import it for their buffers; it is large, and brings a torchvision that may not fit this torch
    sys.modules.setdefault("nnsight", ModuleType("nnsight")).LanguageModel = object
    from dictionary_learning.trainers import BatchTopKTrainer, StandardTrainer, TopKTrainer
    from dictionary_learning.training import trainSAE

    batches = _batches(work, x)
    trainer = {"relu": StandardTrainer, "topk": TopKTrainer, "batch_topk": BatchTopKTrainer}
    sparsity = {"k": work.k} if work.k else {"l1_penalty": _summed_l1(work), "sparsity_warmup_steps": None}
    settings = {
        "steps": work.steps, "activation_dim": work.d_in, "dict_size": work.d_sae, "layer": 0, "lm_name": "",
        "lr": work.lr, "warmup_steps": 0, "device": _device(work), **sparsity,
    }  # fmt: skip

    def build(seeds: range) -> Fit:
        trainers, losses = [], [[] for _ in seeds]

        def made(**config: Any) -> Any:
            one = trainer[work.architecture](**config)
            one.loss = _noting(one.loss, losses[len(trainers)])
            trainers.append(one)
            return one

        def fit() -> Outcome:
            trainSAE(
                itertools.cycle(batches),
                [{**settings, "trainer": made, "seed": seed} for seed in seeds],
                work.steps,
                device=_device(work),
                autocast_dtype=torch.bfloat16 if work.bfloat16 else torch.float32,
            )
            return _told_each(losses, trainers[0].ae)

        return fit

    return build


def saelens(work: Work, x: np.ndarray) -> Build:
    """An `SAETrainer` per member, one after another."""
    from sae_lens import SAETrainer

    batches = _batches(work, x)

    def build(seeds: range) -> Fit:
        saes = [_saelens_sae(work, seed) for seed in seeds]
        config = _saelens_config(work)
        trainers = [SAETrainer(config, sae, itertools.cycle(batches)) for sae in saes]
        losses = [_watched(trainer) for trainer in trainers]

        def fit() -> Outcome:
            for trainer in trainers:
                trainer.fit()
            return _told_each(losses, saes[0])

        return fit

    return build


def saelens_many(work: Work, x: np.ndarray) -> Build:
    """SAELens's own trainer of many SAEs on one stream."""
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    batches = _batches(work, x)

    def stream() -> Iterator[dict[str, Any]]:
        return ({"site": batch} for batch in itertools.cycle(batches))

    def build(seeds: range) -> Fit:
        saes = {str(seed): _saelens_sae(work, seed) for seed in seeds}
        trainer = MultiSAETrainer(_saelens_config(work), saes, dict.fromkeys(saes, "site"), stream())
        losses = [_watched(one) for one in trainer.trainers.values()]

        def fit() -> Outcome:
            trainer.fit()
            return _told_each(losses, saes[str(seeds[0])])

        return fit

    return build


def _saelens_sae(work: Work, seed: int) -> Any:
    import torch
    from sae_lens.registry import get_sae_training_class

    name = {"relu": "standard", "topk": "topk", "batch_topk": "batchtopk"}[work.architecture]
    model, config = get_sae_training_class(name)
    # the work of the seed's model has no bias before its encoder, and so one matrix product less
    options = {"k": work.k} if work.k else {"l1_coefficient": _summed_l1(work), "apply_b_dec_to_input": False}
    torch.manual_seed(seed)
    return model(config(d_in=work.d_in, d_sae=work.d_sae, device=_device(work), **options))


def _saelens_config(work: Work) -> Any:
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    return SAETrainerConfig(
        total_training_samples=work.steps * work.batch,
        train_batch_size_samples=work.batch,
        lr=work.lr,
        # of no effect on a constant learning rate; without it there is no trainer
        lr_end=work.lr / 10,
        device=_device(work),
        autocast=work.bfloat16,
        logger=LoggingConfig(log_to_wandb=False),
    )


def _watched(trainer: Any) -> list[Any]:
    """The losses of an `SAETrainer`'s steps, as they come."""
    losses: list[Any] = []
    trainer.step = _noting(trainer.step, losses, lambda output: output.loss)
    return losses


def sparsify(work: Work, x: np.ndarray) -> Build:
    """Its `SparseCoder` in the steps of its trainer, which itself takes a language model and no activations.

    Adam in place of its own default, and its auxiliary loss on.
    """
    import torch
    from sparsify import SparseCoder, SparseCoderConfig

    batches = _batches(work, x)
    config = SparseCoderConfig(num_latents=work.d_sae, k=work.k)

    def train_one(coder: SparseCoder) -> list[torch.Tensor]:
        optimizer, losses = torch.optim.Adam(coder.parameters(), lr=work.lr, fused=True), []
        silent = torch.zeros(work.d_sae, dtype=torch.long, device=coder.device)
        coder.b_dec.data = batches[0].mean(0)
        for batch in itertools.islice(itertools.cycle(batches), work.steps):
            coder.set_decoder_norm_to_unit_norm()
            out = coder(batch, dead_mask=silent > 10_000_000)
            loss = out.fvu + out.auxk_loss / 32
            loss.backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
            silent += len(batch)
            silent[out.latent_indices.flatten()] = 0
            losses.append(loss.detach())
        return losses

    def build(seeds: range) -> Fit:
        coders = []
        for seed in seeds:
            torch.manual_seed(seed)
            coders.append(SparseCoder(work.d_in, config, _device(work), torch.float32))
        return lambda: _told_each([train_one(coder) for coder in coders], coders[0])

    return build


def jax_sweep(work: Work, x: np.ndarray) -> Build:
    """The public call of this package, as a user writes it: with its history and final metrics."""
    import sae_jax

    sparsity = {"k": work.k} if work.k else {}
    factory = partial(getattr(sae_jax, work.architecture), work.d_in, work.d_sae, **sparsity)
    source = sae_jax.in_memory(x.reshape(-1, work.d_in), work.batch)
    axes = {} if work.k else {"l1": [work.l1]}

    def build(seeds: range) -> Fit:
        table = sae_jax.grid(**axes, lr=[work.lr], seed=seeds)

        def fit() -> Outcome:
            seen: list[tuple[float, int]] = []
            result = sae_jax.sweep(
                factory,
                grid=table,
                source=source,
                steps=work.steps,
                precision="bfloat16" if work.bfloat16 else None,
                points=work.points,
                evaluate_rows=work.batch,
                look=lambda look: seen.append((time.perf_counter(), look.done)),
            )
            (began, start), (ended, stop) = seen[0], seen[-1]
            learned = sum(leaf.size for name, leaf in result.params.items() if name[:2] in ("W_", "b_"))
            losses = result.history["loss"]
            return Outcome(
                losses[0].tolist(),
                losses[-1].tolist(),
                learned // len(seeds),
                int(result.history["step"][-1]),
                (ended - began) / (stop - start) if stop > start else None,
            )

        return fit

    return build


CONTENDERS: dict[str, Callable[[Work, np.ndarray], Build]] = {
    LOOP: torch_loop,
    STACKED: torch_stacked,
    VMAP: torch_vmap,
    DICTIONARY: dictionary_learning,
    SAELENS: saelens,
    SAELENS_MANY: saelens_many,
    SPARSIFY: sparsify,
    SWEEP: jax_sweep,
}


# What those in PyTorch share


def _device(work: Work) -> str:
    return "cuda" if work.gpu else "cpu"


def _batches(work: Work, x: np.ndarray) -> list[Any]:
    """Where they are trained on; a GPU may round products as JAX has it do by default."""
    import torch

    torch.set_float32_matmul_precision("high" if work.gpu else "highest")
    return list(torch.tensor(x, device=_device(work)))


def _rounded(work: Work) -> Any:
    import torch

    return torch.autocast(_device(work), dtype=torch.bfloat16) if work.bfloat16 else nullcontext()


def _summed_l1(work: Work) -> float:
    """The penalty's weight where errors and features are summed over their elements, not averaged."""
    return work.l1 * work.d_in / work.d_sae


def _noting(call: Callable, losses: list[Any], loss_of: Callable[[Any], Any] = lambda loss: loss) -> Callable:
    """The same call, whose loss is kept each time."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        losses.append(loss_of(result).detach())
        return result

    return noted


def _told_each(losses: list[list[Any]], model: Any) -> Outcome:
    """Of each member's losses at every step."""
    import torch

    return _told(list(torch.stack([torch.stack(one) for one in losses]).T), model)


def _told(history: list[Any], model: Any) -> Outcome:
    """Of every step's losses, [members]; it waits for what a GPU still has to do."""
    import torch

    if history[0].is_cuda:
        torch.cuda.synchronize()
    parameters = sum(leaf.numel() for leaf in _leaves(model))
    return Outcome(history[0].tolist(), history[-1].tolist(), parameters, len(history))
