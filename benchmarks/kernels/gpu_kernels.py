"""Time every kernel beside its peers, against the issue's bars and the device's measured ceilings.

On a machine without a CUDA device the same run goes through at small sizes, and each row of a full size says that it
is not measured. What is measured, how to read a row, and how to run it where there is no network: `README.md` here.

    python benchmarks/kernels/gpu_kernels.py --minutes 25
"""

import sys

from checkout import use_checkout

if __name__ == "__main__":
    use_checkout()
    from kernel_suite import main

    sys.exit(main(sys.argv[1:]))
