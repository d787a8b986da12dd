"""The members of a workspace and their stored predictions, row by row.

Alignment
    Rows are aligned by (split, sample id) and columns by class name, never by position. A sample id is the path below
    the folder of the split. Images with equal bytes count as one image: they share a split and a fold and are scored
    once. Without images (imported members only) the rows of a split are those that the imported members have, and the
    catalog records `images: false`.

Out-of-sample rows
    K-fold training runs on the training split alone. Each fold network follows the recipe of the full network; its
    epoch is the last one, or chosen on the validation split, never on the held-out fold. The out-of-sample rows are
    the training rows with out-of-fold predictions and the validation rows with the full networks' predictions, without
    those that the weights were trained on (`training_data`). `predictions/<member>/train` holds in-sample outputs,
    which never reach a `fit`. The exception are networks that saw none or only a part of the training rows: they
    answer the others out of sample, without fold networks. Fold networks of a frozen training share the trunk of the
    full network and hold their heads alone (`fold_heads`); they answer from its stored embeddings.

Verification
    `discover --verify` runs each member on the validation images; the first streaming pass checks the same with the
    logits that it computes. A recorded accuracy is contradicted if it differs by more than `max(0.005, 1.5 / n)`.
    Out-of-fold predictions are compared, on a seeded sample of 500 training rows, with the full network (equal on
    more than 1% of the rows: in-sample, refused) and with the fold networks (different on more than 1%: refused),
    and are suspected if they beat validation at p < 0.001. Logits count as equal within 1e-5, relative to the largest
    of a row if that is above 1; on CUDA with bfloat16, within 2%. Results are stored in `ensembles/digests.json`
    under the digests of weights, images and predictions.

Decoded images
    `image_cache/` holds packs of resized uint8 pixels, keyed by the content of the file, per resize rule: for the base
    pipeline's evaluation transform the shorter side is `int(1.14 * img_size)`. A centre crop of them equals, bit for
    bit, what the rule's own library makes. Each member reads the pixels of its own preprocessing; a file is decoded
    once for all rules of a pass.
"""
