"""Second-order pruning: what the other weights can make up for, from second moments of each layer's inputs.

`calibration` (with `layers` and `shifted`) collects the moments. `weights`, `layerwise` and `chain` remove single
weights and bound the error; `readers`, `channels`, `allocation` and `side_by_side` remove whole channels.
"""
