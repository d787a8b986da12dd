"""The members of a workspace and their stored predictions.

Alignment
    Rows are aligned by (split, sample id) and columns by class name, never by position. A sample id is the path
    relative to the folder of the split. Images with equal bytes count as one image: they share a split and a fold and
    are scored once. Without images (imported members only) the rows of a split are those of the imported members, and
    the catalog records `images: false`.

Out-of-sample rows
    K-fold training uses only the training split. Each fold network follows the recipe of the full network; its epoch
    is the last one, or selected on the validation split, never on the held-out fold. The out-of-sample rows are the
    training rows with out-of-fold predictions and the validation rows with the full networks' predictions, without
    rows that the weights were trained on (`training_data`). `predictions/<member>/train` holds in-sample outputs,
    which are never passed to `fit`. The exception are networks trained on none or only a part of the training rows:
    their outputs on the other rows are out of sample without fold networks. Fold networks of a frozen training share
    the trunk of the full network (`fold_heads`); their outputs are computed from its stored embeddings.

Verification
    `discover --verify` runs each member on the validation images; the first streaming pass makes the same checks on
    its logits. A recorded accuracy is contradicted if it differs by more than `max(0.005, 1.5 / n)`. Out-of-fold
    predictions are compared, on a seeded sample of 500 training rows, with the full network (equal on more than 1% of
    the rows: in-sample, refused) and with the fold networks (different on more than 1%: refused), and are reported as
    suspicious if they are more accurate than those on validation at p < 0.001. Logits count as equal within 1e-5,
    relative to the largest of a row if that is above 1; on CUDA with bfloat16, within 2%. Results are stored in
    `ensembles/digests.json` under the digests of weights, images and predictions.

Decoded images
    `image_cache/` holds packs of resized uint8 pixels, keyed by file content, for each resize rule: for the base
    pipeline's evaluation transform the shorter side is `int(1.14 * img_size)`. Their centre crop equals, bit for bit,
    that of the library that defines the rule. Each member reads the pixels of its preprocessing; a file is decoded
    once for all rules of a pass.
"""
