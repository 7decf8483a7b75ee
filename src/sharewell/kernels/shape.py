"""Positions in the int64 vector that tells the compiled step the shape of model, pages and batch."""

(
    N_LAYERS,
    HIDDEN,
    N_HEADS,
    N_KV,
    HEAD_DIM,
    INTERMEDIATE,
    BLOCK_SIZE,
    BLOCK_BYTES,
    LAYER_BYTES,
    VALUES_AT,  # bytes from a layer's keys to its values
    POOL,  # address of the pages
    WINDOW,  # tokens a query sees, 0 for all
    PAGES_BF16,
    QUANTIZED,  # activations are quantised for the projections
    QK_NORM,
    GATE_UP_HALF,  # padded rows of the gate matrix
    PRECISE,  # bits: matrices whose quantised activations carry what their rounding left out
    SCORES,  # addresses of the tiles for scores and for mixing values
    MIX,
    EMBEDS,  # the first layer of this step begins with the tokens' embeddings, not with given hidden states
) = range(20)
LENGTH = 20
QKV, OUT, GATE_UP, DOWN, HEAD = range(5)  # the matrices of a layer, and the vocabulary's
