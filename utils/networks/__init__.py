"""One trained network: construction, loading of weights, weight averaging, and joining several into one module.

Images are preprocessed by the `Preprocessing` of each network, with pixels from the bundled base pipeline's `resizing`.
Only entries that affect the input are compared and enter digests; the base pipeline's evaluation transform adds nothing
to a digest.

Checkpoints are read with `weights_only=True` and NumPy scalars allowed; a refused file is not tried with another
reader. Soups sum weights in float64, in blocks of 16 MB or an eighth of the weights, with one file open. The joint
network (`ensemble_network`) preprocesses images once per preprocessing, runs each network once and applies the
combiner's module; `uint8` images are resampled as in Pillow (`image_preparation`): a filter is two matrices of 22-bit
weights in float64, with rounding to 8 bits after each.
"""
