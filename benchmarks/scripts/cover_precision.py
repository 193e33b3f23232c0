"""The demo with the cover in each precision: gradient cosines, and what is forgotten, kept and relearnt.

python benchmarks/scripts/cover_precision.py --seeds 0 1 2 3 --csv benchmarks/results/cover_precision_cpu.csv

Each seed's model is taught and warmed up once; every row is one re-insertion from there, and one RTT attack. nf4 needs
bitsandbytes. cosine_I: of block I's gradient at its first step to the one with an exact cover; the weights' bytes are
those of the cover of the first block.
"""

import copy
import dataclasses

import torch

from kunbr_fast.benchmarks.measure import add_rows, script_parser
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.low_precision import COVER_PRECISIONS, check_available, low_precision_cover
from kunbr_fast.run.demo import GROUPS, Demo, gradient_difference
from kunbr_fast.run.reporter import Reporter
from kunbr_fast.run.unlearn import unlearn


def rows_of(seed, precisions):
    demo = Demo(seed, Reporter(say=print))
    config, forget, retain = demo.config, demo.samples["forget"], demo.samples["retain"]
    taught = demo.teach(tuple(GROUPS))
    unlearned = copy.deepcopy(taught)
    gradient_difference(
        Decoder(unlearned), forget, retain, config, lr=config.warmup_lr, optimizer=config.warmup_optimizer,
        epochs=config.warmup_epochs,
    )  # fmt: skip
    for precision in precisions:
        model = copy.deepcopy(taught)
        setting = dataclasses.replace(config, cover_precision=precision)
        report = unlearn(model, forget, retain, setting, unlearned=copy.deepcopy(unlearned), progress=False)
        demo.measure(precision, model, 0.0)
        row = demo.rows[-1]
        shown = {"forget": row["forget"], "retain": row["retain"], **row["other"], "rtt": row["rtt"]}
        cosines = [*report.gradient_cosines.values()] or [1.0] * len(report.blocks)
        decoder = Decoder(taught)
        above = decoder.layers[report.blocks[0].stop :]
        weights = sum(p.numel() for p in above.parameters() if p.dim() == 2)
        with frozen(taught), low_precision_cover(decoder, report.blocks[0], precision) as cover:
            nbytes = 2 * weights if cover is None else cover.nbytes
        yield {
            "benchmark": "cover_precision", "seed": seed, "cover": precision,
            **{name: round(100 * value, 1) for name, value in shown.items()},
            **{f"cosine_{i}": round(cosine, 6) for i, cosine in enumerate(cosines)},
            "weights": weights, "bytes": nbytes, "bytes_bf16": 2 * weights,
        }  # fmt: skip


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--precisions", nargs="+", choices=COVER_PRECISIONS, default=COVER_PRECISIONS)
    arguments = parser.parse_args()
    for precision in arguments.precisions:
        check_available(precision)
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        rows = []
        for row in rows_of(seed, arguments.precisions):
            print(row, flush=True)
            rows.append(row)
        add_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
