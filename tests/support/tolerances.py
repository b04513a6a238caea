"""How far two computations of the same numbers may differ: one table for all tests, the same on every machine.

A pair is (rtol, atol) as `torch.testing.assert_close` takes it: |actual - expected| <= atol + rtol * |expected|.
The tests draw inputs of order 1 and lengths up to a few hundred, so sums of a few hundred terms are compared.
A test that needs more than this has found something: do not widen a pair for it, and never for one machine.
"""

import torch

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    # Unit roundoff u = 1.1e-16. Three hundred additions in another order cost at most 300 u = 3e-14; the rest is
    # room for exp and for gradients, which multiply several such sums.
    torch.float64: (1e-10, 1e-10),
    # Unit roundoff 6e-8: 300 u = 2e-5 as the worst case of one sum, a tenth of that as a rule (errors cancel). The
    # relative part covers gradients that are sums over batch and time of order 100.
    torch.float32: (1e-4, 1e-5),
    # Unit roundoff 4.9e-4. Sums are kept in float32; what remains is rounding an operand or two and the result
    # once: a few u of the largest term.
    torch.float16: (4e-3, 4e-3),
    # Unit roundoff 3.9e-3, with the same reasoning: four to five u.
    torch.bfloat16: (2e-2, 2e-2),
}
