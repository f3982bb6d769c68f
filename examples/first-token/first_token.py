"""Your own task in 20 lines: name the first token, however much came after it. The entry point in pyproject.toml makes
it a task like any other:

pip install -e examples/first-token && postformer gauntlet transformer mamba2 --tasks first-token
"""

import torch

from postformer.task import IGNORE, Difficulties, Task, TaskBatch, TaskError


class FirstToken(Task):
    """tokens: 3 1 4 1 5, target at the last position: 3. A setting is the length."""

    name = "first-token"
    vocab = 16
    difficulties = Difficulties(train=(8, 16, 32), inside=(8, 32), outside=(64, 128))

    def describe(self):
        return "Name the first token of a random sequence at its end."

    def chance(self, setting):
        return 1 / self.vocab

    def check(self, setting):
        if not isinstance(setting, int) or setting < 2:
            raise TaskError(f"first-token: a setting is a length of at least 2, for instance 16; got {setting!r}")

    def generate(self, setting, batch_size, generator):
        tokens = torch.randint(self.vocab, (batch_size, setting), generator=generator, device=generator.device)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -1] = tokens[:, 0]
        return TaskBatch(tokens, targets)
