"""Temporal action detection: one engine (embedding, pyramid, heads, losses, decoding, evaluation), on which a
backbone is a small plug-in. LiquidTAD (arXiv 2604.18274) is one backbone; ActionFormer's and a plain
max-pooling one stand beside it so that a comparison changes one thing."""
