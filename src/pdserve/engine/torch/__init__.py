"""The native engine's compute side in torch: a step plan goes in, tokens come out.

`runner.TorchRunner` is the way in. A step's life: `batch` turns the plan into tensors,
`transformer` runs the layers over them with `attention` on the `pool`, `sampler` draws. `numerics`,
`granule` and `linear` see to it that a token's bits do not depend on the rest of its batch.
"""
