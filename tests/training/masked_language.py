"""A toy masked language model: two inputs, samples that are dicts or tuples of three, and the tasks that read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from graphprune.training import Task
from graphprune.training.task import inputs_and_target

__all__ = ["Masked", "dicts", "model", "task_of_dicts", "task_of_tuples", "tuples"]

WORDS, LENGTH = 13, 6
HIDDEN = 0
"""What stands in place of a word that is to be guessed."""


class Masked(nn.Module):
    """Guesses each word from the mean of the words that the mask lets through, and from its own place."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 16)
        self.up, self.norm = nn.Linear(16, 40), nn.BatchNorm1d(40)
        self.head = nn.Linear(40, WORDS)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Map [batch, length] and [batch, length] to [batch, length, words]."""
        shown = mask.unsqueeze(-1)
        x = self.table(ids)
        x = x + (x * shown).sum(1, keepdim=True) / shown.sum(1, keepdim=True)
        x = F.relu(self.norm(self.up(x).transpose(1, 2)).transpose(1, 2))
        logits: Tensor = self.head(x)
        return logits


def model() -> nn.Module:
    """Return the model: what MODEL names."""
    torch.manual_seed(0)
    return Masked().eval()


class _Sentences(Dataset[Any]):
    """A word again and again, one of which is hidden, and padding behind them."""

    def __init__(self, count: int, *, as_dicts: bool) -> None:
        self.count = count
        self.as_dicts = as_dicts

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        words = torch.full((LENGTH,), 1 + index % (WORDS - 1))
        mask = (torch.arange(LENGTH) < LENGTH - index % 2).float()
        ids = torch.where(torch.arange(LENGTH) == index % 4, HIDDEN, words)
        if self.as_dicts:
            return {"ids": ids, "mask": mask, "words": words}
        return ids, mask, words


def dicts() -> tuple[Dataset[Any], Dataset[Any]]:
    """Return training and test set of dicts: what ``--data`` names."""
    return _Sentences(96, as_dicts=True), _Sentences(24, as_dicts=True)


def tuples() -> tuple[Dataset[Any], Dataset[Any]]:
    """Return training and test set of tuples: what ``--data`` names."""
    return _Sentences(96, as_dicts=False), _Sentences(24, as_dicts=False)


def _task(unpack: Any, collate: Any = default_collate) -> Task:
    return Task(
        loss=lambda outputs, words: F.cross_entropy(outputs.flatten(0, 1), words.flatten()),
        metric=lambda outputs, words: (outputs.argmax(-1) == words).double().mean(),
        metric_name="right",
        unpack=unpack,
        collate=collate,
    )


def task_of_dicts() -> Task:
    """Return a task that unpacks dicts: what ``--task`` names."""
    return _task(lambda batch: ((batch["ids"], batch["mask"]), batch["words"]))


def task_of_tuples() -> Task:
    """Return a task that collates tuples of three: what ``--task`` names."""

    def collate(samples: list[Any]) -> Any:
        ids, mask, words = (torch.stack(parts) for parts in zip(*samples, strict=True))
        return (ids, mask), words

    return _task(inputs_and_target, collate)
