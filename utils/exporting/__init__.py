"""Writes an ensemble as deployment files, each checked for parity in its own runtime.

The bundled base pipeline's `export_and_package_model` writes state dict, checkpoint, TorchScript, `torch.export`
programs and ONNX, the last by tracing or, on request, by dynamo. TFLite is converted from a traced program in a process
of its own, with limits on time and memory. 64 rows of test (then val, then train, whose labels are not read) and their
scored predictions are the reference; `runtimes` runs the files of each format in a new process and `parity_check`
compares.

An ensemble of image members takes one float tensor per distinct resize rule, which the delivered `predict.py` makes
from the image by the rules in the file's metadata; normalisation is inside, one for each distinct preprocessing. With
`--input uint8-nhwc` resizing is inside as well, in Pillow's arithmetic, for the rules that a graph can follow.

A combiner with discontinuities (votes, trees, the best experts) declares `is_discontinuous`; its files also give
`member_logits`, so that the combiner is compared on the file's own member outputs on every row. A row on which the
combiner answers differently for the file's member outputs than for the expected ones, although these agree within
1e-4, lies at a discontinuity: it is counted (`near_threshold`, at most 5%) and left out of the end-to-end comparison
alone.

`reduced_precision` converts the members' nodes alone, since preprocessing and combiner are where small differences
change labels; int8 ranges come from 128 training images. `exported_programs` decides whether `export --verify` may
run a file: the workspace records the digests of the files that it writes, TorchScript archives are searched for
operators that touch files, and those of `torch.export` for what loading them would run (`program_archives`). A folder
is filled under a temporary name and swapped in by two renames; the next export restores a swap that was killed between
them.
"""
