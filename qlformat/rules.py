"""The closed list of rules of the format (spec/format.md, "Rules"). Every refusal and every finding carries one id."""

from __future__ import annotations

RULES: dict[str, str] = {
    # Container: one safetensors file.
    "S1": "the file holds at least 8 bytes and a header of at most 100 MB that lies within it",
    "S2": "the header is one UTF-8 JSON object that starts with '{' and repeats no key",
    "S3": "every entry has exactly dtype, shape and data_offsets, each well formed",
    "S4": "end - begin of data_offsets is the element count times the size of the dtype",
    "S5": "the tensors tile the data section: no overlap, no hole, nothing out of bounds, nothing after",
    "S6": "__metadata__ maps strings to strings",
    "S7": "tensor names have 1 to 4096 bytes of UTF-8 and no control characters",
    # Repository.
    "R1": "the weights are model.safetensors or the shards of an index, one of the two",
    "R2": "the index is a JSON object whose weight_map maps strings to strings",
    "R3": "shard names are plain file names ending in .safetensors",
    "R4": "every file named is a regular file inside the repository",
    "R5": "every tensor is in exactly one shard, the one that the index names",
    "R6": "every *.safetensors file in the directory belongs to the checkpoint",
    # config.json.
    "C1": "config.json has a quantization_config with quant_method bitsandbytes and load_in_4bit true",
    "C2": "quantization_config agrees with the tensors",
    "C3": "llm_int8_skip_modules is a list and no _load_in_* key is written",
    "C4": "no module in llm_int8_skip_modules has a quantized weight",
    # Tensor encoding.
    "T1": "a quantized weight has all its companions",
    "T2": "every companion has its weight and a known suffix",
    "T3": "packed is U8 of shape [ceil(n/2), 1]",
    "T4": "absmax is U8 with double quantization and F32 (finite, not negative) without, of shape [ceil(n/blocksize)]",
    "T5": "quant_map is F32 [16], bit-equal to the codebook of its quant_type",
    "T6": "quant_state is at most 64 KiB of U8 holding a strict JSON object with exactly the specified keys",
    "T7": "the quantized shape has at least one dimension, only positive ones, and fewer than 2**48 elements",
    "T8": "with an odd element count the pad nibble is the code of zero",
    "T9": "a tensor that is not quantized has a plain float, integer or bool dtype",
    # Double quantization.
    "D1": "nested_absmax is F32 [ceil(blocks/256)], finite and not negative",
    "D2": "nested_quant_map is F32 [256], bit-equal to the 8-bit codebook",
    "D3": "nested_blocksize is 256, nested_dtype float32, nested_offset a finite float32 value",
    # Manifest: qlf.json.
    "M1": "qlf.json is a strict JSON object that satisfies the schema",
    "M2": "format_version is one that the reader supports",
    "M3": "the reader understands every key that must_understand lists",
    "M4": "the manifest lists exactly the tensors of the shards, with their dtype, shape and shard",
    "M5": "the sha256 of every tensor matches",
    "M6": "the size and hash of every file match",
    "M7": "the fingerprint matches",
    "M8": "the recipe agrees with every quant_state",
    "M9": "file names in the manifest are plain relative paths inside the repository",
    # Placement, claimed by repositories that have a qlf.json.
    "P1": "a weight and its companions are in one shard",
    "P2": "the data section starts at a multiple of 64, and so do packed weights whose size is a multiple of 64",
    "P3": "the quant_state tensors come last in their shard",
    # Encoder and source.
    "E1": "a weight to be quantized has no NaN and no infinity",
    "E2": "the source is not quantized already",
    "E3": "a weight to be quantized has dtype float32, float16 or bfloat16",
    "E4": "the source is safetensors, or .bin files that load with weights_only",
    "E5": "with a source: quantizing it again gives the same bytes",
    "E6": "with a source: its files have the recorded hashes",
}
"""Rule id -> what holds for a sound checkpoint."""
