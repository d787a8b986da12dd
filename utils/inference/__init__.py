"""Predictions for image files that belong to no split.

Images are read by the code that fills the prediction store, so answers equal those of `evaluate`. A block of images
(at most 2 GB of pixels and 256 MB of logits) is decoded into a temporary folder, each network passes over it once,
and its rows are written before the next block. An image whose answer is not finite costs that image alone. Answers
come from anything with `classes`, `block` and `answer`: the networks of a workspace or, with `--from-export`, an ONNX
file, which needs neither configuration nor workspace nor base pipeline.
"""
