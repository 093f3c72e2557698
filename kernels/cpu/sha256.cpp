// sha256 of the same bytes for two hashes at once, such as that of a file and that of a tensor in it.
//
// A round of SHA-256 waits for the one before it. Two chains in one loop fill each other's waits, so that both take
// little longer than one. The instructions are those of SHA-NI; without them the caller uses another implementation.
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include <memory>
#include <new>

#include "qlf/qlf.h"

#if defined(__x86_64__) && defined(__SHA__) && !defined(QLF_SIMDE)
#define QLF_SHA_NI 1
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace {

constexpr uint64_t kMaxPosition = uint64_t{1} << 62;

uint64_t number(const void* numbers, uint64_t index) {
  uint64_t found;
  memcpy(&found, static_cast<const uint8_t*>(numbers) + index * sizeof found, sizeof found);
  return found;
}

#ifdef QLF_SHA_NI

constexpr size_t kBlock = 64;
constexpr size_t kPiece = size_t{256} << 10;  // read at a time: small enough to stay in a cache until it is hashed

struct Hash {
  uint64_t length;  // bytes so far
  uint32_t words[8];
  uint8_t tail[kBlock];  // what does not fill a block yet
};
static_assert(sizeof(Hash) <= QLF_SHA256_BYTES, "callers hold this many bytes");

constexpr Hash kEmpty = {
    0, {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}, {}};

alignas(16) constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

bool has_sha_ni() {
  static const bool found = [] {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & (1u << 29)) && __builtin_cpu_supports("sse4.1");
  }();
  return found;
}

// The working variables as the instructions want them: abef and cdgh.
struct Lane {
  __m128i abef, cdgh;
  const uint8_t* data;

  Lane(const Hash& hash, const uint8_t* bytes) : data(bytes) {
    const __m128i* words = reinterpret_cast<const __m128i*>(hash.words);
    const __m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128(words), 0xb1);
    const __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128(words + 1), 0x1b);
    abef = _mm_alignr_epi8(cdab, efgh, 8);
    cdgh = _mm_blend_epi16(efgh, cdab, 0xf0);
  }

  void store(Hash& hash) const {
    const __m128i feba = _mm_shuffle_epi32(abef, 0x1b), dchg = _mm_shuffle_epi32(cdgh, 0xb1);
    __m128i* words = reinterpret_cast<__m128i*>(hash.words);
    _mm_storeu_si128(words, _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128(words + 1, _mm_alignr_epi8(dchg, feba, 8));
  }
};

// `count` blocks of each lane, side by side.
template <int kLanes>
void compress(Lane (&lanes)[kLanes], size_t count) {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  for (; count; --count) {
    __m128i abef[kLanes], cdgh[kLanes], words[kLanes][4];
    for (int lane = 0; lane < kLanes; ++lane) {
      abef[lane] = lanes[lane].abef;
      cdgh[lane] = lanes[lane].cdgh;
    }
#pragma GCC unroll 16
    for (int group = 0; group < 16; ++group) {  // of four rounds
      const __m128i round = _mm_load_si128(reinterpret_cast<const __m128i*>(kRound) + group);
#pragma GCC unroll 2
      for (int lane = 0; lane < kLanes; ++lane) {
        __m128i& word = words[lane][group % 4];  // holds those of four groups ago
        if (group < 4) {
          const __m128i* data = reinterpret_cast<const __m128i*>(lanes[lane].data);
          word = _mm_shuffle_epi8(_mm_loadu_si128(data + group), swap);
        } else {
          const __m128i last = words[lane][(group + 3) % 4];
          const __m128i before = _mm_alignr_epi8(last, words[lane][(group + 2) % 4], 4);
          word = _mm_sha256msg1_epu32(word, words[lane][(group + 1) % 4]);
          word = _mm_sha256msg2_epu32(_mm_add_epi32(word, before), last);
        }
        const __m128i message = _mm_add_epi32(word, round);
        cdgh[lane] = _mm_sha256rnds2_epu32(cdgh[lane], abef[lane], message);
        abef[lane] = _mm_sha256rnds2_epu32(abef[lane], cdgh[lane], _mm_shuffle_epi32(message, 0x0e));
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane].abef = _mm_add_epi32(lanes[lane].abef, abef[lane]);
      lanes[lane].cdgh = _mm_add_epi32(lanes[lane].cdgh, cdgh[lane]);
      lanes[lane].data += kBlock;
    }
  }
}

void compress_one(Hash& hash, const uint8_t* data, size_t count) {
  Lane lanes[1] = {{hash, data}};
  compress(lanes, count);
  lanes[0].store(hash);
}

void compress_both(Hash& a, const uint8_t* data_a, Hash& b, const uint8_t* data_b, size_t count) {
  Lane lanes[2] = {{a, data_a}, {b, data_b}};
  compress(lanes, count);
  lanes[0].store(a);
  lanes[1].store(b);
}

// Takes what fills the tail to a block; the number of bytes taken is returned.
size_t fill_tail(Hash& hash, const uint8_t* data, size_t n) {
  const size_t held = hash.length % kBlock;
  if (!held) return 0;
  const size_t taken = n < kBlock - held ? n : kBlock - held;
  memcpy(hash.tail + held, data, taken);
  hash.length += taken;
  if (hash.length % kBlock == 0) compress_one(hash, hash.tail, 1);
  return taken;
}

