"""Training loops of image networks, one or several at a time.

Batches, views and mixing of an epoch are drawn from (seed, epoch) before an image is opened and do not depend on the
image size. An epoch can therefore be repeated, an interrupted training ends with equal weights, and a teacher with
another image size sees the same views.

Joint training measures what one step of each network allocates (weights, gradients, moments, activations). All
networks train together if the sum is within half of the memory of the machine or its control group; otherwise each
trains for an epoch while the head reads stored embeddings of the others. A network whose step alone is too large
recomputes the blocks of its outermost sequences; the step is equal to the bit. The decision is stored with the
training, since free memory changes. After each block `ensembles/end_to_end/<fusion>/` holds weights, optimizers and
schedules; `state.json` is written last and names the files.
"""
