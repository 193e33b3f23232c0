"""Blocks of layers: the partition of a model, and the choice among them."""

from __future__ import annotations


def partition(num_layers: int, num_blocks: int) -> list[range]:
    """`num_blocks` contiguous blocks of `num_layers // num_blocks` layers; left-over layers form a further one on
    top."""
    if not 1 <= num_blocks <= num_layers:
        raise ValueError(f"num_blocks={num_blocks}: expected 1 to {num_layers}, the number of layers")
    size = num_layers // num_blocks
    blocks = [range(i * size, (i + 1) * size) for i in range(num_blocks)]
    return blocks + [range(num_blocks * size, num_layers)] if num_blocks * size < num_layers else blocks


def check_block(block: range, num_layers: int) -> range:
    """`block` as a range of layers with step 1, or ValueError."""
    if not isinstance(block, range) or block.step != 1 or not 0 <= block.start < block.stop <= num_layers:
        raise ValueError(f"block={block!r}: expected a range of layers within range({num_layers}), such as range(2, 4)")
    return block


def selectable_blocks(num_layers: int, num_blocks: int, top_k: int | None, skip_last_layers: int = 2) -> list[range]:
    """The blocks that `select_blocks` chooses from; ValueError where they are fewer than `top_k`, or than one."""
    blocks = partition(num_layers, num_blocks)
    free = [block for block in blocks if block.stop <= num_layers - skip_last_layers]
    if top_k is None and not free:
        raise ValueError(
            f"num_blocks={num_blocks}: each of the {len(blocks)} blocks of {num_layers} layers holds one of the last "
            f"{skip_last_layers} layers. Change num_blocks or skip_last_layers"
        )
    if top_k is not None and not 1 <= top_k <= len(free):
        raise ValueError(
            f"top_k={top_k}: expected 1 to {len(free)}; {num_layers} layers in {len(blocks)} blocks leave {len(free)} "
            f"that hold none of the last {skip_last_layers} layers. Change num_blocks, top_k or skip_last_layers"
        )
    return free
