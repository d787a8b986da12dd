"""Distils an ensemble into a single student network.

The default is function matching (Beyer et al. 2022): teacher and student receive the same augmented and mixed images
(`consistent`), or the teacher predicts several recurring views of each image once, and predictions are mixed like the
images (`views`). Both use in-sample predictions, on images that the teacher's networks were trained on; the record
says `rows: in_sample`. `oof` targets are the teacher's cross-fitted predictions of the training rows, for teachers
without networks, and apply to the evaluation view: half of each batch is loaded in that view and enters the
distillation loss, the other half is augmented and enters the label loss. One network is in memory at a time: each
predicts all images of the epoch, or of all views, before the next. Targets are stored in
`ensembles/distillation/<ensemble>/targets.npz` as log-probabilities in half precision (with more than 64 classes, the
largest 32), under a digest of teacher, images and views.

Student and control start from the same weights and are trained on the same batches with the same schedule and the base
pipeline's optimizer, without label smoothing. The averaged weights of the last epoch are kept, and both are calibrated
in the same way before they are compared (`verdicts`). The rows that the teacher was fitted on count as fitted rows of
the student, since the teacher's predictions contain information on the labels.
"""
