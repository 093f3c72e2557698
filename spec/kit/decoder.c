/* A decoder of the format in plain C11, written from format.md and independent of qlformat: no torch, no NumPy.
 *
 *     cc -std=c11 -O2 -ffp-contract=off -Wall -Wextra -Werror spec/kit/decoder.c -o decoder
 *     python spec/kit/run.py -- ./decoder
 *
 * It reads one request of the kit on stdin (README.md) and writes the decoded elements to stdout. A broken file ends
 * with exit status 1 and a line "[RULE] reason" on stderr. Memory is given back by the end of the process.
 */
#include <float.h>

#include "json.h"

#if FLT_EVAL_METHOD != 0
#error "float expressions must be rounded to float"
#endif

enum { MAX_STATE = 65536, NESTED = 256, UNSUPPORTED = 3 };
static const uint64_t MAX_HEADER = 100000000, MAX_ELEMENTS = UINT64_C(1) << 48, MAX_COUNT = UINT64_C(1) << 63;
static const uint32_t BOOKS[2][16] = {
    /* nf4, fp4 */
    {0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000, 0x3da2faff,
     0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000},
    {0x00000000, 0x3baaaaab, 0x3f2aaaab, 0x3f800000, 0x3eaaaaab, 0x3f000000, 0x3e2aaaab, 0x3e800000, 0x00000000,
     0xbbaaaaab, 0xbf2aaaab, 0xbf800000, 0xbeaaaaab, 0xbf000000, 0xbe2aaaab, 0xbe800000}};
