"""Knowledge distillation: the logits of a fine-tuned teacher for the training split, and the loss that uses them.

KR2, section on distillation: ``L = L_hard + 0.5 L_soft``, both at the level of tokens. ``L_soft`` is the cross entropy
between the teacher's and the student's distributions over labels: for tagging at the first subword of each word, else
once per example. Where each label is right or not by itself (multilabel), it is the binary cross entropy; for
regression the squared difference of both values. The teacher never changes, so its logits are computed once and stored
beside the caches.
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
from kr2cache.training.kreader import PROBLEM_TYPES


@dataclass(frozen=True, kw_only=True)
class TeacherLogits:
    """A teacher's logits for the examples of a split."""

    ids: tuple[str, ...]
    """Ids of the examples."""
    logits: Sequence[NDArray[np.float32]]
    """One array per example: (words, labels) for tagging, else (1, labels or choices). A word that the teacher cut off
    has nan."""

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the file. Under this name the file is always complete.

        Args:
            fingerprint: Hash of the teacher and the examples; ``load`` compares it.

        Raises:
            OSError: If the file cannot be written. No partial file stays behind.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(
            f"{path.name}.{os.getpid()}.partial"
        )  # several students may be trained at the same time
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
        """Read a file that ``save`` wrote.

        Raises:
            CacheError: If the file cannot be read, or its fingerprint is different.
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


def soft_loss(student: Tensor, teacher: Tensor, temperature: float, problem_type: str | None = None) -> Tensor:
    """L_soft: mean over positions of ``-sum_k p_k log q_k``, where p is the teacher's distribution and q the student's.

    The temperature t softens both. The loss is scaled by t^2, so that the size of its gradient does not depend on t
    (Hinton et al. 2015, arXiv:1503.02531, section 2). If student and teacher agree, the loss is the teacher's entropy.

    Multilabel: the same with a distribution over yes and no for each label, and a mean over labels too. Regression:
    mean of ``(teacher - student)^2``, the loss by which Ba and Caruana (2014, arXiv:1312.6184) let a student learn a
    teacher's logits. A value is no distribution, so nothing is softened.

    Args:
        student: Logits, (..., K).
        teacher: Logits, (..., K); positions with nan are ignored.
        problem_type: ``KReader.problem_type``.

    Returns:
        float32 scalar; 0 if all positions are ignored.
    """
    there = torch.isfinite(teacher).all(dim=-1)
    said, learned = teacher[there].float(), student[there].float()
    if problem_type == PROBLEM_TYPES["regression"]:
        return (said - learned).square().sum() / max(1, said.numel())
    said, learned = said / temperature, learned / temperature
    if problem_type == PROBLEM_TYPES["multilabel"]:
        total = functional.binary_cross_entropy_with_logits(learned, said.sigmoid(), reduction="sum")
        return total / max(1, said.numel()) * temperature**2
    p, log_q = functional.softmax(said, dim=-1), functional.log_softmax(learned, dim=-1)
    return -(p * log_q).sum() / max(1, len(p)) * temperature**2
