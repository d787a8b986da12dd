"""Training loops of image networks, one or several at a time.

Batches, views and mixing of an epoch are sampled from (seed, epoch) before an image is opened and do not depend on the
image size. An epoch can therefore be reproduced, an interrupted training ends with equal weights, and a teacher with
another image size receives the same views.

Joint training measures what one step of each network allocates (weights, gradients, moments, activations). All
networks train together if the sum is within half of the memory of the machine or its control group; otherwise each
trains for an epoch while the head reads stored embeddings of the others. A network whose step alone is too large
recomputes the blocks of its outermost sequences; the step is bit-identical. The decision is stored with the training,
since free memory changes. After each block, weights, optimizers and schedules are written to
`ensembles/end_to_end/<fusion>/`; `state.json` is written last and names the files.
"""
