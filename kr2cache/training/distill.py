"""Knowledge distillation: what a fine-tuned teacher says of the training split, and the loss that learns from it.

KR2, section on distillation: ``L = L_hard + 0.5 L_soft``, both at the level of tokens. ``L_soft`` is the cross entropy
between the teacher's and the student's distributions over labels, at the first subword of each word (tagging), or one
an example. The teacher never changes, so its logits are computed once and kept beside the resources' caches.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from kr2cache.cache.format import encode_ids, offsets
from kr2cache.errors import CacheError


@dataclass(frozen=True, kw_only=True)
class TeacherLogits:
    """A teacher's logits for the examples of a split."""

    ids: tuple[str, ...]
    """Of the examples."""
    logits: Sequence[NDArray[np.float32]]
    """One array an example, (words, labels) for tagging, else (1, labels or choices); nan where the teacher cut a word
    off."""

    def save(self, path: Path, fingerprint: str) -> None:
        """Write them so that a file of this name is complete whenever it is there.

        Raises:
            OSError: If it cannot be written; nothing is left of it then.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # students may be trained side by side
        try:
            with partial.open("wb") as file:
                np.savez(
                    file,
                    fingerprint=np.array(fingerprint),
                    id=encode_ids(self.ids),
                    first=offsets(np.array([len(one) for one in self.logits])),
                    logits=np.concatenate(self.logits),
                )
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> TeacherLogits:
        """What ``save`` wrote.

        Raises:
            CacheError: If it cannot be read, or was made from something else.
        """
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                made_from = str(file["fingerprint"])
                ids = tuple(name.decode("utf-8") for name in file["id"].tolist())
                first, logits = file["first"], file["logits"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise CacheError(f"{path} cannot be read: {error}.", "Remove it; it is made again.") from error
        if made_from != fingerprint:
            raise CacheError(f"{path} was made from another teacher or other data.", "Remove it; it is made again.")
        parts = [logits[start:stop] for start, stop in zip(first[:-1].tolist(), first[1:].tolist(), strict=True)]
        return cls(ids=ids, logits=parts)


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """L_soft: mean over positions of ``-sum_k p_k log q_k``, p the teacher's and q the student's distribution.

    Both are softened by the temperature t; the loss is scaled by t^2, so that its gradient keeps its size (Hinton et
    al. 2015, arXiv:1503.02531, section 2). Where student and teacher agree it is the teacher's entropy.

    Args:
        student: Logits, (..., K).
        teacher: Logits, (..., K); positions that hold nan are left out.

    Returns:
        float32 scalar, 0 where no position is left.
    """
    there = torch.isfinite(teacher).all(dim=-1)
    p = functional.softmax(teacher[there].float() / temperature, dim=-1)
    log_q = functional.log_softmax(student[there].float() / temperature, dim=-1)
    return -(p * log_q).sum() / max(1, len(p)) * temperature**2
