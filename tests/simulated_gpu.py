"""A GPU for tests, simulated: tensors that lie on a device of their own, and whose numbers the CPU computes.

An operator on tensors of it and of the host is refused, as on a GPU, and it is counted where a host would wait for it.

A script, which ``test_gpu.py`` starts: ``simulated_gpu.py FOLDER MODEL...`` trains and tests each model on the pictures
below the folder, on the CPU and on this device. It prints what both predict, the waits of each epoch, and those of its
steps, as JSON. It is a process of its own: torch has to know of a device before anything else is done with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import tests.small_vgg  # noqa: F401 - a model of timm's from here on
from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.training import optimizer

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}  # between devices
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}  # by a host's indices, too
READING = {  # the host needs a number, or the size of the result
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip

EPOCHS = 4
MODELS: dict[str, Callable[..., Any]] = {
    "gradient": KdMultiresolution,
    "discrepancy": lambda *args, **kwargs: KdMultiresolution(
        *args, anomaly_map="discrepancy", value_weight="auto", scale_channels=True, **kwargs
    ),
    "smooth_grad": lambda *args, **kwargs: KdMultiresolution(
        *args, anomaly_map="smooth_grad", smooth_grad_samples=2, cache=None, **kwargs
    ),
    "dual": KdMultiresolutionDual,
    "dual_in_a_file": lambda *args, **kwargs: KdMultiresolutionDual(*args, cache_memory=0, **kwargs),
}

waits = 0


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


backend_registration._setup_privateuseone_for_python_backend("simulated", backend_module=_Module())
GPU = torch.device("simulated:0")


class OnGpu(Tensor):
    """A tensor on the simulated device; its numbers are those of ``host``, a tensor on the CPU."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor, requires_grad: bool = False) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), dtype=host.dtype, device=GPU, requires_grad=requires_grad
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})

    def as_subclass(self, cls: Any) -> Any:
        return self  # of two subclasses it can be one only: anomalib's images are plain tensors here

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            msg = "can't convert a tensor of the simulated device to numpy"
            raise TypeError(msg)
        return self.cpu().numpy()

    def __array__(self, *args: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.host.detach().__reduce_ex__(protocol)  # as if read back to the host

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied: Any = OnGpu(self.host.clone(), self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)


class Simulated(TorchDispatchMode):
    """Lets tensors be made on the simulated device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})


def computed(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what an operator does, computed on the CPU, on the device where it belongs."""
    global waits
    if torch.is_inference_mode_enabled():  # where torch hands on what is composed of other operators
        with Simulated():
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    indices = tree_leaves(args[1]) if function in INDEXING else []
    theirs = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.ndim]
    if ours and function not in COPIES and any(all(tensor is not index for index in indices) for tensor in theirs):
        msg = f"{function}: expected all tensors to be on one device, not {[tensor.device for tensor in tensors]}"
        raise RuntimeError(msg)
    device = kwargs.get("device")
    stays = bool(ours) if device is None else torch.device(device) == GPU
    generator = kwargs.get("generator")
    if stays and generator is not None:
        msg = f"{function}: expected a generator of the simulated device, not {generator.device}"
        raise RuntimeError(msg)
    by_mask = any(index.dtype == torch.bool for index in indices if index is not None)
    is_copy_to_host = function is aten._to_copy.default and not stays
    if function is aten.copy_.default:
        is_copy_to_host = not isinstance(args[0], OnGpu)
    at_once = kwargs.get("non_blocking") or (function is aten.copy_.default and args[2:3] == (True,))
    waits += bool(ours) and (function in READING or by_mask or (is_copy_to_host and not at_once))
    on_host = {id(tensor.host): tensor for tensor in ours}
    result = function(*tree_map(_on_host, args), **tree_map(_on_host, kwargs))
    if function is aten.copy_.default:
        return args[0]

    def placed(part: Any) -> Any:
        if not stays or not isinstance(part, Tensor):
            return part
        if id(part) in on_host:  # changed in place
            return on_host[id(part)]
        # A view of an ordinary tensor is one, in inference mode, too.
        is_view = function.is_view and not any(tensor.is_inference() for tensor in ours)
        with torch.inference_mode(False) if is_view else nullcontext():
            return OnGpu(part)

    return tree_map(placed, result)


def _on_host(part: Any) -> Any:
    if isinstance(part, OnGpu):
        return part.host
    return torch.device("cpu") if isinstance(part, torch.device) else part


# What torch does on a device without asking a mode.
_kernels = torch.library.Library("aten", "IMPL")
_every_other = torch.library.Library("_", "IMPL")
_kernels.impl("empty.memory_format", lambda *a, **k: computed(aten.empty.memory_format, a, k), "PrivateUse1")
_kernels.impl("empty_strided", lambda *a, **k: computed(aten.empty_strided.default, a, k), "PrivateUse1")
_kernels.impl(
    "_copy_from", lambda a, b, at_once=False: computed(aten.copy_.default, (b, a, at_once), {}), "PrivateUse1"
)
_every_other.fallback(lambda function, *a, **k: computed(function, a, k), "PrivateUse1")


class SimulatedGpu(Accelerator):
    """Lightning's view of the device."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [GPU]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "simulated"


class Waits(Callback):
    """Counts the waits of each epoch but the last, with all that follows it, and of the steps after the first epoch."""

    def __init__(self) -> None:
        self.of_epochs: list[int] = []
        self.of_steps: list[int] = []
        self._epoch = self._step = 0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        assert next(pl_module.parameters()).device == trainer.strategy.root_device
        if trainer.current_epoch:
            self.of_epochs.append(waits - self._epoch)
        self._epoch = waits

    def on_train_batch_start(self, *_: Any) -> None:
        self._step = waits

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch:
            self.of_steps.append(waits - self._step)


def run(root: Path, name: str, *, simulated: bool) -> tuple[dict[str, list[float]], Waits]:
    """Train, test and predict; return metrics and what is predicted, and the waits of the training."""
    model = MODELS[name]("small_vgg", image_size=32, epochs=EPOCHS)
    data = Folder(
        "parts", root=root, normal_dir="good", abnormal_dir="bad", num_workers=0, train_batch_size=8,
        val_split_mode="same_as_test",
    )  # fmt: skip
    torch.manual_seed(0)  # anomalib's split of the images depends on it
    counted = Waits()
    where: dict[str, Any] = {"accelerator": "cpu"}
    if simulated:
        where = {"strategy": SingleDeviceStrategy(GPU, accelerator=SimulatedGpu())}
    engine = Engine(
        default_root_dir=root / f"{name}-{simulated}", callbacks=[counted], logger=False, enable_progress_bar=False,
        enable_model_summary=False, **where,
    )  # fmt: skip
    with Simulated() if simulated else nullcontext():
        engine.fit(model, datamodule=data)
        (metrics,) = engine.test(model, datamodule=data, verbose=False)
        batches = engine.predict(model, datamodule=data) or []
        scores = [score for batch in batches for score in batch.pred_score.tolist()]
        maps = [number for batch in batches for number in batch.anomaly_map.flatten().tolist()]
    return {"metrics": [*metrics.values()], "scores": scores, "maps": maps}, counted


def main(root: Path, names: list[str]) -> None:
    optimizer.FUSED = ()  # its kernels are a device's own, and round in another way
    torch.set_num_threads(1)
    found = {}
    for name in names:
        on_cpu, _ = run(root, name, simulated=False)
        on_gpu, waited = run(root, name, simulated=True)
        found[name] = {"cpu": on_cpu, "gpu": on_gpu, "epochs": waited.of_epochs, "steps": waited.of_steps}
    sys.stdout.write("\n" + json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
