"""Train the light source ``light_vgg`` from nothing but formulas and write the weights that the wheel carries.

The network learns to tell procedural textures (see ``procedural_textures.py``) apart. Each of pool2 to pool5 has a
linear head of its own on its channel means, so that every critical point has to be informative by itself and not only
the last one. Batch norm helps training and is folded into the convolutions before saving.

    python benchmarks/train_light_source.py --output src/kd_multiresolution/source/weights/light_vgg.safetensors
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_multiresolution.source.light_vgg import WIDTHS, LightVGG
from procedural_textures import FAMILIES, ProceduralTextures, recipes

HELD_OUT_STREAM = 1
"""Added to the seed for the pictures that accuracy is measured on."""


class TextureClassifier(nn.Module):
    """The network to be trained and a linear head for each of pool2 to pool5.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = LightVGG(batch_norm=True)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, classes)) for *_, width in WIDTHS[1:]
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the logits of each head, pool2's first: 4 x (N, classes), from images (N, 3, H, W) in [0, 1]."""
        pooled = []
        for layer in self.network.features:
            images = layer(images)
            if isinstance(layer, nn.MaxPool2d):
                pooled.append(images.mean((2, 3)))
        return [head(means) for head, means in zip(self.heads, pooled[1:], strict=True)]


def stream(textures: ProceduralTextures, batch_size: int, num_workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches (N, 3, H, W) and (N,) without end."""
    yield from DataLoader(textures, batch_size=batch_size, num_workers=num_workers)


@torch.no_grad()
def accuracy(model: TextureClassifier, batches: Iterator[tuple[Tensor, Tensor]], count: int) -> list[float]:
    """Return each head's share of right answers, pool2's first, over ``count`` batches."""
    model.eval()
    right, total = torch.zeros(len(model.heads)), 0
    for _ in range(count):
        images, labels = next(batches)
        right += torch.stack([(logits.argmax(1) == labels).sum() for logits in model(images)])
        total += len(labels)
    return [round(share, 4) for share in (right / total).tolist()]


def train(
    output: Path,
    steps: int = 900,
    batch_size: int = 64,
    size: int = 64,
    per_family: int = 8,
    learning_rate: float = 3e-3,
    seed: int = 0,
    num_workers: int = 1,
    held_out_batches: int = 40,
) -> None:
    """Train, print the held-out accuracy, write the weights.

    Args:
        output: the ``.safetensors`` file to write.
        steps: number of batches to train on.
        batch_size: pictures per batch.
        size: edge of a picture in pixels.
        per_family: classes per texture family.
        learning_rate: the highest of the one-cycle schedule.
        seed: of the classes, the pictures and the initial weights.
        num_workers: processes that draw pictures; 0 draws them between the steps.
        held_out_batches: batches of unseen pictures that the accuracy is measured on.
    """
    console = Console()
    torch.manual_seed(seed)
    classes = recipes(per_family, seed)
    model = TextureClassifier(len(classes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    batches = stream(ProceduralTextures(classes, size, 2 * seed), batch_size, num_workers)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps)
        for step in range(steps):
            images, labels = next(batches)
            losses = torch.stack([F.cross_entropy(logits, labels) for logits in model(images)])
            optimizer.zero_grad()
            torch.autograd.backward(losses.sum())
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                progress.update(task, completed=step, description=f"loss {losses.mean().item():.3f}")
        progress.update(task, completed=steps)

    unseen = stream(ProceduralTextures(classes, size, 2 * seed + HELD_OUT_STREAM), batch_size, num_workers)
    shares = dict(zip(("pool2", "pool3", "pool4", "pool5"), accuracy(model, unseen, held_out_batches), strict=True))
    console.print(f"held-out accuracy over {len(classes)} classes: {shares}")
    how = {
        "script": "benchmarks/train_light_source.py",
        "families": len(FAMILIES),
        "classes": len(classes),
        "steps": steps,
        "batch_size": batch_size,
        "size": size,
        "learning_rate": learning_rate,
        "seed": seed,
        "accuracy": shares,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    metadata = {key: json.dumps(value) for key, value in how.items()}
    save_file(model.network.fused().state_dict(), output, metadata=metadata)
    console.print(f"wrote {output} ({output.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    auto_cli(train, as_positional=False)
