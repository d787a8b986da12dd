"""Writes an ensemble as deployment files, each checked for parity in its own runtime.

The bundled base pipeline's `export_and_package_model` writes state dict, checkpoint, TorchScript, `torch.export`
programs and ONNX, the last by tracing or, on request, by dynamo. TFLite is converted from a traced program in a
separate process, with limits on time and memory. The reference is 64 rows of test (then val, then train; labels are not
read) with the predictions that `evaluate` scores; `runtimes` runs the files of each format in a new process, and
`parity_check` compares.

An ensemble of image members takes one float tensor per distinct resize rule, which the delivered `predict.py` computes
from the image by the rules in the file's metadata; normalisation, one per distinct preprocessing, is part of the
network. With `--input uint8-nhwc`, so is resizing, in Pillow's arithmetic, for the rules that a graph can implement.

A combiner with discontinuities (votes, trees, the best experts) declares `is_discontinuous`; its files also return
`member_logits`, so that the combiner is compared on the file's member outputs on every row. A row on which the
combiner's outputs for the file's member outputs and for the expected ones differ, although these agree within 1e-4, is
at a discontinuity: it is counted (`near_threshold`, at most 5%) and excluded only from the end-to-end comparison.

`reduced_precision` converts only the members' nodes, since small differences in preprocessing and combiner change
labels; int8 ranges come from 128 training images. `exported_programs` decides whether `export --verify` may run a file:
the workspace records the digests of the files that it writes, TorchScript archives are searched for operators that
access files, and `torch.export` archives for anything that loading would execute (`program_archives`). A folder is
written under a temporary name and swapped in by two renames; if a swap is interrupted between them, the next export
restores the previous folder.
"""
