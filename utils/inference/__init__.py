"""Predictions for image files that belong to no split.

Images are read by the code that fills the prediction store, so predictions equal those of `evaluate`. A block of images
(at most 2 GB of pixels and 256 MB of logits) is decoded into a temporary folder, each network passes over it once,
and its records are written before the next block. An image for which a network gives no finite output costs that image
alone. A `Classifier` is anything with `classes`, `version`, `block_size`, `n_networks` and `predict_block`: networks of
a workspace or, with `--from-export`, an ONNX file, which needs neither configuration, workspace nor base pipeline.
"""
