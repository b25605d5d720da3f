"""Triton kernels, one file per op, importable as `pecker_fast.kernels`.

They import torch and triton, nothing of pecker_fast.
"""

# From the root of a checkout `import kernels` finds this folder before Hugging Face's package of that name. diffusers
# and transformers import that to ask for its version, and must get an answer; using anything of it is an error.
if __name__ == "kernels":

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            "This folder is pecker_fast.kernels, not Hugging Face's `kernels`: import it as pecker_fast.kernels, "
            "and start Python outside pecker_fast's checkout to import the other one."
        )
