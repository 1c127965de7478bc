"""What is compared: all that decides the figures of one training."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Trial:
    """One training and test of one model.

    Attributes:
        model: a key of :data:`comparison.candidates.CANDIDATES`.
        category: of MVTec AD.
        seed: of weights, order of images, random features, and the choice of images where they are limited.
        image_size: pixels per side.
        train_limit: how many of the normal images train; ``None``: all.
        epochs: ``None``: the model's own rule.
        batch_size: images per training step.
        backbone: of all models; timm's name.
        layers: feature levels of the backbone.
        coreset_ratio: of PatchCore's memory bank.
        weights_sha256: of the backbone's weight file; ``None`` for timm's own of that name.
        curve: test every so many epochs on the way; ``None``: at the end alone.
        threads: of the CPU.
        imagenette: EfficientAD's folder of other images; ``None`` for the other models.
    """

    model: str
    category: str
    seed: int
    image_size: int
    train_limit: int | None
    epochs: int | None
    batch_size: int
    backbone: str
    layers: tuple[str, ...]
    coreset_ratio: float
    weights_sha256: str | None
    curve: int | None
    threads: int
    imagenette: str | None

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @property
    def repeated(self) -> Trial:
        """The same trial but for its seed."""
        return replace(self, seed=0)

    @property
    def name(self) -> str:
        """A short name for people."""
        images = "all" if self.train_limit is None else self.train_limit
        return f"{self.category}-{images}-{self.model}-seed{self.seed}"

    @property
    def stem(self) -> str:
        """The name, and a digest of everything: what the trial's files are called."""
        text = json.dumps(self.as_json(), sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
