"""Which instructions Triton kernels are meant to have: (pattern of labels, pattern of targets, at least), of `machine_code`.

float32 adapters are multiplied in float32, and a few tokens of grouped adapters by vector units. What moves single entries
or columns (and all of 16 bits on AMD, where Triton writes 8 bytes) is not meant to be wide.
"""

_16 = "(bf16|fp16)"
_NVIDIA = r"sm_\d+"
TENSOR_CORES, LOADS, BOTH = {"tensor_cores": True}, {"load": 16}, {"load": 16, "store": 16}

MEANT = (
    (rf"^_lora_shrink_kernel .* a={_16} ", ".*", TENSOR_CORES),
    (r"^_lora_grad_a_kernel .* DTYPE=(bf16|fp16) ", ".*", TENSOR_CORES),
    (rf"^_lora_grad_sb_kernel .* b={_16} ", ".*", TENSOR_CORES),
    (rf"^_lora_update_kernel .* w={_16} ", ".*", TENSOR_CORES),
    (rf"^_dora_expand_kernel .* b={_16} ", ".*", TENSOR_CORES),
    (rf"^grouped_(shrink|expand)_kernel .* store={_16} .* TENSOR_CORES=True ", ".*", TENSOR_CORES),
    (rf"^grouped_outer_kernel grad={_16} ", ".*", TENSOR_CORES),
    (rf"^_sampled_tile_kernel left={_16} ", ".*", TENSOR_CORES),
    # Of three groups of rank 64 a program has 1024 elements of x at a time for 256 threads: not among these.
    (r"^_lora_(shrink|grad_sb|update)_kernel ", _NVIDIA, BOTH),
    (r"^_lora_grad_a_kernel .* BLOCK_R=(16|32) ", _NVIDIA, BOTH),
    (r"^_dora_", _NVIDIA, BOTH),
    (r"^_dora_", "gfx.*", LOADS),
    (r"^grouped_shrink_kernel ", ".*", LOADS),
    (rf"^grouped_(expand|outer)_kernel .*=(bf16|fp16) .* (TENSOR_CORES=True|grad={_16}) .*", _NVIDIA, LOADS),
    (r"^_sum_slabs_kernel in=fp32 out=fp32 ", _NVIDIA, BOTH),
    (r"^_(write_slice|slice_adamw)_kernel .* DIM=0 ", _NVIDIA, BOTH),
    (r"^_transpose_kernel ", ".*", BOTH),
    (r"^_(sampled_tile|entry_products|add_sparse_product|count_bins|count_at_least)_kernel ", ".*", LOADS),
)
