"""Tokens that stand before the genes in Nicheformer's sentences, as its released notebooks number them.

A gene's token is its vocabulary index + `RESERVED_TOKENS`.
"""

MASK, PAD, CLS = 0, 1, 2
RESERVED_TOKENS = FIRST_GENE = 30
# Rows of the published embedding table beyond the last gene.
SPARE_ROWS = 5
MODALITY_TOKENS = {"dissociated": 3, "spatial": 4}
SPECIES_TOKENS = {"human": 5, "mouse": 6}
# By lower-case name, as the released notebooks number them, with the short names of this package's corpora.
ASSAY_TOKENS = {
    "merfish": 7,
    "cosmx": 8,
    "nanostring digital spatial profiling": 8,
    "xenium": 9,
    "10x 5' v2": 10,
    "10x 3' v3": 11,
    "10x 3' v2": 12,
    "10x 5' v1": 13,
    "10x 3' v1": 14,
    "10x 3' transcription profiling": 15,
    "10x transcription profiling": 15,
    "10x 5' transcription profiling": 16,
    "cite-seq": 17,
    "smart-seq v4": 18,
}
FIRST_EXTRA_ASSAY = max(ASSAY_TOKENS.values()) + 1
