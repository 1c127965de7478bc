"""What is compared: all that decides the figures of one training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from reporting import Record


@dataclass(frozen=True)
class Trial(Record):
    """One training and test of one model."""

    model: str  # a key of comparison.candidates.CANDIDATES
    category: str  # of MVTec AD
    seed: int  # of weights, order of images, random features, and the choice of images where they are limited
    image_size: int  # pixels per side
    train_limit: int | None  # how many of the normal images train; `None`: all
    epochs: int | None  # `None`: the model's own rule
    batch_size: int  # images per training step
    backbone: str  # of all models but those that have their own; timm's name
    layers: tuple[str, ...]  # feature levels of the backbone
    coreset_ratio: float  # of PatchCore's memory bank
    weights_sha256: str | None  # of the backbone's weight file; `None` for timm's own of that name
    curve: int | None  # test every so many epochs on the way; `None`: at the end alone
    threads: int  # of the CPU
    imagenette: str | None  # EfficientAD's folder of other images; `None` for the other models

    @property
    def repeated(self) -> Trial:
        """The same trial but for its seed."""
        return replace(self, seed=0)

    @property
    def name(self) -> str:
        """A short name for people."""
        images = "all" if self.train_limit is None else self.train_limit
        return f"{self.category}-{images}-{self.model}-seed{self.seed}"
