"""Triton kernels, one file per op, importable as `pecker_fast.kernels`.

They import torch and triton, nothing of pecker_fast.
"""

# From the root of a checkout `import kernels` finds this folder before Hugging Face's package of that name,
# which diffusers and transformers import when it is there. They tolerate an ImportError.
if __name__ == "kernels":
    raise ImportError(
        "This folder is pecker_fast.kernels, not Hugging Face's `kernels`: import it as pecker_fast.kernels, "
        "and start Python outside pecker_fast's checkout to import the other one."
    )
