"""All that decides a figure, and how a network is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from reporting import Record


@dataclass(frozen=True)
class View:
    """One way to read a trained model: which map, and how it is made.

    Attributes:
        name: prefix of its metrics.
        anomaly_map: the model's argument of that name; ``None`` for scores alone.
        sigma: the map's Gaussian blur in pixels.
        percentile_scale: scale each map by its own 99th percentile, as for the paper's pixel figures.
    """

    name: str
    anomaly_map: str | None = "gradient"
    sigma: float = 4.0
    percentile_scale: bool = False

    def arguments(self) -> dict[str, Any]:
        """Return the model's arguments."""
        return {"anomaly_map": self.anomaly_map, "sigma": self.sigma, "percentile_scale": self.percentile_scale}


SCORES = View("scores", anomaly_map=None)
MAPS = View("maps")
PAPER_MAPS = View("paper_maps", percentile_scale=True)
ATTRIBUTIONS = {"Gradients": "gradient", "SmoothGrad": "smooth_grad", "GBP": "guided_backprop"}


def united(views: Iterable[View]) -> tuple[View, ...]:
    """Return each view once; as every view has the scores, :data:`SCORES` is left only where it is alone."""
    once = tuple(dict.fromkeys(views))
    return tuple(view for view in once if view != SCORES) or once


def attribution_view(method: str) -> View:
    """Return the view of a row of Table 11, such as ``SmoothGrad + Gaussian``."""
    name, plus, _ = method.partition(" + ")
    return View(method, ATTRIBUTIONS[name], sigma=4.0 if plus else 0.0, percentile_scale=True)


@dataclass(frozen=True)
class Settings(Record):
    """All that decides the figures of one training.

    Attributes:
        dataset: a key of :data:`reproduction.data.DATASETS`.
        normal_class: class or category; empty where the data set has one task only.
        seed: of the cloner's weights and the order of the images.
        split: of the held-out normal images, for the data sets without a split of their own.
        augment: the paper's augmentation of HeadCT.
        source: name of the source.
        pretrained: whether its weights are trained ones.
        weights: the weight file's name, or ``None`` for the published weights of that name.
        weights_sha256: of the source's tensors.
        critical_points: where source and cloner are compared.
        cloner: ``compact`` or ``equal``.
        terms: ``total``, ``value`` or ``direction``.
        value_weight: factor of the value term.
        image_size: height and width in pixels.
        resize: size before the cut to ``image_size``; ``None``: no cut.
        imagenet_normalization: whether images are normalised so.
        batch_size: images per training step.
        epochs: upper limit of the training; ``None``: the model's own.
        evaluations: how many late epochs are averaged.
        interval: epochs from one of them to the next.
        limit: training images, and test images of either kind; ``None``: all.
        views: how the trained model is read.
        model: ``paper``, or ``dual``, which has no cloner, terms and value weight to choose. Files call it ``variant``.
    """

    dataset: str
    normal_class: str
    seed: int
    split: int | None
    augment: bool
    source: str
    pretrained: bool
    weights: str | None = field(compare=False)  # the sum decides, not the name
    weights_sha256: str
    critical_points: tuple[str, ...]
    cloner: str
    terms: str
    value_weight: float
    image_size: tuple[int, int]
    resize: tuple[int, int] | None
    imagenet_normalization: bool
    batch_size: int
    epochs: int | None
    evaluations: int
    interval: int
    limit: int | None
    views: tuple[View, ...]
    model: Literal["paper", "dual"] = "paper"

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        plain = super().as_json()
        plain["variant"] = plain.pop("model")
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Settings:
        """Return what :meth:`as_json` was made from."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()
        }
        fields["model"] = fields.pop("variant", "paper")  # there was one model only
        fields["views"] = tuple(View(**view) for view in plain["views"])
        return cls(**fields)

    @property
    def training(self) -> Settings:
        """The same training, however it is read."""
        return replace(self, views=())

    @property
    def repeated(self) -> Settings:
        """The same training but for what is repeated: seeds, on which a random source depends, and splits."""
        digest = self.weights_sha256 if self.pretrained or self.weights else ""
        return replace(self, views=(), seed=0, split=None, weights_sha256=digest)

    @property
    def name(self) -> str:
        """A short name for people."""
        parts = [self.dataset, self.normal_class, f"seed{self.seed}"]
        parts += [self.model] if self.model != "paper" else []
        parts += [f"split{self.split}"] if self.split is not None else []
        parts += ["augmented"] if self.augment else []
        parts += [self.cloner] if self.cloner != "compact" else []
        parts += [self.terms] if self.terms != "total" else []
        return "-".join(part for part in parts if part)
