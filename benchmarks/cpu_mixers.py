"""Time a whole mixer of Mamba-1 and of Mamba-2 against transformers' own: eager torch, on the CPU, in one process.

Both sides hold the same weights, agree on the same inputs before they are timed, and are measured in turn. Rows are
those of `cpu_paths.py`; the peer runs as transformers runs it where no other package is installed. Its Mamba-1 backward
takes tens of seconds at L512: give few repeats.

    python benchmarks/cpu_mixers.py --repeats 3
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from cpu_paths import RESULTS, Case, Run, circumstances, measure, positive, without_gradient, write_rows
from torch import Tensor, nn
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TheirMamba2Mixer

from ssm_zoo.kernels.causal_conv1d import causal_conv1d
from ssm_zoo.kernels.selective_scan import selective_scan
from ssm_zoo.modeling import ZooMamba2Config, ZooSSDModel

# Of the published 130M checkpoints.
WIDTH = 768


Side = tuple[Callable[[Tensor], Tensor], nn.Module]


def mamba2() -> tuple[Side, Side]:
    """Our mixer and theirs, with the same weights: the function of each, and what holds its parameters."""
    sizes = {"hidden_size": WIDTH, "state_size": 128, "num_heads": 24, "head_dim": 64, "n_groups": 1}
    theirs = TheirMamba2Mixer(Mamba2Config(**sizes, num_hidden_layers=1), layer_idx=0)
    model = ZooSSDModel(ZooMamba2Config(**sizes, num_hidden_layers=1, vocab_size=8))
    ours = model.layers[0].get_submodule("mixer")
    with torch.no_grad():
        theirs.out_proj.weight.normal_(std=0.02)
    ours.load_state_dict(theirs.state_dict())
    return (lambda x: ours(x, model.sequence_of(x))[0], ours), (theirs, theirs)


def mamba1() -> tuple[Side, Side]:
    """Their weights through our ops, and their mixer."""
    mixer = MambaMixer(MambaConfig(hidden_size=WIDTH, num_hidden_layers=1), layer_idx=0)
    states, rank = mixer.ssm_state_size, mixer.time_step_rank

    def ours(hidden: Tensor) -> Tensor:
        x, z = mixer.in_proj(hidden).chunk(2, dim=-1)
        x = causal_conv1d(x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, activation="silu")
        assert isinstance(x, Tensor)
        step, B, C = mixer.x_proj(x).split([rank, states, states], dim=-1)
        dt = F.linear(step, mixer.dt_proj.weight)
        A = -mixer.A_log.float().exp()
        y = selective_scan(
            x, dt, A, B[:, :, None], C[:, :, None], D=mixer.D, z=z, dt_bias=mixer.dt_proj.bias, dt_softplus=True
        )
        assert isinstance(y, Tensor)
        return mixer.out_proj(y)

    return (ours, mixer), (mixer, mixer)


def training(side: Side, x: Tensor, cotangent: Tensor) -> Run:
    """A run of the mixer and of its gradients with respect to its input and every parameter."""
    forward, module = side
    parameters = [parameter for _, parameter in sorted(module.named_parameters())]

    def run() -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        y = forward(leaf)
        return y.detach(), *torch.autograd.grad(y, (leaf, *parameters), cotangent)

    return run


def cases(forward: list[int], backward: list[int]) -> Iterator[Case]:
    for name, (ours, theirs) in (("mamba2 mixer", mamba2()), ("mamba1 mixer", mamba1())):
        for length in forward:
            x = (torch.randn(1, length, WIDTH),)
            yield Case(f"{name} forward L{length}", without_gradient(ours[0], x), {"": without_gradient(theirs[0], x)})
        for length in backward:
            x, cotangent = torch.randn(1, length, WIDTH), torch.randn(1, length, WIDTH)
            mine, peer = training(ours, x, cotangent), training(theirs, x, cotangent)
            yield Case(f"{name} forward+backward L{length}", mine, {"": peer})


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="cpu_mixers.py", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--forward", type=positive, nargs="+", default=[1024], help="lengths of the forward")
    parser.add_argument("--backward", type=positive, nargs="+", default=[512], help="lengths of forward and backward")
    parser.add_argument("--repeats", type=positive, default=3, help="measurements of each side")
    parser.add_argument("--threads", type=positive, help="threads of torch; its own choice if not given")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    now = datetime.now(UTC)
    about = circumstances(now, "cpu_mixers.py", arguments)
    rows = []
    for case in cases(options.forward, options.backward):
        row = {"case": f"{case.name} d{WIDTH} B1 float32", **measure(case, options.repeats), **about}
        rows.append(row)
        print(f"{case.name:36} ours {row['ours_s']:.2e} s   theirs {row['theirs_s']:.2e} s   ratio {row['ratio']:.2f}")
    path = options.output / f"cpu_mixers-{now:%Y%m%dT%H%M%SZ}.jsonl"
    write_rows(rows, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
