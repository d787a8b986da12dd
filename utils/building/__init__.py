"""Builders: each fits ensembles of one family and saves them with provenance and baselines.

Every ensemble stores cross-fitted predictions (`crossfit.npz`): for each out-of-sample row, the output of a copy of
its recipe that read no label of the row's fold. The folds are one seeded, stratified, group-aware assignment per
workspace: five, or one per group where there are fewer groups; a class may be absent from the rows of a copy. Copies
and final fit select settings and calibrate by the same rule, `nested_cv.inner_folds`. Voting fits nothing, so its
cross-fitted predictions are its predictions. The recommendation reads these predictions and the members' out-of-sample
predictions, never the test split: lowest log-loss, then the simplest ensemble within one paired standard error.

Soups
    Ingredients are the checkpoints of one backbone: `final`, `finetune_best`, `head_best`, snapshots, later epochs
    and fold networks. Equal weights count once. Two checks on the validation split admit a checkpoint: a cosine of at
    least 0.1 between the weight matrices (unrelated networks are below 0.03, checkpoints of one training 0.5 to 1),
    and a midpoint with the best checkpoint that is no worse than the better of the two (error within 2 points or one
    row, log-loss within 0.1), also tried with recomputed BatchNorm statistics. `uniform` averages the admitted
    checkpoints, `greedy` adds what does not make the metric fall, `wise_ft` takes the best of eleven points between
    `head_best` and `final`. Every mixture is scored with averaged and with recomputed BatchNorm statistics; the
    better is kept. The validation split chose all this and is recorded in `selected_on`.

Test-time augmentation
    Views of a group are the mirrored image, five crops of 0.875 of the side, rotations by 90, 180 and 270 degrees, or
    the image at 0.8 and 1.25 of its scale. Every network, those of the folds included, runs once on the out-of-sample
    rows of each group; `utils.numeric.view_choice` chooses on these logits. A member's choice is used only where every
    choice that leaves out one or two folds is the same, so that its predictions are what a choice without these
    folds' labels predicts, in cross-fitting and in inner copies too. `<member>_tta` then takes the member's place.

Pruning
    `latency` times forward passes of each member (warm-up, 1 and 32 images, p50 and p95, CUDA events on a GPU).
    `ensembles/latency.json` stores the times by member digest, device and threads; they are not measured again, so
    that what they decide repeats. What a budget leaves without a member is recorded in `ensembles/pruning.json`.

Fusion
    Full networks answer at inference. `val` fits on their validation rows; `aligned` also on the training rows, with
    the fold networks' embeddings mapped into the full network's space by a ridge regression that is fitted on
    validation rows without labels. `auto` fits both and keeps `val` only where its log-loss is lower on the training
    rows, by a paired 95% interval: validation rows may have chosen the networks' epochs. Heads on `val` answer for the
    training rows too, by copies without the labels of the row's fold. The linear map from embeddings to logits that the
    validation rows give must hold on the training rows; otherwise they are refused.

Fuser
    A fuser reads cross-fitted predictions of other ensembles on the rows that all of them share. A convex fuser is the
    super learner of `utils.numeric.super_learner`. Its score needs two levels: for each held-out fold it is fitted on
    the predictions of copies of its inputs that were fitted without this fold and the row's own, and applied to copies
    without this fold. Builders keep these predictions (`inner_crossfit.npy`): grid learners make the fits in nested
    cross-validation in any case; pools, selections, pruned ensembles and cascades are fitted K (K - 1) / 2 times more,
    on smaller parts, which is about three quarters more time than without. An ensemble without such copies (trained end
    to end, or with fewer than three folds) is no input of a convex fuser.

Mixture of experts and cascade
    Experts are the members that greedy forward selection takes first for log-loss. The gate reads the
    log-probabilities of the cheapest expert; training is noisy top-k with the balance loss on the full softmax and a
    z-loss. In the cascade an image leaves with the plain mean of the members that have run once its largest
    probability reaches a threshold; the threshold comes from a fixed grid, so that no row lies on it.

End to end
    Training rows are in-sample for the networks, so validation rows alone choose the epoch (0: untouched networks),
    and temperature and fallback are cross-fitted on them. The networks are derived members named `<fusion>_<member>`,
    and rows that chose them cannot recommend the result.
"""
