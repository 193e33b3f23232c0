"""The suites of `kunbr-fast bench`, one module each, with `cases(options)`."""

SUITES = {
    "linear_loss": "head and loss over labelled rows",
    "norms": "RMSNorm, LayerNorm, SwiGLU and rotary embedding",
    "optimizer": "Lion and AdamW over a block's weights",
    "cover_layer": "one decoder layer, frozen and trained",
    "step": "one re-insertion step against the reference procedure",
    "density": "statistics of each sample's weight gradient, one layer and a whole model",
    "end_to_end": "every stage of a whole run, against the reference procedure",
}
