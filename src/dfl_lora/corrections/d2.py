"""D2: decentralised training over decentralised data.

    tau times   x <- x - eta (g(x) + c)                the step shift, -c
    then        x+ = M x^half,                         c <- c + (x^half - x+) / (eta tau)

For one step a round and one eta this is x_(t+1) = W (2 x_t - x_(t-1) - eta g_t + eta g_(t-1)), the form of the paper:
-eta c is what the last round moved besides its gradients. Of more steps, or an eta that falls, the paper says nothing;
c is as in `led`, from which this differs in that the whole mix is taken and not half of it.
Preserved: the mean of x, and sum_i c_i = 0. It needs every eigenvalue of M above -1/3, else it diverges where steps are
short: a recipe whose matrix has a lower one is refused (peers.mixing: lazy or laplacian have none below 0).

Source: Tang, Lian, Yan, Zhang, Liu, "D2: Decentralized Training over Decentralized Data", ICML 2018, arXiv 1803.07068;
the equality of the two forms, and that it diverges at an eigenvalue of -1, are what was checked
(tests/laws/test_corrections.py).
"""

from dfl_lora.corrections.led import ExactDiffusion
from dfl_lora.corrections.local import Local


def d2(local: Local) -> ExactDiffusion:
    """D2: as led, with the whole mix; needs eigenvalues of W above -1/3. One vector a message."""
    return ExactDiffusion(local, 1.0)