static const struct {
  const char* name;
  int bits;
} DTYPES[] = {{"U8", 8},          {"F32", 32}, {"BF16", 16},   {"F16", 16},    {"I8", 8},      {"BOOL", 8},
              {"U16", 16},        {"I16", 16}, {"U32", 32},    {"I32", 32},    {"U64", 64},    {"I64", 64},
              {"F64", 64},        {"C64", 64}, {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
              {"F8_E5M2FNUZ", 8}, {"F4", 4},   {"F6_E2M3", 6}, {"F6_E3M2", 6}, {NULL, 0}};

typedef struct {
  const Node* node;
  uint64_t begin, end;
} Tensor;
typedef struct {
  FILE* file;
  uint64_t data_start;
  Tensor* tensors;
  size_t count;
} Shard;
typedef struct {
  int book, nested;
  const char* dtype;
  uint64_t blocksize, elements;
  float offset;
} State;

/* Product of the dimensions, at most `limit`; *zero tells of a dimension 0. Breaks `rule` when one is no integer. */
static uint64_t product(const Node* shape, uint64_t limit, const char* rule, int* zero) {
  uint64_t count = 1, dim;
  if (shape->type != '[') refuse(rule, "shape is not a list");
  for (const Node* child = shape->child; child; child = child->next) {
    if (!integer(child, &dim)) refuse(rule, "a dimension is not an integer or negative");
    if (dim >= limit) refuse(rule, "a dimension is too large");
    if (dim == 0)
      *zero = 1;
    else
      count = count > (limit - 1) / dim ? limit : count * dim;
  }
  return count;
}

/* --- The container: rules S1 to S7. --- */

static void read_at(Shard* shard, uint64_t offset, void* to, uint64_t size) {
  if (fseek(shard->file, (long)offset, SEEK_SET) || fread(to, 1, (size_t)size, shard->file) != size)
    refuse("S5", "the file cannot be read");
}

static Tensor entry(const Node* node) {
  const Node *dtype = get(node, "dtype"), *shape = get(node, "shape"), *offsets = get(node, "data_offsets");
  Tensor tensor = {node, 0, 0};
  int zero = 0;
  if (node->key_surrogate || !node->key_size || node->key_size > 4096) refuse("S7", "a name is empty or too long");
  for (size_t i = 0; i < node->key_size; i++)
    if ((unsigned char)node->key[i] < 32 || node->key[i] == 127) refuse("S7", "control character in a name");
  if (node->type != '{' || !dtype || !shape || !offsets || children(node) != 3) refuse("S3", "wrong keys");
  int which = 0;
  while (DTYPES[which].name && !is_text(dtype, DTYPES[which].name)) which++;
  if (!DTYPES[which].name) refuse("S3", "unknown dtype");
  uint64_t bits = (uint64_t)DTYPES[which].bits, count = product(shape, MAX_COUNT, "S3", &zero);
  if (zero) count = 0;
  if (count >= MAX_COUNT) refuse("S3", "the element count is not below 2**63");
  if (offsets->type != '[' || children(offsets) != 2 || !integer(offsets->child, &tensor.begin) ||
      !integer(offsets->child->next, &tensor.end))
    refuse("S3", "data_offsets is not a pair of integers");
  uint64_t size = tensor.end - tensor.begin; /* 8 * size == bits * count, without products that wrap */
  uint64_t bytes = bits >= 8 ? bits / 8 : bits == 4 ? 1 : 3, items = bits >= 8 ? 1 : bits == 4 ? 2 : 4;
  if (tensor.end < tensor.begin || size % bytes || count % items || size / bytes != count / items)
    refuse("S4", "data_offsets do not fit dtype and shape");
  return tensor;
}

static int by_position(const void* left, const void* right) {
  const Tensor *a = left, *b = right;
  if (a->begin != b->begin) return a->begin < b->begin ? -1 : 1;
  return (a->end > b->end) - (a->end < b->end);
}

static Shard open_shard(const char* path) {
  unsigned char prefix[8];
  Shard shard = {fopen(path, "rb"), 0, NULL, 0};
  if (!shard.file || fseek(shard.file, 0, SEEK_END)) refuse("R4", "the file cannot be opened");
  long end = ftell(shard.file);
  if (end < 8) refuse("S1", "fewer than 8 bytes");
  read_at(&shard, 0, prefix, 8);
  uint64_t size = (uint64_t)end, length = 0, position = 0;
  for (int i = 7; i >= 0; i--) length = length << 8 | prefix[i];
  if (length > MAX_HEADER || length > size - 8) refuse("S1", "the header is too long");
  char* text = allocate(length + 1, 1);
  read_at(&shard, 8, text, length);
  const Node* root = text[0] == '{' ? parse(text, (size_t)length) : NULL;
  if (!root) refuse("S2", "the header is not a JSON object");
  shard.data_start = 8 + length;
  shard.tensors = allocate(children(root), sizeof *shard.tensors);
  for (const Node* child = root->child; child; child = child->next) {
    if (child->key_size != 12 || memcmp(child->key, "__metadata__", 12)) {
      shard.tensors[shard.count++] = entry(child);
      continue;
    }
    if (child->type != '{') refuse("S6", "__metadata__ is not an object");
    for (const Node* item = child->child; item; item = item->next)
      if (item->type != '"') refuse("S6", "a value of __metadata__ is not a string");
  }
  qsort(shard.tensors, shard.count, sizeof *shard.tensors, by_position);
  for (size_t i = 0; i < shard.count; position = shard.tensors[i++].end)
    if (shard.tensors[i].begin != position) refuse("S5", "overlap or hole");
  if (position != size - shard.data_start) refuse("S5", "the tensors do not fill the data section");
  return shard;
}

/* --- A weight: rules T1 to T8 and D1 to D3. --- */

static const Tensor* find(const Shard* shard, const char* weight, const char* suffix) {
  size_t length = strlen(weight), more = strlen(suffix);
  for (size_t i = 0; i < shard->count; i++) {
    const Node* node = shard->tensors[i].node;
    if (node->key_size == length + more && !memcmp(node->key, weight, length) &&
        !memcmp(node->key + length, suffix, more))
      return shard->tensors + i;
  }
  return NULL;
}

/* Whether a tensor has this dtype and the shape [first], or [first, 1] when two dimensions are asked for. */
static int fits(const Tensor* tensor, const char* dtype, uint64_t first, size_t dims) {
  const Node* shape = get(tensor->node, "shape");
  uint64_t one = 1, found = 0;
  return is_text(get(tensor->node, "dtype"), dtype) && children(shape) == dims && integer(shape->child, &found) &&
         found == first && (dims == 1 || (integer(shape->child->next, &one) && one == 1));
}

/* The bytes of a stored tensor that must exist with this dtype and shape. A NUL follows them. */
static void* load(Shard* shard, const char* weight, const char* suffix, const char* dtype, uint64_t first, size_t dims,
                  const char* rule) {
  const Tensor* tensor = find(shard, weight, suffix);
  if (!tensor) refuse("T1", suffix);
  if (!fits(tensor, dtype, first, dims)) refuse(rule, "wrong dtype or shape");
  void* data = allocate(tensor->end - tensor->begin + 1, 1);
  read_at(shard, shard->data_start + tensor->begin, data, tensor->end - tensor->begin);
  return data;
}

static float from_bits(uint32_t bits) {
  float f;
  return memcpy(&f, &bits, 4), f;
}
static uint32_t to_bits(float f) {
  uint32_t bits;
  return memcpy(&bits, &f, 4), bits;
}

static float* load_scales(Shard* shard, const char* weight, const char* suffix, uint64_t count, const char* rule) {
  float* scales = load(shard, weight, suffix, "F32", count, 1, rule);
  for (uint64_t i = 0; i < count; i++)
    if (!(scales[i] >= 0 && scales[i] <= FLT_MAX)) refuse(rule, "a scale is negative or not finite");
  return scales;
}

/* The 8-bit dynamic map of appendix B, ascending. */
static void dynamic_map(float map[256]) {
  static const float powers[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  int position = 128;
  map[127] = 0.0f;
  map[255] = 1.0f;
  for (int i = 0; i < 7; i++) {
    int steps = 1 << i;
    float step = (1.0f - 0.1f) / (float)steps, edges[65];
    for (int j = 0; j <= steps; j++) /* each rounded once: in double the expressions are exact */
      edges[j] = (float)(j < (steps + 1) / 2 ? 0.1f + (double)step * j : 1.0 - (double)step * (steps - j));
    for (int j = 0; j < steps; j++) map[position++] = (edges[j] + edges[j + 1]) / 2 * powers[i];
  }
  for (int i = 0; i < 127; i++) map[126 - i] = -map[128 + i];
}

static State read_state(Shard* shard, const char* weight, const char* suffix, const Tensor* tensor) {
  static const char* const keys[] = {"quant_type",       "blocksize",    "dtype",        "shape",
                                     "nested_blocksize", "nested_dtype", "nested_offset"};
  State state = {!strcmp(strrchr(suffix, '_') + 1, "fp4"), 0, NULL, 0, 0, 0};
  const Node* found[7];
  uint64_t size = tensor->end - tensor->begin, number = 0;
  if (size > MAX_STATE) refuse("T6", "quant_state is longer than 64 KiB");
  const Node* root = parse(load(shard, weight, suffix, "U8", size, 1, "T6"), (size_t)size);
  if (!root) refuse("T6", "quant_state is not a JSON object");
  for (int i = 0; i < 7; i++) found[i] = get(root, keys[i]);
  state.nested = found[4] || found[5] || found[6];
  for (int i = 0; i < (state.nested ? 7 : 4); i++)
    if (!found[i]) refuse("T6", "quant_state lacks a key");
  if (children(root) != (state.nested ? 7 : 4)) refuse("T6", "quant_state has an unknown key");
  if (!is_text(found[0], strrchr(suffix, '_') + 1)) refuse("T6", "quant_type differs from the suffix");
  if (!integer(found[1], &state.blocksize) || state.blocksize < 32 || state.blocksize > 4096 ||
      (state.blocksize & (state.blocksize - 1)))
    refuse("T6", "blocksize is not allowed");
  state.dtype = is_text(found[2], "float32") ? "F32" : is_text(found[2], "float16") ? "F16" : "BF16";
  if (*state.dtype == 'B' && !is_text(found[2], "bfloat16")) refuse("T6", "dtype is not allowed");
  int zero = 0;
  state.elements = product(found[3], MAX_ELEMENTS, "T7", &zero);
  if (zero || !found[3]->child || state.elements >= MAX_ELEMENTS) refuse("T7", "shape is empty or too large");
  if (!state.nested) return state;
  if (!integer(found[4], &number) || number != NESTED) refuse("D3", "nested_blocksize is not 256");
  if (!is_text(found[5], "float32")) refuse("D3", "nested_dtype is not float32");
  double offset = found[6]->type == '0' ? strtod(found[6]->text, NULL) : 2.0 * FLT_MAX;
  if (!(offset >= -FLT_MAX && offset <= FLT_MAX) || (double)(float)offset != offset)
    refuse("D3", "nested_offset is not a float32 value");
  state.offset = (float)offset;
  return state;
}

/* The state of a weight that has one quant_state, of a known kind (rules T1 and T2). */
static State find_state(Shard* shard, const char* weight) {
  static const char prefix[] = ".quant_state.bitsandbytes__";
  static const char* const suffixes[2] = {".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"};
  const Tensor* known[2] = {find(shard, weight, suffixes[0]), find(shard, weight, suffixes[1])};
  size_t length = strlen(weight), size = sizeof prefix - 1, count = 0;
  for (size_t i = 0; i < shard->count; i++) {
    const Node* node = shard->tensors[i].node;
    count += node->key_size > length + size && !memcmp(node->key, weight, length) &&
             !memcmp(node->key + length, prefix, size);
  }
  if (!count) refuse("T1", "there is no quant_state");
  if (count > 1 || (!known[0] && !known[1])) refuse("T2", "unknown or second quant_state");
  State state = read_state(shard, weight, suffixes[!known[0]], known[!known[0]]);
  if (!state.nested && (find(shard, weight, ".nested_absmax") || find(shard, weight, ".nested_quant_map")))
    refuse("T2", "nested companions without double quantization");
  return state;
}

static float* load_absmax(Shard* shard, const char* weight, const State* state) {
  uint64_t blocks = (state->elements + state->blocksize - 1) / state->blocksize;
  if (!state->nested) return load_scales(shard, weight, ".absmax", blocks, "T4");
  uint8_t* codes = load(shard, weight, ".absmax", "U8", blocks, 1, "T4");
  float* nested = load_scales(shard, weight, ".nested_absmax", (blocks + NESTED - 1) / NESTED, "D1");
  float map[256], *absmax = allocate(blocks, sizeof *absmax);
  dynamic_map(map);
  if (memcmp(map, load(shard, weight, ".nested_quant_map", "F32", 256, 1, "D2"), sizeof map))
    refuse("D2", "nested_quant_map is not the 8-bit codebook");
  for (uint64_t i = 0; i < blocks; i++) {
    float scaled = map[codes[i]] * nested[i / NESTED];
    absmax[i] = scaled + state->offset;
  }
  return absmax;
}

static uint32_t to_bfloat16(float value) {
  uint32_t bits = to_bits(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static uint32_t to_float16(float value) {
  uint32_t sign = to_bits(value) >> 16 & 0x8000, size = to_bits(value) & 0x7fffffff;
  if (size >= 0x477ff000) return sign | 0x7c00;                                           /* from 65520 on: infinity */
  if (size < 0x38800000) return sign | (to_bits(from_bits(size) + 0.5f) - to_bits(0.5f)); /* 0.5 has ulp 2**-24 */
  return sign | (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;
}

static void decode(const char* path, const char* weight) {
  Shard shard = open_shard(path);
  if (!find(&shard, weight, "")) refuse("T2", "there is no such weight");
  State state = find_state(&shard, weight);
  const uint8_t* codes = load(&shard, weight, "", "U8", (state.elements + 1) / 2, 2, "T3");
  if (memcmp(BOOKS[state.book], load(&shard, weight, ".quant_map", "F32", 16, 1, "T5"), 64))
    refuse("T5", "quant_map is not the codebook");
  const float* absmax = load_absmax(&shard, weight, &state);
  if (state.elements % 2 && (codes[state.elements / 2] & 15) != (state.book ? 0 : 7))
    refuse("T8", "the pad nibble is not the code of zero");
  for (uint64_t i = 0; i < state.elements; i++) {
    unsigned code = i % 2 ? codes[i / 2] & 15u : codes[i / 2] >> 4;
    float element = from_bits(BOOKS[state.book][code]) * absmax[i / state.blocksize];
    uint32_t bits = to_bits(element);
    if (state.dtype[1] != '3') bits = *state.dtype == 'B' ? to_bfloat16(element) : to_float16(element);
    for (int byte = 0; byte < (state.dtype[1] == '3' ? 4 : 2); byte++) putchar((int)(bits >> 8 * byte & 255));
  }
}

static const char* line(char* buffer, int size) {
  if (!fgets(buffer, size, stdin)) exit(UNSUPPORTED);
  buffer[strcspn(buffer, "\n")] = 0;
  return buffer;
}

int main(void) {
  static char version[64], request[64], path[8192], weight[8192];
  if (strcmp(line(version, sizeof version), "qlf-kit 1") || strcmp(line(request, sizeof request), "decode"))
    return UNSUPPORTED;
  line(path, sizeof path);
  decode(path, line(weight, sizeof weight));
  return fflush(stdout) ? 1 : 0;
}
