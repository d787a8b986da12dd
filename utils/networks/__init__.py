"""One trained network: build it, load its weights, average it, join it with others into one module.

Images are prepared by each network's own `Preprocessing`; the bundled base pipeline's `resizing` makes the pixels. Only
what decides the input is compared and enters digests, and nothing does for the base pipeline's evaluation transform.

Checkpoints are read with `weights_only=True` and NumPy's scalars allowed; a refusal is final. Soups sum weights in
float64, 16 MB or an eighth of the weights at a time, with one file open. The joint network (`ensemble_network`)
prepares images once per preprocessing, runs each network once and applies the combiner's module; `uint8` images are
resampled as Pillow does (`image_preparation`): a filter as two matrices of 22-bit weights in float64, rounded to 8 bits
after each.
"""
