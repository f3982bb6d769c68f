"""Run in a process of its own: train the small model in a directory, slowly if asked; argv: directory kind seconds."""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from fake import FakeModel

from postformer.objective import Batch, NextToken
from postformer.training import TrainConfig, Trainer, TrainingError

torch.set_num_threads(1)
directory, kind, pause = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])


def batch_at(step):
    time.sleep(pause)
    generator = torch.Generator().manual_seed(step)
    return Batch.windows(torch.randint(1, 4, (4, 13), generator=generator).cumsum(1) % 256)


config = TrainConfig(
    steps=30, batch_size=4, length=12, accumulate=2, optimiser={"kind": kind, "learning_rate": 0.01}, checkpoint_every=4
)
directory.mkdir(exist_ok=True)
trainer = Trainer(FakeModel(), NextToken(), batch_at, config, directory=directory, bytes_per_token=1, progress="quiet")
trainer.restore()
try:
    trainer.train()
except TrainingError as error:
    print(error)
    sys.exit(error.exit_code)
