"""Distils an ensemble into a single student network.

The default is function matching (Beyer et al. 2022): teacher and student are shown the same augmented and mixed images
(`consistent`), or the teacher predicts several recurring views of each image once, whose predictions are mixed as the
images are (`views`). Both ask it about training images that its networks were trained on; the record says `rows:
in_sample`. `oof` targets are the teacher's cross-fitted predictions of the training rows, for teachers without
networks, and belong to the evaluation view: half of each batch is shown in that view and makes the teacher's part of
the loss, the rest is augmented and makes the labels' part. One network is in memory at a time: each passes over all
images of the epoch, or of all views, before the next. Targets are stored in
`ensembles/distillation/<ensemble>/targets.npz` as log-probabilities in half precision, the largest 32 of more than 64
classes, under a digest of teacher, images and views.

Student and control start from the same weights and see the same batches and schedule, with the base pipeline's
optimizer; labels are smoothed for neither. The averaged weights of the last epoch are kept, and both are calibrated
alike before they are compared (`verdicts`). What the teacher was fitted on counts as fitted on for the student too,
since the teacher's predictions carry labels.
"""
