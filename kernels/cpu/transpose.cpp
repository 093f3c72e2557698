// Transposition in tiles: both sides touch whole cache lines (GPT-2's Conv1D stores [in, out], the format [out, in]).
#include <string.h>

#include "parallel.h"
#include "qlf/qlf.h"

namespace qlf {
namespace {

constexpr uint64_t kTile = 32;
constexpr uint64_t kSquare = 256;  // of tiles: its rows in and out are as many pages as a TLB holds with ease
constexpr uint64_t kMaxElements = uint64_t{1} << 48;

template <class Element>
void transpose_tile(const uint8_t* src, uint64_t rows, uint64_t cols, uint64_t row, uint64_t col, uint8_t* out) {
  constexpr size_t size = sizeof(Element);
  const uint64_t height = rows - row < kTile ? rows - row : kTile;
  const uint64_t width = cols - col < kTile ? cols - col : kTile;
  Element tile[kTile][kTile];
  for (uint64_t i = 0; i < height; ++i) {
    Element line[kTile];
    memcpy(line, src + ((row + i) * cols + col) * size, width * size);
    for (uint64_t j = 0; j < width; ++j) tile[j][i] = line[j];
  }
  for (uint64_t j = 0; j < width; ++j) memcpy(out + ((col + j) * rows + row) * size, tile[j], height * size);
}

template <class Element>
void transpose(const void* src, uint64_t rows, uint64_t cols, void* out, int threads) {
  const uint64_t down = (rows + kSquare - 1) / kSquare, across = (cols + kSquare - 1) / kSquare;
  for_each_piece(static_cast<size_t>(down * across), threads, [=](size_t square) {
    const uint64_t top = square % down * kSquare, left = square / down * kSquare;
    const uint64_t bottom = rows - top < kSquare ? rows : top + kSquare;
    const uint64_t right = cols - left < kSquare ? cols : left + kSquare;
    for (uint64_t col = left; col < right; col += kTile) {
      for (uint64_t row = top; row < bottom; row += kTile) {
        transpose_tile<Element>(static_cast<const uint8_t*>(src), rows, cols, row, col, static_cast<uint8_t*>(out));
      }
    }
  });
}

}  // namespace
}  // namespace qlf

extern "C" int32_t qlf_transpose(const void* src, uint64_t rows, uint64_t cols, uint32_t itemsize, void* out,
                                 int32_t threads) {
  using namespace qlf;
  if (threads < 1 || threads > kMaxThreads || (itemsize != 2 && itemsize != 4)) return QLF_BAD_ARGUMENT;
  if (rows == 0 || cols == 0) return QLF_OK;
  if (cols >= kMaxElements / rows || !src || !out) return QLF_BAD_ARGUMENT;
  itemsize == 2 ? transpose<uint16_t>(src, rows, cols, out, threads)
                : transpose<uint32_t>(src, rows, cols, out, threads);
  return QLF_OK;
}