// Takes the rest, less than a block, into the empty tail.
void keep_tail(Hash& hash, const uint8_t* data, size_t n) {
  if (n) memcpy(hash.tail, data, n);
  hash.length += n;
}

void update_one(Hash& hash, const uint8_t* data, size_t n) {
  const size_t taken = fill_tail(hash, data, n), blocks = (n - taken) / kBlock;
  compress_one(hash, data + taken, blocks);
  hash.length += blocks * kBlock;
  keep_tail(hash, data + taken + blocks * kBlock, (n - taken) % kBlock);
}

void update_both(Hash& a, Hash& b, const uint8_t* data, size_t n) {
  const size_t taken_a = fill_tail(a, data, n), taken_b = fill_tail(b, data, n);
  const size_t blocks_a = (n - taken_a) / kBlock, blocks_b = (n - taken_b) / kBlock;
  const size_t blocks = blocks_a < blocks_b ? blocks_a : blocks_b;
  compress_both(a, data + taken_a, b, data + taken_b, blocks);
  a.length += blocks * kBlock;
  b.length += blocks * kBlock;
  const size_t done_a = taken_a + blocks * kBlock, done_b = taken_b + blocks * kBlock;
  update_one(a, data + done_a, n - done_a);  // at most one block more, and the tail
  update_one(b, data + done_b, n - done_b);
}

void finish(Hash& hash, uint8_t* digest) {
  const uint64_t bits = hash.length * 8;
  uint8_t padding[2 * kBlock] = {0x80};
  const size_t held = hash.length % kBlock, size = (held < kBlock - 8 ? kBlock : 2 * kBlock) - held;
  for (int i = 0; i < 8; ++i) padding[size - 1 - i] = static_cast<uint8_t>(bits >> (8 * i));
  update_one(hash, padding, size);
  for (int i = 0; i < 32; ++i) digest[i] = static_cast<uint8_t>(hash.words[i / 4] >> (24 - 8 * (i % 4)));
}

// See qlf_sha256_parts.
int32_t read_parts(void* whole, void* part, int fd, uint64_t position, uint64_t limit, const void* ends, uint64_t count,
                   uint8_t* digests, uint64_t& done) {
  const std::unique_ptr<uint8_t[]> buffer(new (std::nothrow) uint8_t[kPiece]);
  if (!buffer) return QLF_READ_FAILED;
  Hash a, b;
  memcpy(&a, whole, sizeof a);
  memcpy(&b, part, sizeof b);
  int32_t status = QLF_OK;
  uint64_t next = 0, at = position;
  const auto end_parts = [&] {
    for (; next < count && number(ends, next) == at; ++next) {
      finish(b, digests + 32 * next);
      b = kEmpty;
    }
  };
  end_parts();
  while (at < limit) {
    const ssize_t found = pread(fd, buffer.get(), limit - at < kPiece ? limit - at : kPiece, static_cast<off_t>(at));
    if (found < 0 && errno == EINTR) continue;
    if (found < 0) status = QLF_READ_FAILED;
    if (found <= 0) break;
    const uint64_t stop = at + static_cast<uint64_t>(found);
    for (const uint8_t* data = buffer.get(); at < stop;) {
      const uint64_t end = next < count && number(ends, next) < stop ? number(ends, next) : stop;
      update_both(a, b, data, static_cast<size_t>(end - at));
      data += end - at;
      at = end;
      end_parts();
    }
  }
  memcpy(whole, &a, sizeof a);
  memcpy(part, &b, sizeof b);
  done = at - position;
  return status;
}

#endif

}  // namespace

extern "C" {

int32_t qlf_sha256_supported(void) {
#ifdef QLF_SHA_NI
  return has_sha_ni() ? 1 : 0;
#else
  return 0;
#endif
}

int32_t qlf_sha256_begin(void* hash) {
  if (!hash) return QLF_BAD_ARGUMENT;
  if (!qlf_sha256_supported()) return QLF_UNSUPPORTED_ISA;
#ifdef QLF_SHA_NI
  memcpy(hash, &kEmpty, sizeof kEmpty);
#endif
  return QLF_OK;
}

int32_t qlf_sha256_parts(void* whole, void* part, int32_t fd, uint64_t position, uint64_t limit, const void* ends,
                         uint64_t count, void* digests, uint64_t* done) {
  if (!whole || !part || whole == part || fd < 0 || position > limit || limit > kMaxPosition || !done ||
      (count && (!ends || !digests))) {
    return QLF_BAD_ARGUMENT;
  }
  for (uint64_t i = 0; i < count; ++i) {
    if (number(ends, i) < (i ? number(ends, i - 1) : position)) return QLF_BAD_ARGUMENT;
  }
  *done = 0;
  if (!qlf_sha256_supported()) return QLF_UNSUPPORTED_ISA;
#ifdef QLF_SHA_NI
  return read_parts(whole, part, fd, position, limit, ends, count, static_cast<uint8_t*>(digests), *done);
#else
  return QLF_UNSUPPORTED_ISA;
#endif
}

int32_t qlf_sha256_end(void* hash, void* digest) {
  if (!hash || !digest) return QLF_BAD_ARGUMENT;
  if (!qlf_sha256_supported()) return QLF_UNSUPPORTED_ISA;
#ifdef QLF_SHA_NI
  Hash copy;
  memcpy(&copy, hash, sizeof copy);
  finish(copy, static_cast<uint8_t*>(digest));
#endif
  return QLF_OK;
}

}  // extern "C"
