"""Predictions for image files that belong to no split.

Images are read by the code that fills the prediction store, so predictions equal those of `evaluate`. A block of images
(at most 2 GB of pixels and 256 MB of logits) is decoded into a temporary folder, each network runs on it once, and its
records are written before the next block. A network output that is not finite affects only its image. A `Classifier`
has `classes`, `version`, `block_size`, `n_networks` and `predict_block`: the networks of a workspace or, with
`--from-export`, an ONNX file, which needs neither configuration, workspace nor base pipeline.
"""
