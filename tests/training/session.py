"""Run in a process of its own: train a small language model in a directory; argv: directory, optimiser, seconds that
each batch takes."""

import sys
import time
import warnings

import torch
import torch._dynamo  # the first optimiser imports it, in a second

# Importing registers the kinds also where the package is used from its source tree.
import postformer.block.feedforward
import postformer.memory.matrix  # noqa: F401
from postformer import design
from postformer.model import build
from postformer.objective import Batch, NextToken
from postformer.training import TrainConfig, Trainer, TrainingError

MEMORY = {
    "kind": "matrix", "loss": "l2", "retention": {"per": "head", "gate": "mamba"},
    "update": {"kind": "gradient", "rate": "sigmoid"}, "heads": {"value": 2, "dim_key": 8, "dim_value": 8},
    "features": "l2norm", "local": "conv4", "read": "gated-norm",
}


def main(directory, kind, pause):
    warnings.simplefilter("error")
    torch.set_num_threads(1)

    def batch_at(step):
        time.sleep(pause)
        generator = torch.Generator().manual_seed(step)
        return Batch.windows(torch.randint(1, 4, (4, 13), generator=generator).cumsum(1) % 256)

    recipe = design.load({"name": "small", "model": {
        "width": 16, "memory": MEMORY, "feedforward": {"kind": "swiglu"}, "num_layers": 1}})
    config = TrainConfig(steps=30, batch_size=4, length=12, accumulate=2, checkpoint_every=4,
                         optimiser={"kind": kind, "learning_rate": 0.01})
    directory.mkdir(exist_ok=True)
    trainer = Trainer(build(recipe.model, seed=0), NextToken(), batch_at, config, directory=directory,
                      bytes_per_token=1, progress="quiet")
    trainer.restore()
    try:
        trainer.train()
    except TrainingError as error:
        (directory / "message").write_text(str(error))
        sys.exit(error.exit_code)
