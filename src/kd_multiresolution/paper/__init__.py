"""The method of Salehi et al., CVPR 2021 (arXiv 2011.11108), to be read beside the paper, in its order.

``cloner`` (Fig. 2), ``discrepancy`` (Eqs. 1, 3, 4) and its ``value_weight``, ``attribution`` (Eq. 5) and its
``backward`` pass as operators, ``anomaly_map`` (Eq. 6); ``torch_model`` joins them,
``lightning_model`` trains them. ``channel_scale`` is for other sources than the paper's.
"""
