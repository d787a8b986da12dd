"""Distils an ensemble into a single student network.

`oof` targets are the teacher's cross-fitted predictions of the training rows and belong to the evaluation view: half
of each batch is shown in that view and makes the teacher's part of the loss, the rest is augmented and makes the
labels' part. `consistent` and `views` ask the teacher about training images that its networks were trained on; the
record says `rows: in_sample`. One network is in memory at a time: each passes over all images of the epoch, or of all
views, before the next. Targets are stored in `ensembles/distillation/<ensemble>/targets.npz` as log-probabilities in
half precision, the largest 32 of more than 64 classes, under a digest of teacher, images and views.

Student and control start from the same weights and see the same batches and schedule, with the base pipeline's
optimizer and criterion; label smoothing acts on the labels' part alone. The averaged weights of the epoch with the
lowest log-loss on the validation split are kept. What the teacher was fitted on counts as fitted on for the student
too, since the teacher's predictions carry labels.
"""
