"""Data modules in anomalib's form. Importing this package makes them known to anomalib by their names."""

import anomalib.data as anomalib_data

from kd_multiresolution.data.bmad_without_masks import BMADWithoutMasks
from kd_multiresolution.data.brain_mri import BrainMRI
from kd_multiresolution.data.head_ct import HeadCT
from kd_multiresolution.data.one_class_folder import OneClassFolder
from kd_multiresolution.data.retinal_oct import RetinalOCT
from kd_multiresolution.data.texture_defects import TextureDefects
from kd_multiresolution.data.torchvision_sets import OneClassCIFAR10, OneClassFashionMNIST, OneClassMNIST

__all__ = [
    "BMADWithoutMasks",
    "BrainMRI",
    "HeadCT",
    "OneClassCIFAR10",
    "OneClassFashionMNIST",
    "OneClassFolder",
    "OneClassMNIST",
    "RetinalOCT",
    "TextureDefects",
]

# anomalib's command line finds an imported class by its name. ``get_datamodule``, and with it ``anomalib benchmark``,
# looks for an attribute of ``anomalib.data``.
for _name in __all__:
    setattr(anomalib_data, _name, globals()[_name])
