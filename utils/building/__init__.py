"""Builders: each fits ensembles of one family and saves them with provenance and baselines.

Every ensemble stores cross-fitted predictions (`crossfit.npz`): for each out-of-sample row, the output of a copy of
the combiner that read no label of the row's fold. The folds are one seeded, stratified, group-aware assignment per
workspace: five, or one per group if there are fewer groups; a class may be absent from the rows of a copy. Copies and
final fit select settings and calibrate by the same rule, `nested_cv.inner_folds`. Voting fits nothing, so that its
cross-fitted predictions are its predictions. The recommendation reads these predictions and the members' out-of-sample
predictions, never the test split: lowest log-loss, then the simplest ensemble within one paired standard error.
Learned ensembles are compared with baselines (`baselines.npz`), which are fitted once per workspace and set of rows.

Soups
    Ingredients are the checkpoints of one backbone: `final`, `finetune_best`, `head_best`, snapshots, later epochs
    and fold networks. Equal weights count once. Two checks on the validation split admit a checkpoint: a cosine of at
    least 0.1 between the weight matrices (unrelated networks are below 0.03, checkpoints of one training 0.5 to 1),
    and a midpoint with the best checkpoint that is no worse than the better of the two (error within 2 points or one
    row, log-loss within 0.1), also tried with recomputed BatchNorm statistics. `uniform` averages the admitted
    checkpoints, `greedy` adds checkpoints that do not lower the metric, `wise_ft` uses the best of eleven points
    between `head_best` and `final`. Every mixture is scored with averaged and with recomputed BatchNorm statistics; the
    better is kept. All of this is selected on the validation split, which is recorded in `selected_on`.

Test-time augmentation
    Views of a group are the mirrored image, five crops of 0.875 of the side, rotations by 90, 180 and 270 degrees, or
    the image at 0.8 and 1.25 of its scale. Every network, including the fold networks, runs once per group on its
    out-of-sample rows; `utils.numeric.view_choice` selects views on these logits. A member's choice is used only if
    every choice that leaves out one or two folds is the same, so that its predictions equal those of a choice without
    the labels of these folds, in cross-fitting and in inner copies too. `<member>_tta` then replaces the member.

Pruning
    `latency` times forward passes of each member (warm-up, 1 and 32 images, p50 and p95, CUDA events on a GPU).
    `ensembles/latency.json` stores the times by member digest, device and threads; they are not measured again, so
    that selections by latency are reproducible. Methods whose budget excludes every member are recorded in
    `ensembles/pruning.json`.

Fusion
    Full networks predict at inference. `val` fits on their validation rows; `aligned` also on the training rows, with
    the fold networks' embeddings mapped into the full network's space by a ridge regression that is fitted on
    validation rows without labels. `auto` fits both and keeps `val` only if its log-loss is lower on the training
    rows, by a paired 95% interval: validation rows may have selected the networks' epochs. Heads on `val` predict the
    training rows too, by copies without the labels of the row's fold. The linear map from embeddings to logits that is
    fitted on the validation rows must hold on the training rows; otherwise they are refused.

Fuser
    A fuser reads cross-fitted predictions of other ensembles on the rows that all of them share. A convex fuser is the
    super learner of `utils.numeric.super_learner`. Its score needs two levels: for each held-out fold it is fitted on
    the predictions of copies of its inputs that were fitted without this fold and without the row's fold, and applied
    to copies without this fold. Builders store these predictions (`inner_crossfit.npy`): grid learners compute the fits
    in nested cross-validation anyway; pools, selections, pruned ensembles and cascades are fitted K (K - 1) / 2 times
    more, on fewer rows, which takes about three quarters more time. With many rows, copies without two folds are made
    for neighbouring folds only, K times. An ensemble without these copies (trained end to end, or with fewer than
    three folds) cannot be an input of a convex fuser.

Mixture of experts and cascade
    Experts are the members that greedy forward selection adds first for log-loss. The gate reads the
    log-probabilities of the cheapest expert; training is noisy top-k with the load-balancing loss on the full softmax
    and a z-loss. In the cascade an image exits with the unweighted mean of the members that have run once its largest
    probability reaches a threshold; the threshold is from a fixed grid, so that no row lies on it.

End to end
    Training rows are in-sample for the networks, so that only validation rows select the epoch (0: unchanged networks),
    and temperature and fallback are cross-fitted on them. The networks are derived members named `<fusion>_<member>`,
    and the recommendation does not use rows that selected them.
"""
