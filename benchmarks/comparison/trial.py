"""What is compared: all that decides the figures of one training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from reporting import Record


@dataclass(frozen=True)
class Trial(Record):
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

    @property
    def repeated(self) -> Trial:
        """The same trial but for its seed."""
        return replace(self, seed=0)

    @property
    def name(self) -> str:
        """A short name for people."""
        images = "all" if self.train_limit is None else self.train_limit
        return f"{self.category}-{images}-{self.model}-seed{self.seed}"
