"""TFLOP/s of gradient density at each length of sample, in half a minute: what a first look at a GPU needs.

    python benchmarks/density_rates.py bare,torch,triton,portable,hopper --csv rates.csv
    python benchmarks/density_rates.py hopper,hopper:/tmp/other.so      # another build of csrc/ beside this one

`kunbr-fast bench density` is the thorough one, with a gate against fp64 and rivals. Here one weight of Llama-3-8B's up
projection, (14336, 4096) in bf16, meets packed samples of 2048 tokens in all, and each implementation runs in turn: 15
rounds, the L2 cache overwritten before each. `error` is the largest relative one of a sample's sum against fp32
products; `same`: whether two runs gave the same bits.

    bare mm, bmm     the products alone, written to memory: one a sample, or one batched
    torch, triton    ours; row: by output row
    portable, hopper csrc's two kernels
"""

import argparse
import statistics
from pathlib import Path

import torch

from kunbr_fast.benchmarks.measure import add_rows, interleaved
from kunbr_fast.benchmarks.shapes import equal, ragged
from kunbr_fast.kernels import cuda_library
from kunbr_fast.kernels.grad_density import cuda, op

N, K = 14336, 4096
CASES = {f"T={T}": equal(T, 2048) for T in (32, 64, 128, 256, 512, 1024, 2048)}
CASES |= {"T=1, 64 samples": [1] * 64, "ragged": ragged(47), "T=64, 16384 tokens": equal(64, 16384)}
CASES |= {"T=128, 16384 tokens": equal(128, 16384)}


def use(library: Path) -> None:
    """The CUDA library at that path from now on."""
    cuda_library.PATH = library
    cuda_library._load.cache_clear()
    cuda_library._device.cache_clear()


def ways(name, x, dy, lengths, cu_seqlens):
    """{what: function}"""
    if name == "bare":
        parts = list(zip(x.split(lengths), dy.split(lengths)))
        found = {"mm": lambda: [torch.mm(b.t(), a) for a, b in parts][:0]}
        if len(set(lengths)) == 1:
            a, b = (t.unflatten(0, (len(lengths), -1)) for t in (x, dy))
            found["bmm"] = lambda: torch.bmm(b.mT, a)
        return found
    if name in ("torch", "triton"):

        def ours(along):
            options = dict(max_seqlen=max(lengths), form="direct", impl=name, along=along)
            return lambda: op.grad_density(x, [dy], cu_seqlens, **options)[0]

        return {"all": ours(None)} | ({"row": ours("row")} if name == "triton" else {})

    def csrc(along):
        return lambda: cuda.grad_density(x, [dy], cu_seqlens, "grad_l1", along, name)[0]

    return {"all": csrc(None), "row": csrc("row")}


def measured(names, device):
    home, generator = cuda_library.PATH, torch.Generator(device).manual_seed(0)
    for case, lengths in CASES.items():
        x, dy = (torch.randn(sum(lengths), n, generator=generator, device=device).to(torch.bfloat16) for n in (K, N))
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        parts = zip(x.split(lengths), dy.split(lengths))
        truth = torch.stack([(b.float().T @ a.float()).abs().sum(dtype=torch.float64) for a, b in parts])
        for name in names:
            kernel, _, path = name.partition(":")
            if kernel in ("portable", "hopper"):
                use(Path(path) if path else home)
            for what, run in ways(kernel, x, dy, lengths, cu_seqlens).items():
                out, error, same = run(), "", ""
                if kernel != "bare":
                    total = out.double() if out.dim() == 1 else out.double().sum(-1)
                    error, same = f"{float(((total - truth).abs() / truth).max()):.1e}", bool(torch.equal(out, run()))
                ms = statistics.median(interleaved({"": run}, device, 15, 60)[0][""])
                row = dict(benchmark="density_rates", case=case, implementation=name, what=what, N=N, K=K)
                row |= dict(samples=len(lengths), tokens=sum(lengths), ms=round(ms, 4))
                row |= dict(tflop_per_s=round(2 * sum(lengths) * N * K / ms / 1e9, 1), error=error, same=same)
                print(*row.values(), flush=True)
                yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("implementations", nargs="?", default="bare,torch,triton,portable,hopper")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    rows = list(measured(options.implementations.split(","), device))
    if options.csv:
        add_rows(options.csv, rows, device)


if __name__ == "__main__":
    main()
