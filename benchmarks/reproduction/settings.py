"""All that decides a figure, and how a network is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from reporting import Record

Precision = Literal["32-true", "bf16-mixed"]


@dataclass(frozen=True)
class View:
    """One way to read a trained model: which map, and how it is made."""

    name: str  # prefix of its metrics
    anomaly_map: str | None = "gradient"  # the model's argument of that name; `None` for scores alone
    sigma: float = 4.0  # the map's Gaussian blur in pixels
    percentile_scale: bool = False  # scale each map by its own 99th percentile, as for the paper's pixel figures
    as_published: bool = False  # SmoothGrad as the published code has it

    def as_json(self) -> dict[str, Any]:
        """Return plain data; what older results lack is there if it was chosen."""
        return {name: value for name, value in asdict(self).items() if name != "as_published" or value}


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
    kind = ATTRIBUTIONS[name]
    as_published = kind == "smooth_grad"
    return View(method, kind, sigma=4.0 if plus else 0.0, percentile_scale=True, as_published=as_published)


# Fields that older results lack, and what they mean by it.
ADDED = {"score_points": None, "scale_channels": False, "precision": "32-true"}


@dataclass(frozen=True)
class Settings(Record):
    """All that decides the figures of one training."""

    dataset: str  # a key of :data:`reproduction.data.DATASETS`
    normal_class: str  # class or category; empty where the data set has one task only
    seed: int  # of the cloner's weights and the order of the images
    split: int | None  # of the held-out normal images, for the data sets without a split of their own
    augment: bool  # the paper's augmentation of HeadCT
    source: str  # name of the source
    pretrained: bool  # whether its weights are trained ones
    weights: str | None = field(compare=False)  # name of its file, or the published ones; the sum decides, not it
    weights_sha256: str  # of the source's tensors
    critical_points: tuple[str, ...]  # where source and cloner are compared
    cloner: str  # `compact` or `equal`
    terms: str  # `total`, `value` or `direction`
    value_weight: float | str  # factor of the value term, or `auto`
    image_size: tuple[int, int]  # height and width in pixels
    resize: tuple[int, int] | None  # size before the cut to `image_size`; `None`: no cut
    imagenet_normalization: bool  # whether images are normalised as the source was trained
    batch_size: int  # images per training step
    epochs: int | None  # upper limit of the training; `None`: the model's own
    evaluations: int  # how many late epochs are averaged
    interval: int  # epochs from one of them to the next
    limit: int | None  # training images, and test images of either kind; `None`: all
    views: tuple[View, ...]  # how the trained model is read
    model: Literal["paper", "dual"] = "paper"  # `dual` has no cloner, terms and value weight to choose
    score_points: tuple[str, ...] | None = None  # those that make up score and map; `None`: the model's own
    scale_channels: bool = False  # whether each channel of the source is brought to a mean square of one
    precision: Precision = "32-true"  # of training and, without gradients, of scores

    def as_json(self) -> dict[str, Any]:
        """Return plain data: the model has an older name, and what older results lack is there if it was chosen."""
        plain = super().as_json()
        plain["variant"] = plain.pop("model")
        plain["views"] = [view.as_json() for view in self.views]
        return {name: value for name, value in plain.items() if name not in ADDED or value != ADDED[name]}

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
