// shapes.h's choices: the row tiles' on the current device, and all for people to ask without a GPU
// (benchmarks/picks.py).
#include <sstream>
#include <string>

#include "primitives.h"
#include "shapes.h"

namespace simple_moe::cuda {
namespace {

// `parts`: of k.
void describe(std::ostream& text, const RowTiles& tiles, const ProductSize& size, int parts,
              const DeviceInfo& device) {
  const GemmTile& tile = kShapes[choose_shape(tiles, size, device)];
  text << "{\"rows\": " << tile.rows << ", \"cols\": " << tile.cols << ", \"depth\": " << tile.depth
       << ", \"stages\": " << tile.stages << ", \"parts\": " << parts
       << ", \"warps\": " << tile.warps() << ", \"kb\": " << ceil_div(tile.bytes(), 1024)
       << ", \"blocks_per_sm\": " << resident_blocks(tile, device)
       << ", \"most_items\": " << tiles.most * column_tiles(size.n, size.gated, tile.cols) << "}";
}

// Of grouped_gemv.
void describe(std::ostream& text, int64_t out_rows, int64_t vectors, const ProductSize& size,
              const DeviceInfo& device) {
  const GemvTile tile = choose_gemv_tile(out_rows, size.n, vectors, size.gated, device);
  text << "{\"cols\": " << tile.cols << ", \"threads\": " << tile.threads
       << ", \"blocks\": " << out_rows * size.n / tile.cols << "}";
}

}  // namespace

RowTiles plan_row_tiles(int64_t rows, int64_t experts, int64_t first_n, int64_t second_n,
                        bool may_split, bool wgmma) {
  return plan_row_tiles(rows, experts, first_n, second_n, may_split, wgmma, device_info());
}

// Weights stream through L2 meanwhile. What they push out is written to memory, which costs more
// than its bytes, and read again. But too much would push itself out, and leave the weights that
// several tiles share no room.
bool l2_keeps(int64_t bytes) { return 6 * bytes <= device_info().l2_bytes; }

}  // namespace simple_moe::cuda

// Of a 16-bit layer without wgmma on a GPU of so many multiprocessors and so much shared memory a
// block: a JSON list of its first product's tile and its second's. Valid until the next call of the
// thread.
extern "C" __attribute__((visibility("default"))) const char* simple_moe_plan(
    int64_t tokens, int64_t topk, int64_t experts, int64_t hidden, int64_t intermediate, int gated,
    int sms, int smem_kb) {
  using namespace simple_moe;
  using namespace simple_moe::cuda;
  const size_t smem = static_cast<size_t>(smem_kb) << 10;
  const DeviceInfo device{.sm_count = sms,
                          .smem_per_block = smem,
                          .smem_per_sm = smem + 1024,
                          .l2_bytes = 0,
                          .memory_gbps = 0,
                          .major = 8,
                          .minor = 0,
                          .early_launch = false};
  const int64_t slots = tokens * topk;
  const ProductSize first{slots, experts, intermediate, hidden, gated != 0, false};
  ProductSize second{slots, experts, hidden, intermediate, false, true};
  std::ostringstream text;
  text << "[";
  if (slots_go_by_themselves(first, tokens) && slots_go_by_themselves(second, tokens)) {
    describe(text, slots, hidden / 8, first, device);
    text << ", ";
    describe(text, tokens, topk * intermediate / 8, second, device);
  } else {
    const RowTiles tiles =
        plan_row_tiles(slots, experts, intermediate, hidden, true, false, device);
    describe(text, tiles, first, 1, device);
    text << ", ";
    second.n <<= tiles.split_log2;
    describe(text, tiles, second, 1 << tiles.split_log2, device);
  }
  text << "]";
  static thread_local std::string answer;
  answer = text.str();
  return answer.c_str();
}
